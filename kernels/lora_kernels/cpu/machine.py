"""Which instruction sets this CPU has, and what a compiler is told to use each.

The operators are written once, on vectors of 32-bit lanes (`lanes.h`), and compiled for one
instruction set at a time. So the choice is made here, before a compiler runs, from the list of
features that the kernel of the operating system prints: it leaves out what it would not save
between two processes, which the CPU's own answer (CPUID) does not. `-march=native` is not used: a
cache in a home folder that several machines share would hold code that some of them cannot run,
and no other instruction set could be forced for a test.

    avx512     16 lanes   AVX-512 F, BW, VL, DQ    servers since 2017, AMD since 2022
    avx2        8 lanes   AVX2, FMA, F16C          x86 since 2013
    neon        4 lanes   part of 64-bit ARM       all of them
    portable    4 lanes   C alone                  anything else with little-endian 64 bits

`LORA_KERNELS_ISA` forces one, for tests and comparisons.
"""

import functools
import platform
import sys
from pathlib import Path

__all__ = ["FLAGS", "available", "choose", "features", "why_not"]

# best first; the flags name features one by one, so that they are those that were looked for
FLAGS = {
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *("-mavx2", "-mfma", "-mf16c"),
    ),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "neon": (),  # what compilers assume of 64-bit ARM
    "portable": ("-DLORA_PORTABLE",),  # or else 64-bit ARM would be NEON again
}
_CPUINFO = Path("/proc/cpuinfo")
_ARM64 = ("aarch64", "arm64")  # as Linux and macOS call it


def why_not() -> str | None:
    """Why no C operator runs on this machine, whatever the compiler; None if they do.

    Returns:
        One line.
    """
    if sys.platform == "win32":
        return "the C operators need a POSIX system; this is Windows"
    if sys.byteorder != "little" or sys.maxsize < 2**32:
        return f"the C operators need a little-endian 64-bit CPU; this is {platform.machine()}"
    return None


@functools.cache
def features() -> tuple[str, ...]:
    """The CPU's features in Linux' words, sorted; empty where the system lists none.

    Returns:
        Such as ("avx2", "fma", …) on x86, ("asimd", "fp", …) on ARM.
    """
    try:
        lines = _CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return ()
    for line in lines:  # the first processor speaks for all
        title, _, words = line.partition(":")
        if title.strip() in ("flags", "Features"):
            return tuple(sorted(words.split()))
    return ()


@functools.cache
def available() -> tuple[str, ...]:
    """The instruction sets that this CPU has, best first; never empty.

    Returns:
        Keys of `FLAGS`.
    """
    return tuple(filter(_has, FLAGS))


def _has(isa: str) -> bool:
    if isa == "neon":
        return platform.machine() in _ARM64
    if isa == "portable":
        return True
    # compilers call a feature what Linux calls it
    return {flag.removeprefix("-m") for flag in FLAGS[isa]} <= set(features())


def choose(wanted: str | None) -> str:
    """The instruction set to compile for.

    Args:
        wanted: the value of `LORA_KERNELS_ISA`; None or "" takes the best.

    Returns:
        A member of `available()`.

    Raises:
        ValueError: `wanted` is no instruction set, or one that this CPU lacks.
    """
    if not wanted:
        return available()[0]
    has = ", ".join(available())
    if wanted not in FLAGS:
        raise ValueError(
            f"LORA_KERNELS_ISA is {wanted!r}; set it to one that this CPU has ({has}), or leave "
            "it out"
        )
    if wanted not in available():
        raise ValueError(
            f"LORA_KERNELS_ISA is {wanted}, which this CPU lacks; it has {has}: set one of them, "
            "or leave it out"
        )
    return wanted
