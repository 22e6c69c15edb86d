"""`lora-core evaluate`: loss, perplexity and accuracy on graded tokens."""

import argparse
import json
import sys

from lora_core.cli.flags import add_opening_flags
from lora_core.data import SFTDataset, parse_columns
from lora_core.runs import check_writes_text, open_model

HELP = "loss, perplexity and accuracy on graded tokens"
EXAMPLE = "lora-core evaluate --adapter runs/mine --data held-out.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_opening_flags(parser)
    parser.add_argument("--data", metavar="FILE", required=True, help="JSONL file")
    parser.add_argument("--template", help="built-in name, file or Jinja text [the tokenizer's]")
    parser.add_argument("--columns", help="names of the data's fields: prompt=question,…")
    parser.add_argument("--train-on", choices=["assistant", "last", "all"], default="assistant")
    parser.add_argument("--max-length", type=int, default=2048, help="longest row, tokens [2048]")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at a time [8]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    from lora_core.evaluate import perplexity

    opened = open_model(args.model, args.adapter, quantize=args.quantize, device=args.device)
    check_writes_text(opened.model, opened.source)
    rows = SFTDataset.from_jsonl(
        args.data,
        opened.tok,
        template=args.template,
        max_length=args.max_length,
        columns=None if args.columns is None else parse_columns(args.columns),
        train_on=args.train_on,
    )
    for note in [*opened.notes, f"data: {rows.report}"]:
        print(f"note: {note}", file=sys.stderr)
    found = perplexity(opened.model, rows, batch_size=args.batch_size)
    facts = {
        "model": str(opened.source),
        "adapter": args.adapter,
        "data": args.data,
        "tokens": found.tokens,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "accuracy": found.accuracy,
    }
    if args.json:
        print(json.dumps(facts))
        return 0
    for key, value in facts.items():
        if value is not None:
            print(f"{key:<16} {value:.4f}" if isinstance(value, float) else f"{key:<16} {value}")
    return 0
