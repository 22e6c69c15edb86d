"""`lora-core evaluate`: what a model, its answers or two files of answers are worth.

evaluate_flags   the flags and which of them go together
evaluate_work    what there is to do, read and checked before a model is loaded
evaluate_model   a model judged, with its adapter and without
evaluate_pairs   answers written before: scored, judged in pairs, voted on
evaluate_show    the findings as text and JSON; evaluate_html: as a page
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from lora_core.cli.evaluate_flags import add_arguments, check_values, misuse
from lora_core.files import atomic_write, folder_lock

__all__ = ["EXAMPLE", "HELP", "add_arguments", "run"]

HELP = "loss, perplexity and accuracy; answers and their metrics; a golden set; what was forgotten"
EXAMPLE = """lora-core evaluate --adapter runs/mine --data held-out.jsonl
  lora-core evaluate --adapter runs/mine --data held-out.jsonl --metrics exact,rouge,distinct \\
      --compare-base --general --html report.html
  lora-core evaluate --adapter runs/mine --golden golden.jsonl --against before.jsonl"""


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    if (fault := misuse(args)) is not None:
        print(f"lora-core evaluate: {fault}", file=sys.stderr)
        return 2
    check_values(args)
    if args.blind is not None or args.answers is not None:
        from lora_core.cli.evaluate_pairs import run_on_answers

        return run_on_answers(args)
    from lora_core.cli.evaluate_work import read_work

    work = read_work(args)
    with _place(args.out):
        from lora_core.cli.evaluate_model import Evaluation
        from lora_core.cli.evaluate_show import as_json, as_text

        evaluation = Evaluation(work)
        for note in evaluation.findings.notes:
            print(f"note: {note}", file=sys.stderr)
        shown = len(evaluation.findings.notes)
        found = evaluation.run()
        for note in found.notes[shown:]:
            print(f"note: {note}", file=sys.stderr)
        facts = json.dumps(as_json(found), ensure_ascii=False)
        if args.out is not None:
            atomic_write(Path(args.out) / "metrics.json", facts + "\n")
        print(facts if args.json else as_text(found))
        if args.html is not None:
            from lora_core.cli.evaluate_html import write_page

            write_page(args.html, found, evaluation.opened.model)
    return int(found.failed)


@contextlib.contextmanager
def _place(out: str | None) -> Iterator[None]:
    """Hold the folder of the results, and say where they are if the run is broken off."""
    if out is None:
        yield
        return
    with folder_lock(out):
        try:
            yield
        except KeyboardInterrupt:
            print(
                f"\nwhat was answered is kept in {out}; the same command goes on", file=sys.stderr
            )
            raise
