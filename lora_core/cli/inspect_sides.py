"""Rows of preferences as `lora-core inspect` shows them: each side after its prompt, by token.

A pair is two samples that begin alike: what is graded of either is what the loss sums or averages.
A rated row is its own completion and, where the baseline is measured, another prompt's.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lora_core.data import (
    IGNORED,
    PairRows,
    RatedRows,
    Tokenizer,
    parse_columns,
    parse_sources,
)
from lora_core.data.branches import Branched
from lora_core.objectives import OBJECTIVES

Kind = type[PairRows] | type[RatedRows]
SIDES: dict[Kind, tuple[str, str]] = {
    PairRows: ("chosen", "rejected"),
    RatedRows: ("completion", "another prompt's completion"),
}


def rows_of(objective: str) -> Kind | None:
    """Which rows with sides an objective reads; None: supervised ones."""
    kind = getattr(OBJECTIVES[objective], "kind", None)
    return kind if kind in SIDES else None


def show_sides(kind: Kind, tok: Tokenizer, args: argparse.Namespace, limit: int) -> int:
    """Print samples of rows with sides, and the report."""
    if args.summary or args.eval_data is not None:
        what = "--summary" if args.summary else "--eval-data"
        print(f"lora-core inspect: {what} is of supervised rows", file=sys.stderr)
        return 2
    rows = kind.from_jsonl(
        parse_sources(args.data),
        tok,
        template=args.template,
        max_length=args.max_length,
        columns=parse_columns(args.columns) if args.columns else None,
        train_on=args.train_on,
        seed=args.seed,
        control_text=args.control_text,
    )
    samples = [
        (f"{row.where} {name}", token_table(tok, sample))
        for row in rows[: min(limit, len(rows))]
        for name, sample in zip(SIDES[kind], _samples(row), strict=True)
    ]
    if args.json:
        shown = [{"where": where, "tokens": tokens} for where, tokens in samples]
        print(json.dumps({"report": rows.report.as_dict(), "samples": shown}, ensure_ascii=False))
        return 0
    for where, tokens in samples:
        print_sample(where, tokens, colour=sys.stdout.isatty())
    print(rows.report)
    return 0


def _samples(row: Branched) -> Iterator[dict[str, Any]]:
    """Each completion after the prompt, as a supervised row."""
    for number, completion in enumerate(row.completions):
        flags = row.flags(number)
        graded = [t if keep else IGNORED for t, keep in zip(completion, flags, strict=True)]
        yield {
            "input_ids": [*row.prompt, *completion],
            "labels": [*[IGNORED] * len(row.prompt), *graded],
        }


def token_table(tok: Tokenizer, row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row as one {"token", "id", "label", "graded"} per token."""
    return [
        {"token": _shown(tok, index), "id": index, "label": label, "graded": label != IGNORED}
        for index, label in zip(row["input_ids"], row["labels"], strict=True)
    ]


def print_sample(where: str, tokens: Sequence[dict[str, Any]], colour: bool) -> None:
    """A table of tokens; graded ones have a mark, and a colour on a terminal."""
    graded = sum(token["graded"] for token in tokens)
    print(f"{where}: {len(tokens)} tokens, {graded} graded")
    width = min(40, max(len(token["token"]) for token in tokens))
    print(f"  {'token':<{width}}  {'id':>7}  {'label':>7}  grade")
    for token in tokens:
        line = f"  {token['token']:<{width}}  {token['id']:>7}  {token['label']:>7}"
        if token["graded"]:
            line = f"\033[32m{line}  graded\033[0m" if colour else f"{line}  graded"
        print(line)
    print()


def _shown(tok: Tokenizer, index: int) -> str:
    """A token in quotes; bare and as the vocabulary stores it if it is a part of a character."""
    text = tok.decode([index])
    if "\ufffd" in text or not text:
        return tok.token(index) or f"<{index}>"
    return repr(text)
