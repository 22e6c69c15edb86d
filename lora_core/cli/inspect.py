"""`lora-core inspect`: what a model would be trained on, or what an adapter has learnt.

With `--data`, samples token by token, before anything is trained; with `--objective` those of its
rows, the sides of a pair one after the other (inspect_sides.py). With `--adapter`, the spectrum of
each layer's update and its size beside the weight, afterwards.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lora_core.checkpoint.adapter_files import CONFIG as ADAPTER_FILE
from lora_core.checkpoint.safetensors_folder import read_json_object
from lora_core.checkpoint.spectrum import read_spectrum
from lora_core.cli.inspect_sides import print_sample, rows_of, show_sides, token_table
from lora_core.data import (
    Rows,
    SFTDataset,
    Tokenizer,
    find_duplicates,
    find_overlap,
    load_tokenizer,
    parse_columns,
    parse_sources,
    split,
)
from lora_core.objectives import OBJECTIVES
from lora_core.report import plot_spectrum

NAME = "inspect"
HELP = "samples token by token with their labels and grades; an adapter's update by layer"
EXAMPLE = """lora-core inspect --model DIR --data chats.jsonl --limit 1 --summary
  lora-core inspect --adapter DIR --plot spectrum.png"""

_QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("--model", metavar="DIR", help="folder of the tokenizer; with --adapter of the base")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", nargs="+", metavar="FILE[:weight]", help="JSONL files")
    what.add_argument("--adapter", metavar="DIR", help="folder of a LoRA adapter to look at")
    add("--plot", metavar="FILE.png", help="with --adapter: draw spectra and sizes")
    add("--eval-data", metavar="FILE", help="JSONL file to look for overlap with [split off]")
    add("--template", help="built-in name, file or Jinja text [the tokenizer's]")
    add("--add-tokens", metavar="T,T", help="tokens to add to the tokenizer first")
    add("--columns", help="names of the data's fields: prompt=question,…")
    add(
        "--objective",
        choices=list(OBJECTIVES),
        default="sft",
        help="whose rows: pairs for dpo and its relatives, rated completions for kto [sft]",
    )
    add("--train-on", choices=["assistant", "last", "all"], default="assistant")
    add("--control-text", choices=["drop", "keep"], default="drop", help="see docs/data.md [drop]")
    add("--max-length", type=int, default=2048, help="longest row, tokens [2048]")
    add("--eval-fraction", type=float, default=0.05, help="share split off for evaluation [0.05]")
    add("--seed", type=int, default=0, help="of the split and the mixing [0]")
    add("--limit", type=int, help="samples to print [3; 0 with --summary]")
    add("--summary", action="store_true", help="lengths, graded share, duplicates, overlap")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print samples of a data set's rows, or an adapter's update."""
    if args.adapter is not None:
        return look_at_adapter(args)
    if args.plot is not None:
        print("lora-core inspect: --plot needs --adapter", file=sys.stderr)
        return 2
    if args.model is None:
        print("lora-core inspect: --data needs --model", file=sys.stderr)
        return 2
    limit = args.limit if args.limit is not None else (0 if args.summary else 3)
    if limit < 0:
        raise ValueError(f"--limit must be 0 or more; got {limit}")
    tok = load_tokenizer(args.model)
    if args.add_tokens:
        tok.add_tokens(args.add_tokens.split(","))
    kind = rows_of(args.objective)
    return look_at_rows(tok, args, limit) if kind is None else show_sides(kind, tok, args, limit)


def look_at_rows(tok: Tokenizer, args: argparse.Namespace, limit: int) -> int:
    """Print samples of supervised rows, the summary, or both."""
    rows = _read(parse_sources(args.data), tok, args)
    shown = rows[: min(limit, len(rows))]
    if args.json:
        found: dict[str, Any] = {"report": rows.report.as_dict()}
        found["samples"] = [
            {"where": where, "tokens": token_table(tok, row)}
            for where, row in zip(shown.where, shown, strict=True)
        ]
        if args.summary:
            found["summary"] = summarize(rows, _evaluation(rows, tok, args))
        print(json.dumps(found, ensure_ascii=False))
        return 0
    for where, row in zip(shown.where, shown, strict=True):
        print_sample(where, token_table(tok, row), colour=sys.stdout.isatty())
    print(rows.report)
    if args.summary:
        print_summary(summarize(rows, _evaluation(rows, tok, args)))
    return 0


