"""One compiled form of a kernel, as a launcher launches it and the ahead-of-time gate compiles it.

A Triton kernel is as many machine programs as it has types, constants and launch options. What a
launcher uses by default is listed by its module's `variants()`, from the same constants the
launcher itself reads, so that the gate counts the instructions of what runs.
"""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Variant"]


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that decides its machine code."""

    name: str
    """operator/what tells it from the others, e.g. "expand4/bf16/nested" """
    kernel: Any
    """the `triton.jit` function"""
    signature: dict[str, str]
    """argument to Triton type: "*bf16", "*u8", "i32", "i64", or "constexpr" """
    constants: dict[str, Any]
    """value of each constexpr argument"""
    warps: int = 4
    """warps a program"""
    stages: int = 1
    """depth of software pipelining"""
    fp_fusion: bool = True
    """whether the compiler may contract a multiply and an add"""
    weights: float | None = None
    """4-bit weights that a thread handles in one trip of the hot loop (or in all, without one)"""
    asm: bool = False
    """whether it holds NVIDIA assembly, which no other target compiles"""
    plain: bool = False
    """whether it stands in for one with NVIDIA assembly, and so is launched by other GPUs alone"""
    exact: bool = False
    """whether the gate refuses an approximate division and a fused multiply-add in it"""
    odd: frozenset[str] = field(default_factory=frozenset)
    """integer or pointer arguments that need not be multiples of 16"""
    max_instructions: float | None = None
    """instructions a weight in the sm_90 code that it may never exceed, whatever the table says"""
