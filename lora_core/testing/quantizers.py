r"""`check_quantizer`: the properties of any blockwise quantizer with a table of levels.

With a the largest magnitude of a block and c the level chosen for w, the result is w' = c a', a'
being a or, after double quantization, its stored approximation. The promise is that c is the level
nearest to w / a, so that

    |w' - w| <= min_j |c_j a - w| + max|c| |a' - a| + 10 u a + u' (|w'| + tiny)

elementwise. The first term is at most half the table's largest gap times a. The third covers
float32 arithmetic, u = 2**-24: the quotient w (1/a) is off by 2u, a threshold by u, and either may
pick the neighbour of an exact tie, which costs twice that; the product c a is rounded once more.
The fourth is the rounding to a 16-bit dtype. Where the scales are stored in 8 bits, `(a - mean) /
max|a - mean|` per group by the nearest entry of a map whose widest gap is g,

    |a' - a| <= (g / 2) max|a - mean| + 8 u max(a)

bitsandbytes' tests compare the mean error of Gaussian weights with a recorded figure; a bound on
each element needs no figure and sees one wrong level, one wrong block or one swapped pair.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lora_core.quant.codebook import codebook
from lora_core.testing.bounds import ACCUMULATE, exceeds
from lora_core.testing.runner import load_hypothesis, run_property
from lora_core.testing.strategies import FLOATS, Weight, weights

SCALE_GROUP = 256  # scales that share one second-level scale
SCALE_GAP = 0.9 / 64  # widest gap of the signed dynamic 8-bit map: its last decade in 64 steps


class Quantized(Protocol):
    """What a quantizer returns."""

    def dequantize(self) -> Tensor:
        """The weight again, in its shape and dtype."""
        ...


class Quantize(Protocol):
    """The function under test."""

    def __call__(self, w: Tensor, *, block_size: int, double_quant: bool) -> Quantized:
        """Quantize `w` in flat row-major blocks of `block_size` elements."""
        ...


@dataclass(frozen=True)
class QuantizerCase:
    """One call of the quantizer."""

    weight: Weight
    block_size: int
    double_quant: bool


def check_quantizer(
    quantize: Quantize,
    *,
    code: str | Tensor = "nf4",
    block_sizes: Sequence[int] = (32, 64, 128, 4096),
    dtypes: Sequence[torch.dtype] = FLOATS,
    scale_gap: float = SCALE_GAP,
    device: torch.device | str = "cpu",
    examples: int = 50,
) -> None:
    """Check a blockwise quantizer; see the module's docstring for the bounds.

    On empty, odd and partial blocks, outliers, zeros and ties, in each dtype, with and without
    double quantization: every element is the nearest level within the bound; shape and dtype come
    back; a zero block comes back as zeros; the input is not written to; a non-contiguous weight
    gives the same as its contiguous copy; a NaN or infinity is refused or stays visible. Without
    double quantization also, exactly: quantizing the result again changes nothing (for tables that
    hold -1 and 1), and 2**k w gives 2**k times the result (float32 and bfloat16).

    Args:
        quantize: called as `quantize(w, block_size=..., double_quant=...)`; returns an object with
            `.dequantize()`. One without double quantization may ignore the option.
        code: the levels, ascending on [-1, 1], or the name of one of the library's tables.
        block_sizes: block sizes to draw from.
        dtypes: dtypes of w to draw from.
        scale_gap: widest gap of the map that double quantization stores the scales with.
        device: where w is.
        examples: number of cases.

    Raises:
        AssertionError: a property fails; shows the smallest failing case.
        ValueError: `code` is not a table.

    Ref: Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3.
    """
    levels = _levels(code).to(device)

    def check(case: QuantizerCase) -> None:
        w = case.weight.tensor().to(device)
        before = w.clone()

        def through(w: Tensor, double_quant: bool = case.double_quant) -> Tensor:
            quantized = quantize(w, block_size=case.block_size, double_quant=double_quant)
            return quantized.dequantize()

        result = through(w)
        _check_form(w, before, result)
        _check_levels(w, result, levels, case, scale_gap)
        _check_layout(w, result, through)
        _check_non_finite(w, through)
        if not case.double_quant:
            _check_idempotent(result, levels, through)
            _check_powers_of_two(w, result, through)

    st = load_hypothesis("hypothesis.strategies")
    cases = st.builds(
        QuantizerCase,
        weights(largest=257, among=dtypes),
        st.sampled_from(list(block_sizes)),
        st.booleans(),
    )
    run_property(check, cases, examples)


def _levels(code: str | Tensor) -> Tensor:
    """The table as float64, each level once, checked."""
    if isinstance(code, str):
        code = codebook(code).table().sort().values
    levels = code.detach().double().cpu()
    if levels.dim() != 1 or levels.numel() < 2 or not bool((levels.diff() >= 0).all()):
        raise ValueError(
            f"code must be a name or a one-dimensional ascending table, got {levels.tolist()}"
        )
    return torch.unique(levels)


def _check_form(w: Tensor, before: Tensor, result: Tensor) -> None:
    assert torch.equal(w, before), "quantize wrote into its input"
    assert result.shape == w.shape, (
        f"dequantize gave shape {tuple(result.shape)} for a weight of {tuple(w.shape)}"
    )
    assert result.dtype == w.dtype, f"dequantize gave {result.dtype} for a weight of {w.dtype}"


def _blocks(w: Tensor, size: int) -> Tensor:
    """The flat weight in rows of one block, the last padded with zeros, float64."""
    flat = w.detach().double().flatten()
    count = -(-flat.numel() // size)
    padded = flat.new_zeros(count * size)
    padded[: flat.numel()] = flat
    return padded.view(count, size)


def _scale_error(absmax: Tensor, gap: float) -> Tensor:
    """Largest error of the scales after double quantization, one per block."""
    spread = (absmax - absmax.mean()).abs()
    groups = _blocks(spread, SCALE_GROUP)  # (groups, 256)
    worst = groups.amax(1).repeat_interleave(SCALE_GROUP)[: absmax.numel()]
    return gap / 2 * worst + 8 * ACCUMULATE * absmax.max()


def _check_levels(
    w: Tensor, result: Tensor, levels: Tensor, case: QuantizerCase, scale_gap: float
) -> None:
    """Every element is the nearest level times its block's scale, to the bound."""
    if w.numel() == 0:
        return
    size, count = case.block_size, w.numel()
    blocks = _blocks(w, size)
    absmax = blocks.abs().amax(1)  # (blocks,)
    distance = torch.full_like(blocks, torch.inf)
    nearest = torch.zeros_like(blocks)
    for level in levels:  # one level at a time keeps memory at a few copies of w
        value = level * absmax[:, None]
        closer = (value - blocks).abs() < distance
        nearest = torch.where(closer, value, nearest)
        distance = torch.where(closer, (value - blocks).abs(), distance)
    slack = 10 * ACCUMULATE * absmax
    if case.double_quant:
        slack = slack + levels.abs().max() * _scale_error(absmax, scale_gap)
    bound = (distance + slack[:, None]).flatten()[:count]
    info = torch.finfo(w.dtype)
    got = result.detach().double().flatten()
    if w.dtype != torch.float32:
        bound = bound + info.eps / 2 * (got.abs() + info.tiny)
    fault = exceeds(got, w.double().flatten(), bound)
    assert fault is None, (
        f"the dequantized weight {fault}; the nearest level is the most it may differ by"
    )
    if not case.double_quant or bool((levels == 0).any()):
        zero = (absmax == 0).repeat_interleave(size)[:count]
        assert not bool(got[zero].any()), "a block of zeros does not come back as zeros"


