"""What is run, and what it is compared with.

Quantize and expand have to be bit-equal to the definition. A product is held to the suite's bound:
its largest error against float64 is at most twice that of PyTorch's product of the same numbers in
the same type, plus two roundings of the largest value; and so is the norm of its errors, to which
errors count that are small beside the largest value, such as a wrong byte of a weight. Shapes are
toys that still take every path: partial tiles, an odd number of rows of W, more than one step along
K, blocks of several sizes, tensors at odd addresses.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import blockwise4 as definition
from lora_kernels import blockwise4_reference as reference
from lora_kernels.blockwise4 import Weight4
from lora_kernels.gpu import (
    arrange4,
    blockwise4,
    lora4,
    matmul4,
    matmul4_dx,
    outer4,
    planes4,
    quantize4,
)
from lora_kernels.gpu.finish4 import Update, finish

__all__ = ["CASES", "Case"]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NEGATIVE = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004)
POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
NF4 = torch.tensor([*NEGATIVE, 0.0, *POSITIVE])


class Case(NamedTuple):
    """One line of the report."""

    name: str
    quick: bool
    """whether --quick runs it"""
    run: Callable[[], None]
    """raises AssertionError if the result is wrong, Fault if the program misbehaves"""


def weight(n: int, k: int, block: int = 64, nested: bool = True, shift: int = 0) -> Weight4:
    """Codes and scales at random; with a shift, at addresses that are no multiples of 16."""
    blocks = -(-n * k // block)
    codes = torch.randint(0, 256, ((n * k + 1) // 2 + shift,), dtype=torch.uint8)[shift:]
    if not nested:
        return Weight4(codes, torch.rand(blocks) * 0.05, NF4, n, k, block)
    scales = torch.randint(0, 256, (blocks + shift,), dtype=torch.uint8)[shift:]
    largest = torch.rand(-(-blocks // 256)) * 0.02 + 0.01
    map_ = torch.linspace(-1, 1, 256)
    return Weight4(codes, scales, NF4, n, k, block, largest, torch.tensor(0.03), map_)


def expanded(w: Weight4, dtype: torch.dtype) -> Tensor:
    """W by the definition."""
    out = torch.zeros(w.out_features, w.in_features, dtype=dtype)
    reference.expand_slice(w, 0, w.out_features, 0, w.in_features, out)
    return out


def same(ours: Tensor, theirs: Tensor) -> None:
    """Bit for bit."""
    a, b = (t.contiguous().view(-1).view(torch.uint8) for t in (ours, theirs))
    assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} bytes differ"


def close(ours: Tensor, theirs: Tensor, truth: Tensor, keeps: float = 0.0) -> None:
    """As accurate as PyTorch; `keeps` is the precision of operands that are split or rounded."""
    kind = theirs.dtype
    assert (ours.dtype, ours.shape) == (kind, truth.shape)
    ours, theirs = ours.double() - truth, theirs.double() - truth
    eps = max(torch.finfo(kind).eps, keeps)
    bound = 2 * theirs.abs().max() + 2 * eps * truth.abs().max()
    assert ours.abs().max() <= bound, f"error {ours.abs().max():.2e}, {bound:.2e} at most"
    bound = 2 * theirs.norm() + max(torch.finfo(FP32).eps, keeps) * truth.norm()
    assert ours.norm() <= bound, f"error's norm {ours.norm():.2e}, {bound:.2e} at most"


def low_rank(x: Tensor, update: Update | None, n: int) -> tuple[Tensor, Tensor]:
    """h = x A^T and s h B^T in the type of x, row by row with the row's adapter."""
    if update is None:
        return x.new_zeros(len(x), 0), x.new_zeros(len(x), n)
    own = torch.zeros(len(x), dtype=torch.long) if update.rows is None else update.rows.long()
    has, own = (own >= 0).to(x.dtype)[:, None], own.clamp(min=0)
    h = torch.einsum("mk,mrk->mr", x, update.down.to(x.dtype)[own]) * has
    y = torch.einsum("mr,mnr->mn", h, update.up.to(x.dtype)[own])
    return h, y * update.scaling.to(x.dtype)[own][:, None]


def adapters(m: int, n: int, k: int, rank: int, count: int, mixed: bool) -> Update | None:
    """LoRA at random, as large as the product; mixed: each row names one or none."""
    if not rank:
        return None
    rows = torch.arange(m, dtype=torch.int32) % (count + 1) - 1 if mixed else None
    down, up = torch.randn(count, rank, k) / k**0.5, torch.randn(count, n, rank) / 8
    return Update(down, up, torch.rand(count) + 0.5, rows)


