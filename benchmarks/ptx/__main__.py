"""Run the compiled PTX of every kernel, thread by thread, and compare. Needs no GPU.

    python -m benchmarks.ptx                        # sm_80 and sm_90, all cases
    python -m benchmarks.ptx --quick                # what `make test` runs: a few, sm_90
    python -m benchmarks.ptx --only 'matmul4/*' --targets sm_90

One line a case: right, or what is wrong, or which instruction did what it must not. The exit status
is 1 if any case failed. machine.py says what is emulated and what is not; cases.py what is run.
"""

import argparse
import fnmatch
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from benchmarks.aot import clean_environment

__all__ = ["check", "main"]

TARGETS = ("sm_80", "sm_90")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.ptx",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", default="", help=f"of {','.join(TARGETS)}; all unless told")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of case names")
    parser.add_argument("--quick", action="store_true", help="a few cases, sm_90 unless told")
    options = parser.parse_args(arguments)
    default = ["sm_90"] if options.quick else list(TARGETS)
    options.targets = options.targets.split(",") if options.targets else default
    if unknown := sorted(set(options.targets) - set(TARGETS)):
        parser.error(f"no such target: {', '.join(unknown)}; known are {', '.join(TARGETS)}")
    return options


def check(options: argparse.Namespace, edit: Callable[[str], str] = lambda ptx: ptx) -> list[str]:
    """Run the cases that were asked for; what failed, one line each."""
    import torch

    from benchmarks.ptx.cases import CASES
    from benchmarks.ptx.launch import Emulator, emulated

    cases = [c for c in CASES if fnmatch.fnmatch(c.name, options.only)]
    cases = [c for c in cases if c.quick or not options.quick]
    if not cases:
        raise SystemExit(f"no case matches {options.only!r}")
    failed = []
    for target in options.targets:
        emulator = Emulator(int(target.removeprefix("sm_")), edit)
        for case in cases:
            torch.manual_seed(0)
            begin, trouble = time.perf_counter(), ""
            try:
                with emulated(emulator):
                    case.run()
            except Exception as error:  # noqa: BLE001 - a launcher may raise anything; it is said
                trouble = f"{type(error).__name__}: {error}"
                failed.append(f"{target} {case.name}: {trouble}")
            seconds = time.perf_counter() - begin
            print(f"{target} {case.name:<36}{trouble or 'right'} ({seconds:.1f} s)", flush=True)
        print(f"{target} {sum(emulator.launched.values())} instructions of programs; kernels:")
        print(f"      {' '.join(sorted(emulator.launched))}")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as fresh:
        clean_environment(fresh)
        failed = check(options)
    print(f"{len(failed)} failures")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
