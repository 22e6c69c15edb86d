"""`lora-core compare`: prompting and every way of tuning, side by side on one task.

Without a model and data it compares on the base that ships with the package and on the quickstart's
task. Each variant runs in a process of its own; a second call with the same `--out` runs only what
is missing, so seeds, sweeps and methods can be added one after the other.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_core.cli.flags import add_dataclass_flags, given
from lora_core.compare import METHODS, CompareConfig, compare, leave
from lora_core.compare.report import facts
from lora_core.compare.rows import rows_of
from lora_core.compare.run import Job
from lora_core.compare.table import (
    aligned,
    cost_columns,
    failures,
    notes,
    quality_columns,
)
from lora_core.compare.variants import FIELDS, read_rate, read_sweep

HELP = "prompting and every way of tuning on one task: quality, forgetting, cost; table and report"
EXAMPLE = "lora-core compare --out ranks --methods full,lora --sweep r=4,16,64 --seeds 0,1,2"
_BY_HAND = ("methods", "metrics", "seeds", "sweep", "rates", "out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--out", metavar="DIR", default="compare", help="results, tables, report [compare]"
    )
    parser.add_argument("--methods", metavar="NAME,NAME", help=f"of {', '.join(METHODS)} [all]")
    parser.add_argument(
        "--metrics", metavar="NAME,NAME", help="measures of the answers [exact,f1,rouge]"
    )
    parser.add_argument("--seeds", metavar="N,N", help="each trained variant once a seed [0]")
    parser.add_argument(
        "--sweep",
        metavar="FIELD=V,V",
        action="append",
        default=[],
        help=f"values to try, every combination of several; fields: {', '.join(FIELDS)}",
    )
    rates = ", ".join(f"{name} {m.lr:g}" for name, m in METHODS.items() if m.trains)
    parser.add_argument(
        "--lr",
        metavar="METHOD=RATE",
        action="append",
        default=[],
        help=f"learning rate of a method [{rates}]",
    )
    parser.add_argument("--json", action="store_true", help="print compare.json instead of tables")
    add_dataclass_flags(parser, CompareConfig, skip=_BY_HAND, title="task, training and measures")


def config_of(args: argparse.Namespace) -> CompareConfig:
    """The comparison that the flags ask for.

    Raises:
        ValueError: a flag that does not parse, or settings that do not go together.
    """
    settings: dict[str, Any] = {"out": args.out, **given(args, CompareConfig)}
    for name in ("methods", "metrics"):
        if getattr(args, name) is not None:
            settings[name] = tuple(word.strip() for word in getattr(args, name).split(","))
    if args.seeds is not None:
        settings["seeds"] = _seeds(args.seeds)
    settings["sweep"] = _once([read_sweep(text) for text in args.sweep], "--sweep")
    settings["rates"] = _once([read_rate(text) for text in args.lr], "--lr")
    return CompareConfig(**settings)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"--seeds takes whole numbers, such as 0,1,2; got {text!r}") from None


def _once(pairs: Sequence[tuple[str, Any]], flag: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{flag} names {name} twice; give its values in one")
        found[name] = value
    return found


def _bar(jobs: Sequence[Job]) -> Iterable[Job]:
    """A progress bar over the variants, which names the one that runs."""
    from tqdm import tqdm

    with tqdm(total=len(jobs), unit="variant", dynamic_ncols=True) as bar:
        for job in jobs:
            bar.set_description(f"{job[0].name} (seed {job[0].seed})")
            yield job
            bar.update()


def run(args: argparse.Namespace) -> int:
    """Compare, write the files, print the tables; 1 where a variant failed."""
    config = config_of(args)
    found = compare(config, progress=_bar)
    files = leave(found)
    rows = rows_of(found.records)
    if args.json:
        print(json.dumps(facts(found, rows), ensure_ascii=False))
        return 1 if found.failed else 0
    for columns in (quality_columns(rows), cost_columns()):
        print("\n".join(aligned(columns, rows)), end="\n\n")
    for line in [*notes(rows), *failures(rows)]:
        print(line)
    print("\n" + "\n".join(str(Path(file)) for file in files))
    return 1 if found.failed else 0