def product(  # noqa: PLR0913 - a case names what it varies
    module: Any,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype = BF16,
    *,
    block: int = 64,
    nested: bool = True,
    bias: bool = False,
    rank: int = 0,
    count: int = 1,
    mixed: bool = False,
    shift: int = 0,
    arranged: bool = False,
    **tile: int,
) -> None:
    """x W^T + b and LoRA's update, by planes or by halves."""
    w = weight(n, k, block, nested, shift)
    w = w._replace(arranged=arrange4.arrange(w)) if arranged else w
    x = torch.randn(m, k + shift).to(dtype)[:, :k]
    b = torch.randn(n).to(dtype) if bias else None
    update = adapters(m, n, k, rank, count, mixed)
    cut = dataclasses.replace(module.default_tile(m, n, k, dtype), **{"splits": 1} | tile)
    y, h = module.multiply(x, w, b, update, cut)
    halves = module is matmul4  # rounds W and A, as a dense product does
    true = expanded(w, dtype if halves else FP32).double()
    inner = update
    if update is not None and halves:
        inner = update._replace(down=update.down.to(dtype).float())
    h64, added = low_rank(x.double(), inner, n)
    offset = 0 if b is None else b.double()
    dense = torch.nn.functional.linear(x, expanded(w, dtype), b) + low_rank(x, update, n)[1]
    close(y, dense, x.double() @ true.T + added + offset)
    if update is not None:
        single = low_rank(x.float(), inner, n)[0]
        close(h, single, h64)


def finished(m: int, n: int, rank: int, count: int, mixed: bool) -> None:
    """Partial sums, bias and update in float32, where no rounding hides that lanes disagree."""
    update = adapters(m, n, 64, rank, count, mixed)
    assert update is not None
    partials, bias = torch.randn(3, m, n + count * rank), torch.randn(n)
    y, h = finish(partials, n, bias, update, FP32)
    own = torch.zeros(m, dtype=torch.long) if update.rows is None else update.rows.long()
    chosen = own[:, None] == torch.arange(count)  # (M, L)
    both = []
    for kind in (FP32, torch.float64):
        total = partials.to(kind).sum(0)
        inner = total[:, n:].reshape(m, count, rank) * chosen[:, :, None]
        up = update.up.to(kind) * update.scaling.to(kind)[:, None, None]
        added = torch.einsum("mlr,lnr->mn", inner, up)
        both.append((total[:, :n] + bias.to(kind) + added, inner.sum(1)))
    (dense, single), (truth, true_h) = both
    close(y, dense, truth)
    close(h, single, true_h)


def gradient(
    m: int, n: int, k: int, dtype: torch.dtype = BF16, *, nested: bool = True, **tile: int
) -> None:
    """dy W by halves."""
    w, dy = weight(n, k, 64, nested), torch.randn(m, n).to(dtype)
    cut = dataclasses.replace(matmul4_dx.default_dx_tile(m, n, k, dtype), **{"splits": 1} | tile)
    dx = matmul4_dx.multiply_dx(dy, w, cut)
    dense = expanded(w, dtype)
    close(dx, dy @ dense, dy.double() @ dense.double())


def lora(m: int, d: int, r: int, count: int, dtype: torch.dtype, mixed: bool) -> None:
    """shrink, add and outer: operands keep 16 bits of mantissa."""
    update, keeps = adapters(m, d, d, r, count, mixed), 2.0**-16
    assert update is not None
    x, y = torch.randn(m, d).to(dtype), torch.randn(m, d).to(dtype)
    h = lora4.shrink(x, update.down, update.rows)
    true_h, added = low_rank(x.double(), update, d)
    single, _ = low_rank(x.float(), update, d)
    close(h, single, true_h, keeps)
    z = lora4.add(y, h, update.up, update.rows, update.scaling)
    dense = y + low_rank(x.float(), update, d)[1].to(dtype)
    close(z, dense, y.double() + added, keeps)
    transposed = update._replace(down=update.up.transpose(1, 2))
    back = lora4.shrink(y, transposed.down, update.rows)
    single, truth = (low_rank(t, transposed, d)[0] for t in (y.float(), y.double()))
    close(back, single, truth, keeps)
    outer(h, x, update, keeps)


def outer(h: Tensor, x: Tensor, update: Update, keeps: float) -> None:
    """The gradients of A and B: sums over the rows of each adapter, plain and transposed."""
    count = len(update.scaling)
    own = torch.zeros(len(x), dtype=torch.long) if update.rows is None else update.rows.long()
    chosen = (own[:, None] == torch.arange(count)).double()  # (M, L)
    truth = torch.einsum("ml,mr,md->lrd", chosen, h.double(), x.double())
    single = torch.einsum("ml,mr,md->lrd", chosen.float(), h, x.float())
    close(outer4.outer(h, x, update.rows, count), single, truth, keeps)
    s = update.scaling[:, None, None]
    got = outer4.outer(h, x, update.rows, count, update.scaling, transposed=True)
    turned = (t.transpose(1, 2) for t in (single * s, truth * s))
    close(got, *turned, keeps)


