"""A model that is asked in another template than the one it was trained in.

"Using a format different from the format a model was trained with will usually cause severe, silent
performance degradation." Models are trained in ChatML and in Alpaca's template, and asked in both
and in Llama 3's. What is judged is the answer alone: the loss of its tokens, the mark that ends a
turn left out (it differs by template, and is not the answer), and whether what the model writes
begins with the whole reference. The same tokens are graded in each template, in the same rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.papers.claim import Check, Claim, Finding, Settings, over_seeds
from benchmarks.papers.task import Variant, answers, function_task, row_losses, trained
from lora_core.data import IGNORED, Tokenizer, load_template, load_tokenizer

TRAINED = ("chatml", "alpaca")
ASKED = ("chatml", "alpaca", "llama3")


def answer_rows(chats: Sequence[Sequence[Any]], tok: Tokenizer) -> list[dict[str, Any]]:
    """Rows in which the answer's own tokens are graded, in the tokenizer's template."""
    rows = []
    for chat in chats:
        prompt, answer = tok.encode_prompt(chat[:1]), tok.encode(chat[1]["content"])
        rows.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return rows


def judged(
    model: nn.Module, tok: Tokenizer, chats: Sequence[Sequence[Any]], template: str
) -> tuple[float, float]:
    """Nats a token of the answers, and the share of answers that begin with the reference."""
    tok.chat_template = load_template(template)
    nll, tokens = row_losses(model, answer_rows(chats, tok))
    right = [
        text.strip().startswith(chat[1]["content"])
        for text, chat in zip(answers(model, tok, chats), chats, strict=True)
    ]
    return sum(nll) / sum(tokens), sum(right) / len(right)


def run(settings: Settings) -> Finding:
    """Every model asked in every template."""
    tok = load_tokenizer(settings.model)
    pairs = [(mine, asked) for mine in TRAINED for asked in ASKED]
    losses: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    right: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for seed in settings.seeds:
        chats = [row["messages"] for row in function_task(seed, settings.held_out)[1]]
        for mine in TRAINED:
            model = trained(settings, variant(mine), seed)
            with torch.no_grad():
                for asked in ASKED:
                    loss, share = judged(model, tok, chats, asked)
                    losses[mine, asked].append(loss)
                    right[mine, asked].append(share)
    rows = [
        {
            "trained in": mine,
            "asked in": asked,
            "loss of the answer": over_seeds(losses[mine, asked]),
            "right answers": over_seeds(right[mine, asked]),
        }
        for mine, asked in pairs
    ]
    wrong = [(mine, asked) for mine, asked in pairs if mine != asked]
    checks = [
        Check(
            f"right answers, {mine} asked in {asked} − in {mine}",
            over_seeds(right[mine, asked], right[mine, mine]),
            "below",
        )
        for mine, asked in wrong
    ]
    checks += [
        Check(
            f"loss, {mine} asked in {asked} − in {mine}",
            over_seeds(losses[mine, asked], losses[mine, mine]),
            "above",
        )
        for mine, asked in wrong
    ]
    return Finding(rows, checks)


def variant(template: str) -> Variant:
    """The training in a template; in the base's own it is the run that other claims share."""
    return Variant(template=None if template == "chatml" else template)


CLAIM = Claim(
    name="wrong_template",
    paper="Carrigan 2023, *Chat Templates*, huggingface.co/blog/chat-templates",
    says="a model asked in another template than its training's answers worse",
    run=run,
    scale="an adapter of a few hundred rows on a base that knows ChatML's marks from its "
    "pretraining; Llama 3's marks are plain text to this tokenizer, where Llama's has a token each",
)
