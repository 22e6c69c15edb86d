"""What `lora-core evaluate` has to do, read from files before a model is loaded.

A question without a reference or a golden row that does not parse is found in a second here, and
would be found after an hour of generation otherwise.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from lora_core.data import IGNORED, Rows, SFTDataset, Tokenizer, parse_columns
from lora_core.evaluate.choices import Choice, read_choices
from lora_core.evaluate.golden import GoldenSet, read_golden
from lora_core.evaluate.golden_result import GoldenResult
from lora_core.evaluate.metrics import check_references
from lora_core.evaluate.questions import Prompt, Question, read_questions
from lora_core.evaluate.retention import GeneralText, general_text
from lora_core.files import sha256_file

T = TypeVar("T")


@dataclass
class Work:
    """What is to be measured."""

    args: argparse.Namespace
    metrics: list[str] = field(default_factory=list)
    """names, in the order given"""
    questions: list[Question] = field(default_factory=list)
    """what is answered; none without metrics"""
    shots: list[Prompt] = field(default_factory=list)
    """examples put before each"""
    choices: list[Choice] = field(default_factory=list)
    """questions with choices"""
    general: GeneralText | None = None
    """text that nobody was tuned on"""
    golden: GoldenSet | None = None
    """frozen prompts"""
    before: GoldenResult | None = None
    """their earlier result"""


def read_work(args: argparse.Namespace) -> Work:
    """Read and check everything that the flags name, but the model and what needs its tokenizer.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: file:line of what cannot be read, or what lacks a reference.
    """
    work = Work(args, args.metrics.split(",") if args.metrics else [])
    columns = None if args.columns is None else parse_columns(args.columns)
    if work.metrics and args.answers is None:
        work.questions = read_questions(args.data, columns, args.limit)
        check_references(work.questions, work.metrics)
    if args.shots is not None:
        work.shots = _shots(args, columns)
    if args.choices is not None:
        work.choices = read_choices(args.choices)
    if args.general is not None or (args.html and args.adapter):
        work.general = general_text(args.general or None)
    if args.golden is not None:
        work.golden = read_golden(args.golden, chat=True)
    if args.against is not None:
        work.before = GoldenResult.load(args.against)
    return work


def _shots(args: argparse.Namespace, columns: dict[str, str] | None) -> list[Prompt]:
    found = read_questions(args.shots_data, columns, args.shots)
    if len(found) < args.shots:
        raise ValueError(
            f"--shots {args.shots} asks for more than the {len(found)} rows of {args.shots_data}"
        )
    return [question.answered() for question in found]


def graded_rows(args: argparse.Namespace, tok: Tokenizer) -> SFTDataset:
    """The rows of `--data` as they are graded in training."""
    return SFTDataset.from_jsonl(
        args.data,
        tok,
        template=args.template,
        max_length=args.max_length,
        columns=None if args.columns is None else parse_columns(args.columns),
        train_on=args.train_on,
        progress=lambda records: islice(records, args.limit),
    )


def with_bytes(rows: Rows, tok: Tokenizer) -> list[dict[str, Any]]:
    """The rows, each with the UTF-8 bytes of the text that its graded tokens stand for.

    The first token is graded in no row: nothing stands before it. The end of a turn is a token and
    no text: where every answer is empty there are no bytes to count by, and the rows stay as they
    are.
    """
    found = []
    for row in rows:
        graded = [label for label in row["labels"][1:] if label != IGNORED]
        text = tok.decode(graded, skip_special_tokens=True)
        found.append({**row, "graded_bytes": len(text.encode())})
    return found if any(row["graded_bytes"] for row in found) else [dict(row) for row in rows]


def bar(what: str, unit: str = "batches") -> Callable[[Sequence[T]], Iterable[T]]:
    """A progress bar over work on the terminal's error output; silent where it is short."""

    def watch(batches: Sequence[T]) -> Iterable[T]:
        from tqdm import tqdm

        return tqdm(batches, desc=what, unit=f" {unit}", delay=1, leave=False)

    return watch


def counter(what: str) -> Callable[[int, int], None]:
    """The same for work that tells how much of it is done."""
    from tqdm import tqdm

    shown: list[Any] = []

    def tell(done: int, total: int) -> None:
        if not shown:
            shown.append(tqdm(total=total, desc=what, delay=1, leave=False))
        shown[0].update(done - shown[0].n)
        if done == total:
            shown[0].close()

    return tell


def fingerprint(source: Path, adapter: str | None) -> dict[str, str | None]:
    """Hashes of what answers come from: weights, settings and tokenizer of base and adapter."""
    return {
        "model": _digest(source),
        "adapter": None if adapter is None else _digest(Path(adapter)),
    }


def _digest(folder: Path) -> str:
    patterns = ("*.json", "*.jinja", "*.model", "*.safetensors")
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    listed = "".join(f"{file.name} {sha256_file(file)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()[:16]
