"""The papers' claims, run again small: each with its figures and the verdict that follows.

    python -m benchmarks.papers                       # all that have no result yet
    python -m benchmarks.papers equal_bins            # one or several, by name
    python -m benchmarks.papers --list                # the names
    python -m benchmarks.papers --quick               # toy counts: that it runs, not what is true
    python -m benchmarks.papers --write               # the results into docs/papers.md

A module of this package with a `CLAIM` is a claim. Each result is appended as its claim ends, and a
claim whose result is there under the same settings is not run again (`--again` does). What was
trained lies in `--out` and is shared by the claims. Results of `--quick` and of a model, a text or
counts of one's own go to `--out` too, never into the page.
"""

import argparse
import importlib
import json
import pkgutil
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import benchmarks.papers
from benchmarks.harness import RESULTS, machine, record
from benchmarks.papers.claim import Claim, Finding, Settings
from benchmarks.papers.page import write_page
from lora_core.checkpoint import base_model_path
from lora_core.evaluate.estimate import Estimate

FILE = RESULTS / "papers.jsonl"
QUICK = {"steps": 4, "held_out": 4}
OWN = ("model", "text", "steps", "held_out")  # flags whose results are the user's, not the page's


def claims() -> dict[str, Claim]:
    """Every claim by name, a paper's claims together."""
    found = []
    for module in pkgutil.iter_modules(benchmarks.papers.__path__):
        if not module.name.startswith("_"):
            loaded = importlib.import_module(f"benchmarks.papers.{module.name}")
            if isinstance(getattr(loaded, "CLAIM", None), Claim):
                found.append(loaded.CLAIM)
    return {claim.name: claim for claim in sorted(found, key=lambda c: (c.paper, c.name))}


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.papers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("names", nargs="*", metavar="NAME", help="claims [all]")
    made.add_argument("--list", action="store_true", help="print the claims and end")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    made.add_argument("--model", metavar="DIR", help="base model [the shipped one]")
    made.add_argument("--text", metavar="FILE", help="text for perplexity [held-out modules]")
    made.add_argument("--steps", type=int, help=f"of a training [{Settings.steps}]")
    made.add_argument("--held-out", type=int, help=f"rows to judge by [{Settings.held_out}]")
    made.add_argument("--out", metavar="DIR", default="runs/papers", help="[runs/papers]")
    made.add_argument("--quick", action="store_true", help="toy counts")
    made.add_argument("--again", action="store_true", help="run what has a result, too")
    made.add_argument("--write", action="store_true", help="write docs/papers.md")
    return made


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the flags mean."""
    counts: dict[str, Any] = QUICK if args.quick else {}
    counts = counts | {k: getattr(args, k) for k in QUICK if getattr(args, k) is not None}
    return Settings(
        model=Path(args.model) if args.model else base_model_path(),
        out=Path(args.out),
        seeds=tuple(args.seeds),
        text=Path(args.text) if args.text else None,
        quick=args.quick,
        **counts,
    )


def chosen(names: Sequence[str]) -> list[Claim]:
    """The claims of these names; of none, all.

    Raises:
        ValueError: a name that no claim has.
    """
    every = claims()
    for name in names:
        if name not in every:
            raise ValueError(f"no claim {name!r}; there are {', '.join(every)}")
    return [every[name] for name in names] if names else list(every.values())


def settings_facts(settings: Settings) -> dict[str, Any]:
    """The settings that a result follows from, as JSON holds them; the shipped model is null."""
    shipped = settings.model == base_model_path()
    return {
        "model": None if shipped else str(settings.model),
        "seeds": list(settings.seeds),
        "steps": settings.steps,
        "held_out": settings.held_out,
        "text": None if settings.text is None else str(settings.text),
        "quick": settings.quick,
    }


def plain(value: Any) -> Any:
    """A table's cell as JSON holds it."""
    return value.facts() if isinstance(value, Estimate) else value


def result(claim: Claim, finding: Finding, settings: Settings, command: str) -> dict[str, Any]:
    """One line of the results file."""
    return {
        "name": claim.name,
        "paper": claim.paper,
        "says": claim.says,
        "scale": claim.scale,
        "command": command,
        "settings": settings_facts(settings),
        "machine": machine(),
        "rows": [{key: plain(cell) for key, cell in row.items()} for row in finding.rows],
        "checks": [
            asdict(check) | {"difference": check.difference.facts(), "verdict": check.verdict}
            for check in finding.checks
        ],
        "figures": finding.figures,
        "verdict": finding.verdict,
        "reasons": finding.reasons,
        "seconds": round(finding.seconds, 1),
    }


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """The latest result of each claim, by name; none where there is no file.

    Raises:
        ValueError: a line that is no JSON.
    """
    found: dict[str, dict[str, Any]] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}:{number} is no JSON: {error}") from None
        found[row["name"]] = row
    return found


def command_of(claim: Claim, args: argparse.Namespace) -> str:
    """The command that makes a claim's result."""
    flags = [] if args.seeds == [0, 1, 2] else ["--seeds", *map(str, args.seeds)]
    for name in OWN:
        if getattr(args, name) is not None:
            flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    flags += ["--quick"] if args.quick else []
    return shlex.join(["python", "-m", "benchmarks.papers", claim.name, *flags])


def run(args: argparse.Namespace) -> int:
    """Run what is asked for, one claim after the other; what fails does not stop the others."""
    settings, failed = settings_of(args), []
    own = settings.quick or any(getattr(args, name) is not None for name in OWN)
    file = settings.out / "papers.jsonl" if own else FILE
    known = read_results(file)
    for claim in chosen(args.names):
        before = known.get(claim.name)
        if before and before["settings"] == settings_facts(settings) and not args.again:
            print(f"{claim.name}: {before['verdict']} (found earlier; --again runs it)")
            continue
        print(f"{claim.name}: {claim.says} [{claim.paper}]", flush=True)
        began = time.perf_counter()
        try:
            finding = claim.run(settings)
        except (ValueError, RuntimeError, OSError):
            traceback.print_exc()
            failed.append(claim.name)
            continue
        finding.seconds = time.perf_counter() - began
        row = result(claim, finding, settings, command_of(claim, args))
        record(file, [row])
        print(f"  {finding.verdict}, {finding.seconds:.0f} s: {finding.why}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    if args.write:
        write_page(claims(), read_results(FILE))
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    made = parser()
    args = made.parse_args(arguments)
    if args.list:
        for claim in claims().values():
            print(f"{claim.name:16} {claim.says} [{claim.paper}]")
        return 0
    if args.write and not args.names:  # the page alone, from what is known
        write_page(claims(), read_results(FILE))
        return 0
    try:
        return run(args)
    except ValueError as error:
        made.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
