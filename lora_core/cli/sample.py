"""`lora-core sample`: answers of a model to prompts, kept where they are good, as rows to train on.

Its own answers under a reward are rejection sampling; a teacher's are distillation. The rows go to
`lora-core finetune --data` as they are. The work is lora_core/objectives/sampling.py's.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lora_core.cli.evaluate_work import fingerprint
from lora_core.cli.flags import add_opening_flags
from lora_core.data import PromptRows, parse_columns, parse_sources
from lora_core.device import dtype_policy
from lora_core.files import sha256_file
from lora_core.objectives.answers import Sampler
from lora_core.objectives.rewards import TIMEOUT, Rewards
from lora_core.objectives.sampling import Selection, gather
from lora_core.runs import check_no_heads, check_writes_text, open_model

HELP = "answers of a model (a teacher, say) to prompts, the good ones as rows to train on"
EXAMPLE = "lora-core sample --model TEACHER --prompts prompts.jsonl --out rows.jsonl --samples 4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_opening_flags(parser)
    parser.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="FILE[:WEIGHT]",
        help="JSONL rows of prompt or messages; further fields are the reward's",
    )
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="rows to train on")
    parser.add_argument("--columns", help="names of the data's fields: prompt=question")
    parser.add_argument("--samples", type=int, default=4, help="answers to each prompt [4]")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest [1]")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer [256]")
    parser.add_argument("--max-length", type=int, default=2048, help="longest prompt [2048]")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling [0]")
    parser.add_argument("--batch-size", type=int, default=64, help="answers at a time [64]")
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="SPEC",
        help="FILE.py:FUNCTION, PACKAGE.MODULE:FUNCTION or a reward adapter's folder, each "
        "optionally with :WEIGHT; repeated ones add up",
    )
    parser.add_argument(
        "--reward-timeout", type=float, default=TIMEOUT, help="seconds an answer [10]"
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        default=["all"],
        metavar="WHICH",
        help="all, best (of each prompt), or above X, by the reward [all]",
    )
    parser.add_argument(
        "--dedupe",
        type=float,
        default=0.7,
        help="drop an answer whose ROUGE-L with a kept one, to a prompt as much alike, is this or "
        "more; 0: exact duplicates alone [0.7]",
    )
    parser.add_argument(
        "--keep-cut", action="store_true", help="keep answers that were cut at max-new-tokens"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def _kept(words: list[str]) -> dict[str, Any]:
    """`--keep` as fields of Selection."""
    if words == ["all"]:
        return {}
    if words == ["best"]:
        return {"best": True}
    if len(words) == 2 and words[0] == "above":
        try:
            return {"above": float(words[1])}
        except ValueError:
            pass
    raise ValueError(f"--keep is all, best, or above X with a number X; got {' '.join(words)!r}")


def _check(args: argparse.Namespace) -> Selection:
    """What is wrong with the flags is said before a model is loaded."""
    selection = Selection(
        samples=args.samples, dedupe=args.dedupe, keep_cut=args.keep_cut, **_kept(args.keep)
    )
    for flag in ("max_new_tokens", "batch_size"):
        if getattr(args, flag) < 1:
            name = flag.replace("_", "-")
            raise ValueError(f"--{name} must be at least 1; got {getattr(args, flag)}")
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature must be 0 or more; got {args.temperature}")
    if args.temperature == 0 and args.samples > 1:
        raise ValueError("--temperature 0 gives the same answer each time: set --samples 1")
    if selection.by_reward and not args.reward:
        raise ValueError(f"--keep {' '.join(args.keep)} goes by a reward: give --reward")
    return selection


def run(args: argparse.Namespace) -> int:
    """Sample, and say what was kept."""
    selection = _check(args)
    check_no_heads(args.model, args.adapter)
    opened = open_model(args.model, args.adapter, quantize=args.quantize, device=args.device)
    check_writes_text(opened.model, opened.source)
    for note in opened.notes:
        print(f"note: {note}", file=sys.stderr)
    sources = parse_sources(args.prompts)
    prompts = PromptRows.from_jsonl(
        sources,
        opened.tok,
        max_length=args.max_length,
        columns=None if args.columns is None else parse_columns(args.columns),
        seed=args.seed,
    )
    print(f"prompts: {prompts.report}", file=sys.stderr)
    device = next(opened.model.parameters()).device
    rewards = None
    if args.reward:
        rewards = Rewards.open(args.reward, args.reward_timeout, opened.model, opened.tok, device)
        for line in rewards.notes():
            print(f"note: {line}", file=sys.stderr)
    sampler = Sampler(
        opened.model,
        opened.tok,
        args.max_new_tokens,
        args.temperature,
        args.seed,
        dtype_policy("auto", device),
        args.batch_size,
    )
    bound = fingerprint(opened.source, args.adapter) | {
        "quantize": opened.quantize,
        "prompts": {path: [sha256_file(path), weight] for path, weight in sources},
        "columns": args.columns,
        "max_length": args.max_length,
    }
    tally = gather(
        prompts, sampler, selection, Path(args.out), rewards=rewards, bound=bound, progress=_bar
    )
    if args.json:
        print(json.dumps({"out": args.out, **tally.facts()}))
        return 0
    print("\n".join(tally.lines()))
    if tally.kept:
        print(f"  train: lora-core finetune --model DIR --data {args.out} --out DIR")
    return 0


def _bar(starts: Any) -> Any:
    from tqdm import tqdm

    return tqdm(starts, unit=" chunks", desc="sampling", delay=1, leave=False)
