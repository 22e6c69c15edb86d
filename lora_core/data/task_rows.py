"""Rows for heads: a labelled JSON Lines file, tokenised, with what leads back to its characters.

    sequence    the text, cut at its end; of two texts the longer one is cut first
    token       the words joined by single spaces, as the backbone has read text; a word's label
                stands on its first piece, -100 everywhere else; a long row becomes several, cut
                between words
    span        question, then context; a long context becomes several windows that overlap; where
                the answer is not whole in a window, it points to the place that means "none"

Labels are sorted names (integers by value), taken from the training file and kept in order by
whoever trains; a file read `like` that one may hold no others.

"None" is the first token of an encoder's row, as in BERT's SQuAD 2.0. The first token of a decoder
has seen nothing, so there it is the last one, which has seen all: the end token that closes the
row, where the tokenizer has one.

Against transformers' example scripts: words are not tokenised one by one, which loses the spaces
that byte-level vocabularies are made of; a long row of tags is not cut off but goes on in a further
row, so that every word gets its tag; and an answer is checked at its place when the file is read.

Ref: Devlin et al. 2019, arXiv:1810.04805, sections 4.2, 4.3 (spans) and 5.3 (the first piece's
label).
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lora_core.data.task_encoding import IGNORED, TaskEncoder, TaskRow
from lora_core.data.task_labels import labels_of, problem_of
from lora_core.data.task_records import Example, read_examples
from lora_core.data.tokenizer import Tokenizer

__all__ = ["TaskData", "TaskRow", "collate_task", "graded", "read_task"]


@dataclass
class TaskData:
    """One task's rows.

    Args:
        name: of the task, and of its head.
        kind: "sequence", "token" or "span".
        labels: names by number; none for numbers and spans.
        rows: see `TaskRow`.
        problem: of a sequence, as transformers names it.
        examples: what the rows were made of, by number; a row's "example" is its place here.
        pad_id: what batches are filled with.
        notes: what was cut or left out, in words.
    """

    name: str
    kind: str
    labels: list[str]
    rows: list[TaskRow]
    problem: str = "single_label_classification"
    examples: list[Example] = field(default_factory=list)
    pad_id: int = 0
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        of = f" of {len(self.labels)} labels" if self.labels else ""
        told = {"sequence": "texts", "token": "sentences", "span": "questions"}[self.kind]
        rows = f" in {len(self.rows)} rows" if len(self.rows) != len(self.examples) else ""
        notes = "".join(f"; {note}" for note in self.notes)
        kind = "numbers" if self.problem == "regression" else self.kind
        return f"{self.name} ({kind}{of}): {len(self.examples)} {told}{rows}{notes}"

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of rows for `MultiHead.forward`; see `collate_task`."""
        return collate_task(rows, self.name, self.kind, self.pad_id)

    def select(self, examples: Iterable[int]) -> "TaskData":
        """The same task with the rows of these examples alone, in this order."""
        chosen = list(examples)
        by_example: dict[int, list[TaskRow]] = {}
        for row in self.rows:
            by_example.setdefault(row["example"], []).append(row)
        rows = [
            cast(TaskRow, {**row, "example": number})
            for number, old in enumerate(chosen)
            for row in by_example.get(old, ())
        ]
        return replace(self, rows=rows, examples=[self.examples[i] for i in chosen], notes=[])

    def split(self, fraction: float, seed: int = 0) -> tuple["TaskData", "TaskData"]:
        """A seeded split by example into (train, evaluation); equal texts stay on one side.

        Args:
            fraction: share of the examples for evaluation, in (0, 1); one at least.
            seed: of the draw.

        Raises:
            ValueError: nothing would be left to train on.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for row in self.rows:
            groups.setdefault(_key(self, row["example"]), []).append(row["example"])
        drawn = [sorted(set(group)) for group in groups.values()]
        random.Random(seed).shuffle(drawn)
        wanted, held = max(1, round(fraction * len(self.examples))), set[int]()
        for group in drawn:
            if len(held) + len(group) <= wanted:
                held.update(group)
        held = held or set(drawn[0])
        rest = [i for i in range(len(self.examples)) if i not in held]
        if not rest:
            raise ValueError(
                f"{self.name}: {len(self.examples)} examples ({len(drawn)} different) cannot be "
                "split: nothing would be left to train on; add data or set the evaluation "
                "fraction to 0"
            )
        return self.select(rest), self.select(sorted(held))


def _key(task: TaskData, number: int) -> tuple[Any, ...]:
    """What is the same for two examples that must not be on both sides."""
    example = task.examples[number]
    return tuple(
        getattr(example, name)
        for name in ("text", "text_pair", "words", "context")
        if hasattr(example, name)
    )


def read_task(
    path: str | Path,
    tok: Tokenizer,
    name: str | None = None,
    max_length: int = 512,
    columns: Mapping[str, str] | None = None,
    *,
    like: TaskData | None = None,
    labelled: bool = True,
    causal: bool | None = None,
    overlap: int = 64,
) -> TaskData:
    """Read one task's file; its kind is told by the shape of its rows (task_records.py).

    Args:
        path: JSON Lines.
        tok: from `load_tokenizer`.
        name: of the task; None: the file's name without its ending.
        max_length: longest row, in tokens, the tokenizer's own included.
        columns: this library's name to the file's name, {"label": "category"}.
        like: the training data, whose name, kind and labels these have to have.
        labelled: whether labels have to be there; otherwise they are not looked at, and the rows
            are for predictions.
        causal: whether rows are for a decoder; None: as the tokenizer looks (`Frame.of`).
        overlap: tokens that neighbouring windows of a context share.

    Returns:
        TaskData.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what `read_examples` refuses, a label that training has not, or rows for which
            max_length has no room; each with its file:line.
    """
    kind, examples = read_examples(path, columns, labelled)
    if like is not None and kind != like.kind:
        raise ValueError(f"{path} holds rows for a {kind} head; {like.name} is a {like.kind} task")
    labels: list[str] = []
    problem = "single_label_classification"
    if like is not None:
        labels, problem = like.labels, like.problem
    elif labelled:
        problem = problem_of(examples)
        labels = labels_of(examples, problem)
    encoder = TaskEncoder(tok, max_length, labels, problem, causal, overlap)
    rows: list[TaskRow] = []
    for number, example in enumerate(examples):
        rows += encoder.rows(example, number)
    chosen = Path(path).stem.replace(".", "_") if name is None else name
    chosen = like.name if like is not None and name is None else chosen
    return TaskData(chosen, kind, labels, rows, problem, examples, tok.pad_id, encoder.notes())


def collate_task(
    rows: Sequence[Mapping[str, Any]], name: str, kind: str, pad_id: int = 0
) -> dict[str, Any]:
    """Rows of one task as a batch, padded on the right.

    Args:
        rows: see `TaskRow`.
        name: of the task.
        kind: "sequence", "token" or "span".
        pad_id: what to fill `input_ids` with.

    Returns:
        "task" (the name); input_ids, attention_mask and, where the tokenizer has segments,
        token_type_ids (B, T) int64; and what is known of: `labels` (B,) int64, (B, labels) or (B,)
        float32 of a sequence, (B, T) int64 with -100 of tokens; `start_positions` and
        `end_positions` (B,) int64 of a span.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    batch: dict[str, Any] = {"task": name, "input_ids": _padded(rows, "input_ids", pad_id)}
    batch["attention_mask"] = _padded([{"m": [1] * len(r["input_ids"])} for r in rows], "m", 0)
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = _padded(rows, "token_type_ids", 0)
    if kind == "sequence" and "label" in rows[0]:
        batch["labels"] = torch.tensor([row["label"] for row in rows])
    if kind == "token" and "labels" in rows[0]:
        batch["labels"] = _padded(rows, "labels", IGNORED)
    if kind == "span" and "start" in rows[0]:
        batch["start_positions"] = torch.tensor([row["start"] for row in rows])
        batch["end_positions"] = torch.tensor([row["end"] for row in rows])
    return batch


def graded(batch: Mapping[str, Any]) -> int:
    """What a batch's loss counts: texts of a sequence, questions' windows of a span, tokens.

    Args:
        batch: of `collate_task`.

    Returns:
        Their number; 0 of a batch without labels.
    """
    if "start_positions" in batch:
        return len(batch["start_positions"])
    if "labels" not in batch:
        return 0
    labels: Tensor = batch["labels"]
    if labels.is_floating_point() or labels.dim() == 1:
        return len(labels)
    return int((labels != IGNORED).sum())


def _padded(rows: Sequence[Mapping[str, Any]], key: str, fill: int) -> Tensor:
    longest = max(len(row[key]) for row in rows)
    out = torch.full((len(rows), longest), fill, dtype=torch.int64)  # (B, T)
    for b, row in enumerate(rows):
        out[b, : len(row[key])] = torch.tensor(row[key], dtype=torch.int64)
    return out
