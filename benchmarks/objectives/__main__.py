"""Each objective end to end on the shipped base, on two cores, in under two minutes.

    python -m benchmarks.objectives               # all
    python -m benchmarks.objectives dpo grpo      # one or several, by name
    python -m benchmarks.objectives --list        # the names
    python -m benchmarks.objectives --quick       # the test suite's size
    python -m benchmarks.objectives --write       # the results into docs/preference.md

Exit code 1 where a rise is smaller than the recipe's `at_least`. Each result is appended as its run
ends; those of `--quick` go to `--out` and never into the page.
"""

import argparse
import importlib
import pkgutil
import shutil
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import benchmarks.objectives
from benchmarks.harness import RESULTS, machine, record
from benchmarks.objectives.recipe import Ran, Recipe
from benchmarks.papers.__main__ import read_results
from benchmarks.papers.page import cell

FILE = RESULTS / "objectives.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "preference.md"
MARK = (
    "<!-- objectives: made by `python -m benchmarks.objectives --write` -->",
    "<!-- end of objectives -->",
)


def recipes() -> dict[str, Recipe]:
    """Every recipe by name."""
    found = {}
    for module in pkgutil.iter_modules(benchmarks.objectives.__path__):
        if not module.name.startswith("_"):
            loaded = importlib.import_module(f"benchmarks.objectives.{module.name}")
            if isinstance(recipe := getattr(loaded, "RECIPE", None), Recipe):
                found[recipe.name] = recipe
    return found


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.objectives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("names", nargs="*", metavar="NAME", help="objectives [all]")
    made.add_argument("--list", action="store_true", help="print the objectives and end")
    made.add_argument("--out", metavar="DIR", default="runs/objectives", help="[runs/objectives]")
    made.add_argument("--quick", action="store_true", help="the test suite's size")
    made.add_argument("--write", action="store_true", help="write docs/preference.md")
    return made


def result(ran: Ran, out: Path) -> dict[str, Any]:
    """One line of the results file; commands without the folder of this run."""
    words = [[word.replace(f"{out}/", "") for word in command] for command in ran.commands]
    base = str(shipped_base())
    commands = [" ".join("$BASE" if word == base else word for word in line) for line in words]
    return {**ran.facts(), "commands": commands, "machine": machine()}


def shipped_base() -> Path:
    """The model that recipes train: the one that ships with the package."""
    from lora_core.checkpoint import base_model_path

    return base_model_path()


def generated(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's table: an objective a line."""
    lines = ["| objective | task | figure | before | after | rise | at least | seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, row in sorted(results.items()):
        figures = " | ".join(cell(row[key]) for key in ("before", "after", "rise"))
        shown = f"{row['at_least']:g}" + ("" if row["shown"] else ", **not reached**")
        lines.append(
            f"| `{name}` | {row['says']} | {row['figure']} | {figures} | {shown} | "
            f"{row['seconds']:.0f} |"
        )
    machines = {
        f"{r['machine']['machine']}, {r['machine']['threads']} threads" for r in results.values()
    }
    return "\n".join([*lines, "", f"Measured on {'; '.join(sorted(machines))}."])


def write_page(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the table between the marks of docs/preference.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARK[0])
    after = rest.split(MARK[1])[1]
    part = f"{MARK[0]}\n{generated(results)}\n{MARK[1]}"
    PAGE.write_text(f"{before}{part}{after}", encoding="utf-8")


def run(chosen: Sequence[Recipe], out: Path, quick: bool) -> list[str]:
    """Run recipes one after the other; the names of those that failed."""
    failed = []
    file = out / "objectives.jsonl" if quick else FILE
    for recipe in chosen:
        print(f"{recipe.name}: {recipe.says}", flush=True)
        folder = out / recipe.name
        shutil.rmtree(folder, ignore_errors=True)  # a run of another day would be gone on with
        try:
            ran = recipe.run(folder, quick)
        except (ValueError, RuntimeError, OSError):
            traceback.print_exc()
            failed.append(recipe.name)
            continue
        record(file, [result(ran, folder)])
        seen = ran.measured
        print(
            f"  {seen.figure}: {seen.before} -> {seen.after}; rise {seen.rise}, stated "
            f"{ran.wanted:g}: {'shown' if ran.shown else 'NOT REACHED'}; {ran.seconds:.0f} s",
            flush=True,
        )
        if not ran.shown:
            failed.append(recipe.name)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    made = parser()
    args = made.parse_args(arguments)
    known = recipes()
    if args.list:
        for recipe in known.values():
            print(f"{recipe.name:10} {recipe.says}")
        return 0
    for name in args.names:
        if name not in known:
            made.error(f"no objective {name!r}; there are {', '.join(known)}")
    chosen = [known[name] for name in args.names] or list(known.values())
    # --write alone writes the page from what is known
    failed = [] if args.write and not args.names else run(chosen, Path(args.out), args.quick)
    if failed:
        print(f"failed: {', '.join(failed)}")
    if args.write:
        write_page(read_results(FILE))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
