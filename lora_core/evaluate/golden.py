r"""A golden set: frozen prompts, and what has to be true of their answers before and after a run.

A test set says how good a model is on average; a golden set says what it may never lose. A few
dozen prompts, each with a check that is yes or no, are put to the model before training and after,
and the two results are held against each other (golden_diff.py):

    {"prompt": "2 + 2 =", "expect": "4"}
    {"id": "greet", "system": "Be brief.", "prompt": "Hello!", "contains": "Hello",}
    {"messages": […], "score": {"metric": "rouge_l", "reference": "…", "floor": 0.7}}
    {"messages": […], "schema": {"type": "object", "required": ["name"]}}
    {"messages": […], "refusal": true, "max_new_tokens": 32}

`prompt` with a `system` beside it is a conversation; alone it is raw text for a model without a
chat template, or one user turn with `chat=True`. The checks are in golden_checks.py.

Results name what they were measured on by the file's SHA-256. A row without an `id` is named by its
prompt's hash, not by its line, so that a row put in above does not rename the rest. Answers come
from a callable, so a served model is judged like one in memory. Each batch is on disk before the
next is asked for, and batches are formed of the file alone: a continued run is the same run.

lm-eval-harness and promptfoo do this with a task or a YAML file a suite; here a row is a line of
JSON beside the training data, and the exit code is the interface.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from lora_core.data.lines import read_rows
from lora_core.evaluate.golden_checks import CHECKS, Check, Finding, expects_nothing, parse_checks
from lora_core.evaluate.golden_result import GoldenResult, GoldenRow, header_of, row_facts, row_of
from lora_core.evaluate.questions import Prompt, parse_question
from lora_core.evaluate.row_log import RowLog, short
from lora_core.evaluate.shown import is_unicode
from lora_core.files import sha256_file

__all__ = ["GoldenPrompt", "GoldenSet", "model_answers", "read_golden", "run_golden"]

_KEYS = {"id", "prompt", "messages", "system", "max_new_tokens", *CHECKS}


class Answering(Protocol):
    """Prompts to answers, one each, in their order."""

    def __call__(self, prompts: Sequence[Prompt], **limit: int) -> Sequence[str]:
        """Answer; `max_new_tokens=` is given for rows that set it, and for no others."""


@dataclass(frozen=True)
class GoldenPrompt:
    """One frozen prompt and what is asked of its answer."""

    id: str
    """its name, unique in its file"""
    prompt: Prompt
    """turns, or raw text to continue"""
    checks: tuple[Check, ...]
    """one or more; all have to pass"""
    where: str
    """file:line"""
    max_new_tokens: int | None = None
    """longest answer; None: the callable's own"""
    may_be_empty: bool = False
    """whether "" is among the accepted answers"""


@dataclass(frozen=True)
class GoldenSet:
    """The prompts of a file."""

    path: str
    """the file"""
    sha256: str
    """of its bytes, in hexadecimal"""
    rows: tuple[GoldenPrompt, ...]
    """in the file's order"""
    options: dict[str, Any] = field(default_factory=dict)
    """how it was read, where that is not the usual way: chat, phrases"""

    @property
    def name(self) -> str:
        """The file's name, without its folder."""
        return Path(self.path).name


def read_golden(path: str | Path, *, chat: bool = False, phrases: Sequence[str] = ()) -> GoldenSet:
    """Read a golden file.

    Args:
        path: JSON Lines.
        chat: a bare `prompt` is a user's turn, not raw text.
        phrases: openings that count as refusals in every row, beside the known ones.

    Returns:
        The set, all of it checked.

    Raises:
        FileNotFoundError: no such file.
        ImportError: a row has a schema, and `jsonschema` is missing.
        ValueError: file:line of a row that does not parse, has an unknown key, nothing to ask or
            nothing to check, a check that is wrong in itself, or another row's id.
    """
    found: dict[str, GoldenPrompt] = {}
    for where, row in read_rows(path):
        new = _parse(row, where, chat, phrases)
        if new.id in found:
            named = f"id {new.id!r}" if "id" in row else "the prompt, and with it the id,"
            raise ValueError(
                f"{where}: {named} is that of {found[new.id].where} too; give each row its own id"
            )
        found[new.id] = new
    options = {"chat": chat, "phrases": list(phrases)}
    unusual = {name: value for name, value in options.items() if value}
    return GoldenSet(str(path), sha256_file(path), tuple(found.values()), unusual)


def _parse(row: dict[str, Any], where: str, chat: bool, phrases: Sequence[str]) -> GoldenPrompt:
    unknown = sorted(row.keys() - _KEYS)
    if unknown:
        raise ValueError(f"{where}: unknown keys {unknown}; a golden row has {sorted(_KEYS)}")
    limit = row.get("max_new_tokens")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"{where}: max_new_tokens must be 1 or more; got {limit!r}")
    asked = _asked(row, where, chat)
    question = parse_question(asked if "id" not in row else {**asked, "id": row["id"]}, where)
    if question.references:
        raise ValueError(f"{where}: the conversation ends in an answer; end it with what is asked")
    prompt = question.messages
    return GoldenPrompt(
        question.id if "id" in row else _digest(prompt)[:10],
        prompt,
        tuple(parse_checks(row, where, phrases)),
        where,
        limit,
        expects_nothing(row),
    )


