"""The quickstart's task as a measure: are the answers JSON, and do they say what is true?

Shared by what trains on that task. The answers are objects with three keys, so right and wrong can
be told without a metric of texts: the module alone, or all three.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_core.data import SFTDataset, Tokenizer
from lora_core.data.stdlib import FunctionRow
from lora_core.evaluate.perplexity import perplexity
from lora_core.models import generate_ids, left_pad

MAX_LENGTH = 512
"""longest row of the task, in tokens"""
ANSWER_TOKENS = 96
"""longest answer"""


@dataclasses.dataclass(frozen=True)
class Judged:
    """What the held-out functions say about a model."""

    valid_json: float
    """Share of answers that are a JSON object with the three keys."""
    right_module: float
    """Share of answers that name the right module."""
    right_answer: float
    """Share of answers that are right in all three."""
    perplexity: float
    """On the graded tokens of the held-out answers."""
    answers: list[str]
    """The answers, in the order of the rows."""


def parse_answer(text: str) -> dict[str, Any] | None:
    """The JSON object an answer consists of, if it is one with exactly the three keys."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    wanted = {"module", "name", "summary"}
    return found if isinstance(found, dict) and found.keys() == wanted else None


@torch.no_grad()
def first_answers(
    model: nn.Module,
    tok: Tokenizer,
    conversations: Sequence[Sequence[Any]],
    max_new_tokens: int = ANSWER_TOKENS,
) -> list[str]:
    """What the model writes to the first turn of each conversation, greedily, 32 at a time.

    Args:
        model: a decoder.
        tok: its tokenizer.
        conversations: messages; what follows the first one is not shown.
        max_new_tokens: longest answer.

    Returns:
        The answers, in order.
    """
    prompts = [tok.encode_prompt(messages[:1]) for messages in conversations]
    written: list[str] = []
    for start in range(0, len(prompts), 32):
        ids, mask = left_pad(prompts[start : start + 32], tok.pad_id)
        found = generate_ids(model, ids, mask, max_new_tokens=max_new_tokens, eos_ids=tok.eos_ids)
        written += [tok.decode(new, skip_special_tokens=True) for new in found]
    return written


def judge(model: nn.Module, tok: Tokenizer, rows: Sequence[FunctionRow], file: Path) -> Judged:
    """Let the model answer every held-out question, and score the answers.

    Args:
        model: a decoder.
        tok: its tokenizer.
        rows: the questions and their truths.
        file: the same rows as JSONL, for the perplexity.

    Returns:
        The scores.
    """
    answers = first_answers(model, tok, [row["messages"] for row in rows])
    parsed = [parse_answer(answer) for answer in answers]
    truths = [json.loads(row["messages"][1]["content"]) for row in rows]
    data = SFTDataset.from_jsonl(file, tok, max_length=MAX_LENGTH)
    pairs = list(zip(parsed, truths, strict=True))
    return Judged(
        valid_json=sum(p is not None for p in parsed) / len(rows),
        right_module=sum(p is not None and p["module"] == t["module"] for p, t in pairs)
        / len(rows),
        right_answer=sum(p == t for p, t in pairs) / len(rows),
        perplexity=perplexity(model, data).perplexity,
        answers=answers,
    )
