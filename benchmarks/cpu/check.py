"""Is it right on this shape? Against the definition's bits or float64, before anything is timed.

Quantizing and expanding have one right answer, bit for bit. A product is held to what rounding
allows. Write u = 2⁻⁸ for bfloat16's unit roundoff and let a contender round each weight r times.
Then y = Σ x w is off by Σ x w δ, |δ| ≤ r u, and by u |y| when it is rounded itself. The roundings
of different weights are as good as independent with mean 0, so by Hoeffding's inequality

    P(|Σ x w δ| > λ r u √Σ x²w²) ≤ 2 exp(-λ²/2),      2.5e-14 at λ = 8, for 7 million results,

while the root mean square of the error is at most u √((r² mean Σ x²w² + mean y²) / 3), as an error
of rounding is uniform up to its bound. Float32 sums add a thousandth of it. The worst case without
chance, Σ |x w| in place of √Σ x²w², is √K times as wide and would let a lost block of 64 pass.

Contenders in float32 are held to bfloat16's bound. New memory is full of NaN while results for the
check are made, or what one contender left there could pass for the work of the next.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cpu.contenders import decoded_once
from benchmarks.gpu.judge import reference, same_bits
from lora_core.quant.codebook import codebook
from lora_core.quant.double_quant import dynamic_map
from lora_kernels import Weight4, quantize4

UNIT = 2.0**-8
LAMBDA = 8.0
BY_CHANCE = 1.1  # of a root mean square
ENOUGH = 256  # results; of fewer the root mean square says little
BINS = 65536  # in which bitsandbytes looks 8-bit scales up


@dataclass(frozen=True)
class Answer:
    """A product in float64 and how far a single rounding of each weight leads away from it."""

    exact: Tensor
    """float64 (M, N) or (M, K)"""
    spread: Tensor
    """float32 of that shape, √Σ x²w²"""

    @staticmethod
    def of(task: str, x: Tensor, w: Tensor) -> "Answer":
        """`x Wᵀ` (forward) or `x W` (dx) of float32 W (N, K)."""
        across = w.t() if task == "forward" else w
        exact = x.double() @ across.double()
        spread = (x.float().square() @ across.square()).sqrt_()
        return Answer(exact, spread)

    def problems(self, found: Tensor, roundings: int) -> Iterator[str]:
        """What is wrong with a result, a line each."""
        if found.shape != self.exact.shape:
            yield f"shape {tuple(found.shape)} instead of {tuple(self.exact.shape)}"
            return
        if not bool(found.isfinite().all()):
            yield f"{int((~found.isfinite()).sum())} results are NaN or infinite"
            return
        off = (found.double() - self.exact).abs_()
        bound = UNIT * (LAMBDA * roundings * self.spread + self.exact.abs())
        worst = float((off / bound.clamp_(min=1e-30)).max())
        if worst > 1:
            yield f"an error is {worst:.3g} times what rounding allows"
        allowed = UNIT * float((self._mean_square(roundings) / 3) ** 0.5)
        rms = float(off.square_().mean().sqrt())
        if off.numel() >= ENOUGH and rms > BY_CHANCE * allowed:
            yield f"the root mean square error is {rms / allowed:.3g} times what rounding allows"

    def _mean_square(self, roundings: int) -> float:
        weights = float(self.spread.square().mean(dtype=torch.float64))
        return roundings**2 * weights + float(self.exact.square().mean())

    def error(self, found: Tensor) -> float:
        """‖found − exact‖ / ‖exact‖."""
        return float((found.double() - self.exact).norm() / self.exact.norm().clamp(min=1e-300))


def expand_problems(found: Tensor, weight: Weight4) -> Iterator[str]:
    """Bits of an expanded weight against table entry times scale, rounded once."""
    exact = decoded_once(weight).to(found.dtype)
    if found.shape != exact.shape:
        yield f"shape {tuple(found.shape)} instead of {tuple(exact.shape)}"
    elif not same_bits(found, exact):
        yield f"{int((found != exact).sum())} values differ from the definition's bits"


def definition(w: Tensor) -> tuple[Tensor, Tensor]:
    """NF4 codes and float32 scales of the plain PyTorch definition."""
    with reference():
        return quantize4(w, codebook("nf4").table(), 64)


def quantize_problems(found: Weight4, codes: Tensor, scales: Tensor, ours: bool) -> Iterator[str]:
    """Codes as the definition's, bit for bit, and 8-bit scales that are the nearest to its own."""
    if not torch.equal(found.codes.view(-1), codes):
        different = int((found.codes.view(-1) != codes).sum())
        yield f"{different} of {codes.numel()} bytes of codes differ from the definition"
    nested = found.nested
    if nested is None:
        yield "the scales are not in 8 bits"
        return
    absmax, offset, steps = nested
    if not torch.equal(steps, dynamic_map()):
        yield "the table of the scales is another"
    yield from _far_scales(scales.double(), found.scales, absmax, offset, ours)


def _far_scales(
    exact: Tensor, q: Tensor, absmax: Tensor, offset: Tensor, ours: bool
) -> Iterator[str]:
    """Is each 8-bit scale the nearest entry, but for the rounding of the mean?

    bitsandbytes looks at the middle of the bin that a scale falls into instead of the scale, so
    that what it finds may be further away than the nearest entry by the width of a bin.
    """
    slack = 1e-5 * float(exact.abs().max())
    if abs(float(offset) - float(exact.mean())) > slack:
        yield f"the offset is {float(offset)}, the mean of the scales {float(exact.mean())}"
    spread = absmax.double().repeat_interleave(256)[: len(exact)]
    steps = dynamic_map().double()
    wanted = (exact - offset.double()) / spread.clamp(min=1e-38)
    nearest = steps[torch.bucketize(wanted, (steps[:-1] + steps[1:]) / 2)]
    chosen = (steps[q.long()] - wanted).abs() * spread
    allowed = (nearest - wanted).abs() * spread + slack
    if not ours:
        allowed += spread * 2 / (BINS - 1)
    far = int((chosen > allowed).sum())
    if far:
        yield f"{far} of {len(exact)} scales are not the nearest entry"