def _check_layout(w: Tensor, result: Tensor, through: Callable[[Tensor], Tensor]) -> None:
    """Strided input gives what its contiguous copy gives."""
    strided = torch.stack((w, w + 1), dim=-1)[..., 0]
    assert torch.equal(through(strided), result), (
        "a non-contiguous weight gives another result than its contiguous copy"
    )


def _check_non_finite(w: Tensor, through: Callable[[Tensor], Tensor]) -> None:
    """NaN and infinity raise ValueError or show in the result."""
    if w.numel() == 0:
        return
    for bad in (torch.nan, torch.inf):
        spoiled = w.clone()
        spoiled.view(-1)[-1] = bad
        try:
            shown = through(spoiled).flatten()[-1]
        except ValueError:
            continue
        assert not bool(shown.isfinite()), f"{bad} in the weight became {shown.item()} in silence"


def _check_idempotent(result: Tensor, levels: Tensor, through: Callable[[Tensor], Tensor]) -> None:
    """A quantized weight is its own quantization, if the table holds -1 and 1."""
    room = bool(levels.diff().min() > 8 * torch.finfo(result.dtype).eps)
    if room and {-1.0, 1.0} <= set(levels.tolist()):
        assert torch.equal(through(result), result), (
            "quantizing the dequantized weight again changes it"
        )


def _check_powers_of_two(w: Tensor, result: Tensor, through: Callable[[Tensor], Tensor]) -> None:
    """Scaling by a power of two commutes, exactly."""
    if w.dtype == torch.float16:  # its subnormals begin at 6e-5, within reach
        return
    for factor in (0.25, 8.0):
        assert torch.equal(through(factor * w), factor * result), (
            f"the result for {factor} w is not {factor} times that for w"
        )