def _asked(row: Mapping[str, Any], where: str, chat: bool) -> dict[str, Any]:
    """What a row asks, as a row of a data file; a system text becomes the first turn."""
    if ("prompt" in row) == ("messages" in row):
        raise ValueError(f"{where}: give prompt or messages, one of them; keys are {sorted(row)}")
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"{where}: system must be a string; got {short(system)}")
    turns = row.get("messages", row.get("prompt"))
    if "prompt" in row and isinstance(turns, str):
        if not turns:
            raise ValueError(f"{where}: the prompt is empty: there is nothing to ask")
        if system is None and not chat:
            return {"prompt": turns}
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list):
        raise ValueError(f"{where}: prompt must be a text or turns; got {short(turns)}")
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*first, *turns]}


def _digest(prompt: Prompt) -> str:
    import json

    text = json.dumps(prompt, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def model_answers(
    model: nn.Module, tok: Any, max_new_tokens: int = 128, **options: Any
) -> Answering:
    """Answers of a model in memory, greedy unless told otherwise.

    Args:
        model: any that returns `.logits`.
        tok: its tokenizer.
        max_new_tokens: longest answer of rows that set none.
        **options: further ones of `generate_batch`: temperature, seed, stop …

    Returns:
        What `run_golden` asks.
    """
    from lora_core.models.generate import generate_batch

    def answer(prompts: Sequence[Prompt], **limit: int) -> Sequence[str]:
        settings = {"max_new_tokens": max_new_tokens, **options, **limit}
        return generate_batch(model, tok, prompts, **settings)

    return answer


def run_golden(
    golden: GoldenSet,
    answer: Answering,
    *,
    out: str | Path | None = None,
    batch_size: int = 16,
    bound: Mapping[str, Any] | None = None,
    progress: Callable[[Sequence[Any]], Iterable[Any]] | None = None,
) -> GoldenResult:
    """Put a golden set to a model.

    Args:
        golden: the set.
        answer: prompts to answers; see `Answering` and `model_answers`.
        out: file that gets each batch's rows as they come, and is the saved result in the end.
            Rows that it holds are not asked for again.
        batch_size: prompts at a time; they share `max_new_tokens`.
        bound: what the answers depend on (model, adapter, sampling), JSON values by name. `out` is
            bound to it: results of another model are not continued.
        progress: wraps the batches (a `tqdm`, for one).

    Returns:
        Every row with its answer and what each check found.

    Raises:
        RuntimeError: `answer` raised; with the rows it was asked and how many are done and kept.
        ValueError: `answer` gave something else than one text a prompt; or `out` holds results of
            another set, or of other settings.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more; got {batch_size}")
    settings = {**golden.options, **(bound or {})}
    log = RowLog(out, header_of(golden.name, golden.sha256, len(golden.rows), settings))
    kept = {row.id: row for row in (row_of(facts, where) for where, facts in log.kept)}
    batches = _batches(golden.rows, batch_size)
    for batch in progress(batches) if progress is not None else batches:
        left = [row for row in batch if row.id not in kept]
        if not left:
            continue
        # the whole batch, as it was the first time: rounding may depend on the company
        said = _answers(answer, batch, f"{len(kept)} of {len(golden.rows)} rows are done", log.path)
        for row, text in zip(batch, said, strict=True):
            if row.id not in kept:
                kept[row.id] = _judged(row, text)
                log.append(row_facts(kept[row.id]))
    rows = tuple(kept[row.id] for row in golden.rows)
    return GoldenResult(golden.name, golden.sha256, rows, settings)


def _batches(rows: Sequence[GoldenPrompt], size: int) -> list[list[GoldenPrompt]]:
    """Rows in their order, those of one limit together."""
    limits = dict.fromkeys(row.max_new_tokens for row in rows)
    alike = [[row for row in rows if row.max_new_tokens == limit] for limit in limits]
    return [some[i : i + size] for some in alike for i in range(0, len(some), size)]


def _answers(
    answer: Answering, batch: Sequence[GoldenPrompt], done: str, out: Path | None
) -> Sequence[str]:
    """What the callable says to a batch, checked."""
    limit = batch[0].max_new_tokens
    asked = f"{batch[0].where} (row {batch[0].id!r}, {len(batch)} at a time)"
    try:
        said = answer([row.prompt for row in batch], **({"max_new_tokens": limit} if limit else {}))
    except Exception as error:
        kept = f", and kept in {out}: a second call goes on from there" if out else ""
        raise RuntimeError(
            f"{asked}: answering failed: {type(error).__name__}: {error}; {done}{kept}"
        ) from error
    if isinstance(said, str) or not isinstance(said, Sequence) or len(said) != len(batch):
        got = short(said) if isinstance(said, str) else f"{type(said).__name__} of {_length(said)}"
        raise ValueError(f"{asked}: a list of {len(batch)} answers is needed; got {got}")
    for row, text in zip(batch, said, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"{row.where}: an answer must be a text; got {short(text)}")
        if not is_unicode(text):
            raise ValueError(
                f"{row.where}: the answer holds half of a surrogate pair: {text!a:.80}"
            )
    return said


def _length(value: Any) -> str:
    return str(len(value)) if hasattr(value, "__len__") else "no length"


def _judged(row: GoldenPrompt, text: str) -> GoldenRow:
    findings = [check(text) for check in row.checks]
    if not text.strip() and not row.may_be_empty:
        findings.append(Finding("empty", False, "nothing was generated"))
    return GoldenRow(row.id, row.prompt, text, tuple(findings), row.where)