def look_at_adapter(args: argparse.Namespace) -> int:
    """Print the spectra of an adapter's update, and draw them if asked to."""
    base, note = args.model, None
    if base is None:
        base, note = _named_base(Path(args.adapter))
    report = read_spectrum(args.adapter, base)
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    missing = plot_spectrum(report, Path(args.plot)) if args.plot is not None else None
    print(json.dumps(report.as_dict(), ensure_ascii=False) if args.json else report)
    if args.plot is not None:
        print(missing or f"wrote {args.plot}", file=sys.stderr)
    return 0 if missing is None else 1


def _named_base(adapter: Path) -> tuple[Path | None, str | None]:
    """The base's folder that an adapter names, if it is here; else why sizes are not relative."""
    file = adapter / ADAPTER_FILE
    if not file.is_file():
        return None, None  # what reads the folder says what is wrong with it
    named = read_json_object(file).get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        return None, "the adapter names no base: give --model for |ΔW| / |W|"
    if not any(Path(named).glob("*.safetensors")):
        return None, f"the base {named!r} is no model folder here: give --model for |ΔW| / |W|"
    return Path(named), None


def summarize(rows: SFTDataset, evaluation: tuple[Rows, Rows]) -> dict[str, Any]:
    """Lengths, graded share, truncation, duplicates and train/evaluation overlap.

    Args:
        rows: the whole data set.
        evaluation: what is trained on and what is evaluated on.
    """
    lengths = sorted(rows.lengths)
    graded = rows.graded_counts
    train, held_out = evaluation
    overlap = find_overlap(train, held_out)
    duplicates = find_duplicates(rows)
    total = rows.report.total
    return {
        "rows": len(rows),
        "tokens": sum(lengths),
        "lengths": {f"{q:.0%}": lengths[round(q * (len(lengths) - 1))] for q in _QUANTILES},
        "graded_tokens": sum(graded),
        "graded_share": sum(graded) / sum(lengths),
        "graded_per_row": {"least": min(graded), "most": max(graded)},
        "truncated_rows": total.truncated,
        "graded_tokens_cut": total.graded_cut,
        "longest_before_cutting": total.longest,
        "duplicate_groups": len(duplicates),
        "duplicate_rows": sum(len(group) - 1 for group in duplicates),
        "train_rows": len(train),
        "eval_rows": len(held_out),
        "eval_rows_in_train": len(overlap["rows"]),
        "eval_prompts_in_train": len(overlap["prompts"]),
        "overlap_at": [held_out.where[i] for i in overlap["prompts"][:3]],
    }


def print_summary(summary: dict[str, Any]) -> None:
    """The summary, a line a fact."""
    print()
    for name, value in summary.items():
        print(f"{name.replace('_', ' '):<23} {_fact(value)}")


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return f"{value:.1%}" if isinstance(value, float) else str(value)


def _read(paths: list[tuple[str, float]], tok: Tokenizer, args: argparse.Namespace) -> SFTDataset:
    return SFTDataset.from_jsonl(
        paths,
        tok,
        template=args.template,
        max_length=args.max_length,
        columns=parse_columns(args.columns) if args.columns else None,
        train_on=args.train_on,
        seed=args.seed,
        control_text=args.control_text,
    )


def _evaluation(rows: Rows, tok: Tokenizer, args: argparse.Namespace) -> tuple[Rows, Rows]:
    """The rows trained on and those evaluated on, as `finetune` would make them."""
    if args.eval_data is not None:
        return rows, _read([(args.eval_data, 1.0)], tok, args)
    repeated = sum(len(group) - 1 for group in find_duplicates(rows))
    if len(rows) - repeated < 2:  # all rows are the same: nothing could be set aside
        return rows, rows.select([])
    return split(rows, args.eval_fraction, args.seed)
