"""Registers as numbers: a register is 64 bits in a uint64, one array element a thread."""

import numpy as np

__all__ = [
    "BFLOAT16",
    "FLOAT16",
    "FROM_FLOAT",
    "TO_FLOAT",
    "bits_of",
    "from_float32",
    "mask",
    "signed",
    "to_float32",
    "unsigned",
]

U = np.uint64
Array = np.ndarray


def mask(bits: int) -> np.uint64:
    """The lowest bits set."""
    return U((1 << bits) - 1)


def bits_of(kind: str) -> int:
    """Width of a type such as u32, s64, f16, b8; f32x2 has 64."""
    if kind == "pred":
        return 1
    number, _, times = kind.lstrip("busf").partition("x")
    return int(number) * int(times or 1)


def to_float32(v: Array) -> Array:
    """The low 32 bits as a float32."""
    return (v & mask(32)).astype(np.uint32).view(np.float32)


def from_float32(f: Array) -> Array:
    """A float32's bits."""
    return np.asarray(f, np.float32).view(np.uint32).astype(U)


def signed(v: Array, bits: int) -> Array:
    """The low bits in two's complement, as int64."""
    up = U(64 - bits)
    return (v << up).view(np.int64) >> up.astype(np.int64)


def unsigned(v: Array, bits: int) -> Array:
    """An integer's low bits."""
    return np.asarray(v).astype(np.int64).view(U) & mask(bits)


def _from_bfloat16(v: Array) -> Array:
    return to_float32((v & mask(16)) << U(16))


def _to_bfloat16(f: Array) -> Array:
    """Rounded to nearest, ties to even; NaN as the hardware's canonical one."""
    b = from_float32(f)
    rounded = (b + U(0x7FFF) + (b >> U(16) & U(1))) >> U(16) & mask(16)
    return np.where(np.isnan(f), U(0x7FFF), rounded)


def _from_float16(v: Array) -> Array:
    return (v & mask(16)).astype(np.uint16).view(np.float16).astype(np.float32)


def _to_float16(f: Array) -> Array:
    rounded = np.asarray(f, np.float32).astype(np.float16).view(np.uint16).astype(U)
    return np.where(np.isnan(f), U(0x7FFF), rounded)


BFLOAT16, FLOAT16 = "bf16", "f16"
TO_FLOAT = {"f32": to_float32, BFLOAT16: _from_bfloat16, FLOAT16: _from_float16}
FROM_FLOAT = {"f32": from_float32, BFLOAT16: _to_bfloat16, FLOAT16: _to_float16}
