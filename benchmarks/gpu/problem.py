"""What is multiplied: 4-bit weights, inputs, and the answers in float64 that all are judged by.

Nothing here runs a kernel of this project. The codes are made by a search in plain PyTorch, the
answers by float64 products of the weight as float32 decodes it, so that an operator that is wrong
cannot be wrong in the same way twice.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.quant.codebook import codebook
from lora_core.quant.double_quant import dynamic_map
from lora_kernels.blockwise4 import Weight4

RANK = 16
ADAPTERS = 4  # in a mixed batch
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@functools.cache
def device() -> torch.device:
    """The GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_weight(
    n: int, k: int, nested: bool = True, code: str = "nf4", block_size: int = 64, seed: int = 0
) -> Weight4:
    """A normal matrix of spread 0.02 in 4 bits, with a block of zeros and an outlier in it."""
    w = 0.02 * normal(n, k, seed=seed)
    w.view(-1)[:block_size] = 0
    w[-1, -1] = 1.0
    table = codebook(code).table(device())
    codes, scales = search_codes(w, table, block_size)
    if not nested:
        return Weight4(codes, scales, table, n, k, block_size)
    steps = dynamic_map(device())
    q, absmax, offset = search_scales(scales, steps)
    return Weight4(codes, q, table, n, k, block_size, absmax, offset, steps)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values that depend on shape and seed alone."""
    generator = torch.Generator(device()).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device()).to(dtype)


def search_codes(w: Tensor, table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Nearest entries of an ascending table, packed, and the largest magnitude of each block."""
    flat = w.float().reshape(-1)
    short = -flat.numel() % block_size
    blocks = torch.nn.functional.pad(flat, (0, short)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    nearest = torch.bucketize(
        blocks * (1 / absmax.clamp(min=1e-38))[:, None], (table[:-1] + table[1:]) / 2
    )
    pairs = nearest.to(torch.uint8).view(-1, 2)
    return (pairs[:, 0] << 4 | pairs[:, 1])[: (flat.numel() + 1) // 2].contiguous(), absmax


def search_scales(scales: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales in 8 bits: indices, the largest magnitude of each group of 256, and the mean."""
    offset = scales.mean()
    padded = torch.nn.functional.pad(scales - offset, (0, -scales.numel() % 256)).view(-1, 256)
    absmax = padded.abs().amax(1)
    padded = padded.double() / absmax.clamp(min=1e-38).double()[:, None]
    middle = (steps[:-1].double() + steps[1:].double()) / 2
    q = torch.bucketize(padded.view(-1)[: scales.numel()], middle)
    return q.to(torch.uint8), absmax, offset


def decoded(weight: Weight4) -> Tensor:
    """W (N, K) in float32: table entry times scale, each of its roundings by itself."""
    index = torch.stack((weight.codes >> 4, weight.codes & 15), 1).view(-1)
    scales = weight.scales
    if weight.nested is not None:
        absmax, offset, steps = weight.nested
        scales = steps[scales.int()] * absmax.repeat_interleave(256)[: scales.numel()]
        scales = scales + offset
    n, k = weight.out_features, weight.in_features
    values = weight.table[index[: n * k].int()]
    return (values * scales.repeat_interleave(weight.block_size)[: n * k]).view(n, k)


@dataclass(frozen=True)
class Lora:
    """LoRA's matrices for one adapter or for several among which the rows choose."""

    a: Tensor
    """float32 (L, r, K)"""
    b: Tensor
    """float32 (L, N, r)"""
    scaling: Tensor
    """float32 (L,)"""
    rows: Tensor | None
    """int32 (M,): which adapter each row takes, -1 for none; None: all take the only one"""

    def double(self, x: Tensor) -> Tensor:
        """The update of each row in float64, differentiable."""
        out = x.new_zeros(len(x), self.b.shape[1])
        for i in range(len(self.a)):
            part = self.scaling[i].double() * (x @ self.a[i].double().t()) @ self.b[i].double().t()
            if self.rows is not None:
                part = part * (self.rows == i)[:, None]
            out = out + part
        return out


def random_lora(n: int, k: int, m: int, mixed: bool, rank: int = RANK, seed: int = 0) -> Lora:
    """Adapters whose update is about as large as the product itself."""
    count = ADAPTERS if mixed else 1
    rows = torch.arange(m, device=device(), dtype=torch.int32) * 7 % (count + 1) - 1
    return Lora(
        normal(count, rank, k, seed=seed + 1) / k**0.5,
        normal(count, n, rank, seed=seed + 2) * 0.02,
        torch.linspace(0.5, 2, count, device=device()),
        rows if mixed else None,
    )


def rms_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest ‖found − truth‖ / ‖truth‖ of several results; NaN if anything is."""
    errors = []
    for ours, exact in zip(found, truth, strict=True):
        difference = (ours.double() - exact).square_().sum()
        errors.append((difference / exact.square().sum().clamp(min=1e-300)).sqrt())
    return float(torch.stack(errors).max())  # max keeps a NaN


def copied(weight: Weight4) -> Weight4:
    """The same weight elsewhere in memory; the tables of a few bytes are shared."""
    own = ("codes", "scales", "scale_absmax", "arranged")
    return weight._replace(
        **{name: t.clone() for name in own if (t := getattr(weight, name)) is not None}
    )
