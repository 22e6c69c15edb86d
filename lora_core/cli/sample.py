"""`lora-core sample`: answers of a model to prompts, kept where they are good, as rows to train on.

Its own answers under a reward are rejection sampling; a teacher's are distillation. The rows go to
`lora-core finetune --data` as they are. The work is lora_core/runs/sample.py's.
"""

import argparse
import json
import sys
from typing import Any

from lora_core.cli.flags import add_dataclass_flags, given
from lora_core.runs.sample import SampleConfig, sample

HELP = "answers of a model (a teacher, say) to prompts, the good ones as rows to train on"
EXAMPLE = "lora-core sample --model TEACHER --prompts prompts.jsonl --out rows.jsonl --samples 4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags: one for each field of SampleConfig."""
    parser.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="FILE[:WEIGHT]",
        help="JSONL rows of prompt or messages; further fields are the reward's",
    )
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="SPEC",
        help="FILE.py:FUNCTION, PACKAGE.MODULE:FUNCTION or a reward adapter's folder, each "
        "optionally with :WEIGHT; repeated ones add up",
    )
    add_dataclass_flags(parser, SampleConfig, skip=("prompts", "reward"), title="sampling")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Sample, and say what was kept."""
    flags = given(args, SampleConfig)
    if "out" not in flags:
        raise ValueError("--out FILE.jsonl is missing: the rows go there")
    config = SampleConfig(prompts=tuple(args.prompts), reward=tuple(args.reward), **flags)
    tally = sample(config, say=lambda line: print(line, file=sys.stderr), progress=_bar)
    if args.json:
        print(json.dumps({"out": config.out, **tally.facts()}))
        return 0
    print("\n".join(tally.lines()))
    if tally.kept:
        print(f"  train: lora-core finetune --model DIR --data {config.out} --out DIR")
    return 0


def _bar(starts: Any) -> Any:
    from tqdm import tqdm

    return tqdm(starts, unit=" chunks", desc="sampling", delay=1, leave=False)
