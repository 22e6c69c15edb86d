"""The 16-entry code tables: what each 4-bit code stands for in a block scaled to [-1, 1].

`nf4` (NormalFloat) spreads its 16 values over the quantiles of a normal distribution, so that codes
of normal weights are used about evenly. It takes 8 quantiles above zero and 7 below from
probability `0.9677083` inward to one half, adds an exact zero, and divides by the largest, so the
table is asymmetric and has both ends and zero exactly. The constants below are the published
float32 table, which every NF4 checkpoint means; `nf4_values` derives them bit for bit.

The rivals of the QLoRA paper's comparisons (its section 4 and figure 3):

* `fp4` is bitsandbytes' E2M1: sign, two bits of exponent, one of mantissa. Codes are bit patterns
  (the sign is bit 3), so the table is not ascending, and code 8 is a second zero that is never
  written. Its magnitudes over 12 are 0, 0.0625, 2, 3, 4, 6, 8, 12: those of the usual E2M1, except
  that its subnormal is 0.0625 instead of 1. That entry is wrong in nothing but usefulness.
* `fp4_e3m0` is sign and three bits of exponent: 0 and ±2^-6 … ±2^0, with bit patterns as codes.
* `int4` has equal steps of 1/7, code minus 8 being the integer: symmetric quantization to -7 … 7.
  The entry -8/7 is outside a block's range and is never written.

Anything else: 16 ascending numbers in a tensor.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, equation 4 and appendix E.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Codebook", "bin_masses", "codebook", "nf4_values"]

NF4_OFFSET = 0.9677083

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_E2M1 = tuple(m / 12 for m in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
_E3M0 = (0.0, *(2.0**e for e in range(-6, 1)))


@dataclass(frozen=True)
class Codebook:
    """A name and the 16 values that its codes stand for."""

    name: str
    """"nf4", "fp4", "fp4_e3m0", "int4", or "custom" for a table of the user's"""
    values: tuple[float, ...]
    """value of code 0 … 15; rounded to float32 where it is used"""

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """The values as float32 (16,)."""
        # made on the CPU by name: a default device, "meta" above all, must not catch it
        return torch.tensor(self.values, dtype=torch.float32, device="cpu").to(device)


CODEBOOKS = {
    book.name: book
    for book in (
        Codebook("nf4", NF4),
        Codebook("fp4", (*_E2M1, *(-m for m in _E2M1))),
        Codebook("fp4_e3m0", (*_E3M0, *(-m for m in _E3M0))),
        Codebook("int4", tuple(i / 7 for i in range(-8, 8))),
    )
}


def codebook(code: "str | Tensor | Codebook") -> Codebook:
    """The code table that an option means.

    Args:
        code: "nf4", "fp4", "fp4_e3m0" or "int4"; or a float tensor (16,), finite and ascending; or
            a codebook, returned as it is.

    Returns:
        The codebook.

    Raises:
        TypeError: something else.
        ValueError: an unknown name, or a tensor that is not 16 finite ascending numbers.
    """
    if isinstance(code, Codebook):
        return code
    if isinstance(code, str):
        if code not in CODEBOOKS:
            raise ValueError(f"code must be one of {', '.join(CODEBOOKS)}; got {code!r}")
        return CODEBOOKS[code]
    if not isinstance(code, Tensor):
        raise TypeError(f"code must be a name or a tensor (16,); got {type(code).__name__}")
    if code.shape != (16,) or not code.is_floating_point():
        raise ValueError(
            f"a code table must be a float tensor (16,); got {code.dtype} {tuple(code.shape)}"
        )
    values = code.detach().float().cpu()
    if not bool(values.isfinite().all()) or not bool((values[1:] > values[:-1]).all()):
        raise ValueError(
            f"a code table must be finite and strictly ascending in float32; got {values.tolist()}"
        )
    return Codebook("custom", tuple(values.tolist()))


def nf4_values(offset: float = NF4_OFFSET) -> Tensor:
    """Derive the NF4 table from quantiles of the standard normal distribution Q.

    Positive: `Q(p)` for 8 evenly spaced p from `offset` down to, but without, 1/2; negative:
    `-Q(p)` for 7; zero; all divided by the largest. The steps are rounded where the original
    rounds, so that `offset = 0.9677083` gives the published constants exactly.

    Args:
        offset: probability of the outermost quantile, between 1/2 and 1.

    Returns:
        float32 (16,), ascending from -1 to 1.

    Raises:
        ValueError: an offset outside (1/2, 1).

    Ref: QLoRA, arXiv:2305.14314, equation 4; the offset is bitsandbytes'.
    """
    if not 0.5 < offset < 1:
        raise ValueError(f"offset must lie between 0.5 and 1, both excluded; got {offset}")

    def quantiles(count: int) -> Tensor:
        levels = torch.linspace(offset, 0.5, count + 1, dtype=torch.float32)[:-1]  # (count,)
        return torch.special.ndtri(levels.double()).float()

    values = torch.cat((-quantiles(7), torch.zeros(1), quantiles(8))).sort().values
    return values / values[-1]


def bin_masses(code: str | Tensor | Codebook = "nf4", block_size: int = 64) -> Tensor:
    """How often each code is used when blocks of independent normal numbers are quantized.

    One element of a block is its largest magnitude m and becomes exactly -1 or 1; the others are
    normal within (-m, m). So, with Phi the normal distribution and F(m) = 2 Phi(m) - 1,

        P(code) = (B-1)/B * E_m[ (Phi(b m) - Phi(a m)) / F(m) ]  +  1/(2B) for each end in (a, b],

    where (a, b] is the code's bin and m has the density of the largest of B: B F(m)^(B-1) F'(m).

    Args:
        code: as `codebook` takes it.
        block_size: B, elements that share a scale.

    Returns:
        float64 (16,), in the order of the codes, summing to 1; exact to about 1e-6.
    """
    values, order = codebook(code).table().double().sort(stable=True)
    first = values.diff(prepend=values.new_tensor([-torch.inf])) != 0  # a second zero is not used
    values, order = values[first], order[first]
    middle = (values[:-1] + values[1:]) / 2
    infinity = torch.tensor([torch.inf], dtype=torch.float64)
    low, high = (torch.cat(t).clamp(-1, 1) for t in ((-infinity, middle), (middle, infinity)))
    # quantiles of m, evenly spaced: F(m)^B is uniform on (0, 1)
    level = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    inside = level ** (1 / block_size)  # F(m)
    m = torch.special.ndtri((1 + inside) / 2)[:, None]  # (4096, 1)
    share = (torch.special.ndtr(high * m) - torch.special.ndtr(low * m)) / inside[:, None]
    mass = share.mean(0) * (block_size - 1) / block_size
    for end in (-1.0, 1.0):
        mass[torch.bucketize(end, middle)] += 0.5 / block_size
    return mass.new_zeros(16).scatter_(0, order, mass)