def quantize(numel: int, block: int, dtype: torch.dtype, shift: int = 0) -> None:
    """Codes and scales, and the flag."""
    x, flag = torch.randn(numel + shift).to(dtype)[shift:], torch.zeros(1, dtype=torch.int32)
    middle, order = definition._ranks(NF4)
    codes, scales = quantize4.quantize(x, middle, order, block, definition.TINY, flag)
    true_codes, true_scales = reference.quantize(x, NF4, block, None)
    same(codes, true_codes)
    same(scales, true_scales)
    assert not flag.item(), "finite numbers were called infinite"


def expand(
    n: int, k: int, dtype: torch.dtype, *, block: int = 64, nested: bool = True, shift: int = 0
) -> None:
    """The whole, and a slice of rows and columns."""
    w = weight(n, k, block, nested, shift)
    whole = expanded(w, dtype)
    out = torch.empty(n * k, dtype=dtype)
    blockwise4.expand(w.codes, w.scales, w.nested, w.table, block, out)
    same(out, whole)
    part = blockwise4.expand4_slice(w, 1, n - 1, block, k, dtype)
    same(part, whole[1 : n - 1, block:])


def _case(
    name: str, run: Callable[..., None], *args: Any, quick: bool = False, **more: Any
) -> Case:
    return Case(name, quick, partial(run, *args, **more))


def _products() -> list[Case]:
    few, many, c = planes4, matmul4, _case
    one = {"bias": True, "rank": 5}
    mixed = {"rank": 5, "count": 3, "mixed": True, "splits": 2}
    return [
        c("planes4/1 row/bias", product, few, 1, 40, 1024, bias=True, quick=True),
        c("planes4/3 rows/mixed LoRA, split", product, few, 3, 33, 832, **mixed, quick=True),
        c("planes4/1 row/LoRA", product, few, 1, 36, 1088, **one),
        c("planes4/9 rows/fp16", product, few, 9, 33, 512, FP16, rows=8, nested=False),
        c("planes4/3 rows/odd addresses", product, few, 3, 21, 832, shift=3, splits=2),
        c("planes4/2 rows/arranged, LoRA", product, few, 2, 32, 512, arranged=True, **one),
        c("planes4/2 rows/block 32", product, few, 2, 20, 416, block=32),
        c("planes4/5 rows/one feature", product, few, 5, 1, 64, bias=True),
        c("matmul4/16 rows/LoRA", product, many, 16, 70, 512, **one, quick=True),
        c("matmul4/16 rows/fp16, bias", product, many, 16, 70, 576, FP16, nested=False, bias=True),
        c("matmul4/20 rows/mixed LoRA, split", product, many, 20, 33, 832, **mixed),
        c("matmul4/3 rows/odd addresses", product, many, 3, 70, 576, shift=3, **one),
        c("matmul4/40 rows", product, many, 40, 64, 512, bias=True),
        c("matmul4/5 rows/block 32", product, many, 5, 50, 160, block=32),
        c("matmul4/5 rows/block 512", product, many, 5, 50, 1024, block=512, splits=2),
        c("matmul4_dx/3 rows", gradient, 3, 70, 512, quick=True),
        c("matmul4_dx/20 rows/fp16, split", gradient, 20, 200, 512, FP16, nested=False, splits=3),
        c("matmul4_dx/60 rows", gradient, 60, 104, 576),
    ]


CASES = [
    *_products(),
    _case("finish4/8 rows/LoRA, fp32", finished, 8, 70, 16, 1, False, quick=True),
    _case("finish4/1 row/LoRA, fp32", finished, 1, 70, 5, 1, False),
    _case("finish4/11 rows/mixed, fp32", finished, 11, 70, 20, 3, True),
    _case("lora4/5 rows/mixed", lora, 5, 70, 5, 2, BF16, True, quick=True),
    _case("lora4/17 rows", lora, 17, 130, 8, 1, FP16, False),
    _case("lora4/33 rows/mixed, rank 20", lora, 33, 96, 20, 2, BF16, True),
    _case("quantize/bf16", quantize, 1000, 64, BF16, quick=True),
    _case("quantize/fp32", quantize, 4096, 64, FP32),
    _case("quantize/fp16/odd address", quantize, 777, 128, FP16, shift=1),
    _case("expand/bf16", expand, 4, 192, BF16, quick=True),
    _case("expand/fp16/float32 scales", expand, 6, 256, FP16, nested=False),
    _case("expand/fp32/block 32", expand, 5, 96, FP32, block=32),
    _case("expand/bf16/odd address", expand, 4, 512, BF16, block=256, shift=1),
]
