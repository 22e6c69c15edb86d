"""A step of AdamW with 8-bit moments on a GPU: one launch over many tensors.

A program takes `BLOCKS` blocks of one tensor, whose addresses it reads from a row of a table. The
table goes to the device in one asynchronous copy a step (gradients lie somewhere else each time);
which program has which blocks depends on the sizes alone and is kept. An element costs 16 bytes of
memory traffic, four square roots and three divisions, and nothing waits for the host.

The addresses are integers to the compiler, and so are the numbers of elements: it does not know
that they are multiples of 16, as PyTorch's allocator and LoRA's shapes make them. The launcher
looks (`ALIGNED`), or loads would be of single elements.

Bit-equal to the definition: roots and quotients are rounded correctly, nothing is contracted.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.adamw8 import (
    BLOCK,
    MEAN_SCALE,
    ROOT_SCALE,
    ROOT_TOP,
    TINY,
    Factors,
    Moments8,
)
from lora_kernels.gpu.variant import Variant

__all__ = ["step", "variants"]

BLOCKS = 4  # a program
WARPS = 4
COLUMNS = 7  # of the table: six addresses and the number of elements


@triton.jit
def _at(row, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from the table."""
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _noise(x, key):
    """Numbers in [0, 1): a hash of the element's index and the step."""
    x = x.to(tl.uint32) ^ key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return (x >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)


@triton.jit
def _unit(values, SCALE: tl.constexpr, TINY: tl.constexpr):
    """The unit of each block, from its largest magnitude."""
    return tl.maximum(tl.max(tl.abs(values), 1) * SCALE, TINY)


@triton.jit(do_not_specialize=["key"])
def _kernel(
    table_ptr,  # (tensors, COLUMNS) int64
    tensor_ptr,  # (programs,) int32: the tensor of each
    first_ptr,  # (programs,) int32: its first block
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    correction,
    eps,
    rate,
    key: tl.int64,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    MEAN: tl.constexpr,  # 1 / 127²
    ROOT: tl.constexpr,  # 1 / 255⁴
    TOP: tl.constexpr,
    TINY: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program = tl.program_id(0)
    row = table_ptr + tl.load(tensor_ptr + program).to(tl.int64) * 7
    block = tl.load(first_ptr + program).to(tl.int64) + tl.arange(0, BLOCKS)
    numel = tl.load(row + 6)
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # (BLOCKS, BLOCK)
    STEP: tl.constexpr = 16 if ALIGNED else 1  # neighbours that are all inside or all outside
    inside = element // STEP < numel // STEP
    there = block * BLOCK < numel

    p_at = _at(row, 0, tl.float32, ALIGNED) + element
    mean_at = _at(row, 2, tl.int8, ALIGNED) + element
    mean_unit_at = _at(row, 3, tl.float32, False) + block
    root_at = _at(row, 4, tl.uint8, ALIGNED) + element
    root_unit_at = _at(row, 5, tl.float32, False) + block
    g = tl.load(_at(row, 1, tl.float32, ALIGNED) + element, mask=inside, other=0.0)

    code = tl.load(mean_at, mask=inside, other=0).to(tl.float32)
    unit = tl.load(mean_unit_at, mask=there, other=0.0)[:, None]
    m = beta1 * (code * tl.abs(code) * unit) + rest1 * g
    code = tl.load(root_at, mask=inside, other=0).to(tl.float32)
    unit = tl.load(root_unit_at, mask=there, other=0.0)[:, None]
    s = (code * code) * (code * code) * unit
    s = tl.sqrt_rn(beta2 * (s * s) + rest2 * (g * g))
    p = tl.load(p_at, mask=inside, other=0.0)
    p = p * decay - rate * tl.div_rn(m, s * correction + eps)
    tl.store(p_at, p, mask=inside)

    unit = _unit(m, MEAN, TINY)
    code = (tl.sqrt_rn(tl.div_rn(tl.abs(m), unit[:, None])) + 0.5).to(tl.int32)
    tl.store(mean_at, tl.where(m < 0, -code, code).to(tl.int8), mask=inside)
    tl.store(mean_unit_at, unit, mask=there)
    unit = _unit(s, ROOT, TINY)
    x = tl.sqrt_rn(tl.sqrt_rn(tl.div_rn(s, unit[:, None]))) + _noise(element, key)
    code = tl.maximum(tl.minimum(x, TOP).to(tl.int32), (s > 0).to(tl.int32))
    tl.store(root_at, code.to(tl.uint8), mask=inside)
    tl.store(root_unit_at, unit, mask=there)


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Moments8],
    factors: Factors,
    seed: int,
) -> None:
    """Update all tensors in one launch, as `adamw8_` says.

    Args:
        params: float32, contiguous, on one device.
        grads: likewise.
        moments: theirs.
        factors: of the step.
        seed: the step's number.
    """
    device = params[0].device
    rows = [
        [*(t.data_ptr() for t in (p, g, *state)), p.numel()]
        for p, g, state in zip(params, grads, moments, strict=True)
    ]
    wide = (0, 1, 2, 4, 6)  # of units a program reads a few
    aligned = all(row[i] % 16 == 0 for row in rows for i in wide)
    tensor_of, first_of = _programs(tuple(p.numel() for p in params), device)
    if not len(tensor_of):
        return
    _kernel[(len(tensor_of),)](
        _sent(rows, torch.int64, device),
        tensor_of,
        first_of,
        *factors,
        seed * 0x9E3779B9 & 0xFFFFFFFF,
        **_constants(aligned),
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def _sent(numbers: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on the device, by a copy that nothing waits for."""
    table = torch.tensor(numbers, dtype=dtype, device="cpu")
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=64)
def _programs(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The tensor and the first block of each program."""
    counts = [-(-size // (BLOCK * BLOCKS)) for size in sizes]
    tensor_of = [i for i, count in enumerate(counts) for _ in range(count)]
    first_of = itertools.chain.from_iterable(range(0, n * BLOCKS, BLOCKS) for n in counts)
    return _sent(tensor_of, torch.int32, device), _sent(list(first_of), torch.int32, device)


def _constants(aligned: bool) -> dict[str, Any]:
    return {
        "BLOCK": BLOCK,
        "BLOCKS": BLOCKS,
        "MEAN": MEAN_SCALE,
        "ROOT": ROOT_SCALE,
        "TOP": float(ROOT_TOP),
        "TINY": TINY,
        "ALIGNED": aligned,
    }


def variants() -> list[Variant]:
    """What the launcher compiles: tensors that begin where PyTorch lets them, or anywhere."""
    return [_variant(True), _variant(False)]


def _variant(aligned: bool) -> Variant:
    constants = _constants(aligned)
    pointers = {"table_ptr": "*i64", "tensor_ptr": "*i32", "first_ptr": "*i32"}
    return Variant(
        name=f"adamw8/{'aligned' if aligned else 'anywhere'}",
        kernel=_kernel,
        signature={
            **pointers,
            **dict.fromkeys(Factors._fields, "fp32"),
            "key": "i64",
            **dict.fromkeys(constants, "constexpr"),
        },
        constants=constants,
        warps=WARPS,
        fp_fusion=False,
        exact=True,
        odd=frozenset(("key",)),
    )
