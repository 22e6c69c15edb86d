"""From logits to the next token: penalties, filters and the draw, each a function of a batch.

Every function maps logits (B, V) to logits (B, V), with -inf where a token is out of the question,
and none reads a number back to the host, so that all of them can stand in a captured step. Order
and meaning are transformers' (tests/oracles/test_sampling.py holds them against its processors):

    repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw

with two differences, on purpose: padding counts as no token for the penalty, and the largest logit
is taken off before the temperature divides, so that no quotient overflows.

The draw turns one uniform number u into a token: the first whose cumulative probability exceeds u.
The numbers come from Philox 4x32-10, a counter-based generator, with the row's seed as the key, and
row and step as the counter. So what a row draws is a function of its seed, its place and its own
text, whatever else is in the batch and wherever it ends; CPU and GPU draw the same numbers; and all
of them are there before the first step. A generator object, as in transformers, has one state that
all rows share; Gumbel noise would give the same independence for V numbers a step in place of one.

Ref: Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, section 3.3 (Philox).
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real

import torch
from torch import Tensor

from lora_kernels.dropout import philox

_LOW = 0xFFFFFFFF
_BITS = 23  # of a uniform number: u * total stays below total in float32, whatever total is


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """logits are divided by it; 0 takes the likeliest token, and the filters do not matter"""
    top_k: int | None = None
    """only the so many likeliest tokens; None: all"""
    top_p: float = 1.0
    """only the likeliest tokens that together reach this probability, in (0, 1]"""
    min_p: float = 0.0
    """only tokens at least this share as probable as the likeliest, in [0, 1]"""
    repetition_penalty: float = 1.0
    """above 1: tokens that are in the text already become less likely; 1: off"""

    def __post_init__(self) -> None:
        """Refuse what is no number (TypeError) or out of range (ValueError), by name."""
        for field in fields(self):
            value, whole = getattr(self, field.name), field.name == "top_k"
            fits = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
            if not fits and not (whole and value is None):
                raise TypeError(f"{field.name} must be a {'whole ' * whole}number; got {value!r}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be finite and not negative; got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]; got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1]; got {self.min_p}")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise ValueError(
                "repetition_penalty must be finite and above 0 (1 is off); "
                f"got {self.repetition_penalty}"
            )

    @property
    def penalises(self) -> bool:
        """Whether it matters which tokens are in the text."""
        return self.repetition_penalty != 1

    def filtered(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The logits whose softmax is drawn from.

        Args:
            logits: (B, V) float32.
            seen: (B, V) bool, tokens in the text; None without a penalty.

        Returns:
            (B, V), -inf where a token is left out.
        """
        if seen is not None:
            logits = penalise(logits, seen, self.repetition_penalty)
        if self.temperature == 0:
            return logits
        logits = temper(logits, self.temperature)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p > 0:
            logits = keep_min_p(logits, self.min_p)
        return logits

    def choose(self, logits: Tensor, seen: Tensor | None, uniform: Tensor) -> Tensor:
        """One token a row.

        Args:
            logits: (B, V) float32.
            seen: as of `filtered`.
            uniform: (B,) float32 in [0, 1).

        Returns:
            (B,) int64.
        """
        logits = self.filtered(logits, seen)
        return logits.argmax(dim=-1) if self.temperature == 0 else draw(logits, uniform)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by the penalty, and multiply negative ones by it.

    Args:
        logits: (B, V).
        seen: (B, V) bool.
        penalty: above 0; 1.2 is the paper's.

    Returns:
        (B, V).

    Ref: Keskar et al., arXiv:1909.05858, section 4.1; there logits are taken to be positive.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def temper(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature, from the largest logit down: (x - max x) / temperature."""
    # no smaller divisor: the quotients may not overflow upwards
    return (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of a row, and whatever equals the last of them.

    Ref: Fan et al., arXiv:1805.04833.
    """
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < least, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the shortest head of the tokens, sorted by probability, that reaches p.

    Ref: Holtzman et al., arXiv:1904.09751, section 3.1.
    """
    probability, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    before = probability.cumsum(dim=-1) - probability  # probability of all likelier tokens
    out = torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before >= p)
    return logits.masked_fill(out, -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens that are at least p times as probable as the likeliest.

    Ref: Nguyen et al., arXiv:2407.01082, section 3.
    """
    probability = logits.softmax(dim=-1)
    return logits.masked_fill(probability < p * probability.amax(dim=-1, keepdim=True), -math.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative probability passes a uniform number.

    Args:
        logits: (B, V).
        uniform: (B,) in [0, 1), multiples of 2^-23 as `uniforms` makes them.

    Returns:
        (B,) int64; never a token of probability 0.
    """
    probability = logits.softmax(dim=-1)
    total = probability.cumsum(dim=-1)  # (B, V)
    found = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)  # (B, 1)
    # a parallel sum may fall by a rounding from one token to the next, before one that is left out
    found = found.clamp(max=logits.shape[-1] - 1)
    likeliest = probability.argmax(dim=-1, keepdim=True)
    return torch.where(probability.gather(-1, found) > 0, found, likeliest)[:, 0]


def uniforms(seed: int | Sequence[int], rows: int, steps: int) -> Tensor:
    """Uniform numbers for every row and step.

    Args:
        seed: one for the batch, whose rows then draw by their places; or one a row, which draws
            what it would draw alone, as the only row of its batch.
        rows: B.
        steps: N.

    Returns:
        (B, N) float32 in [0, 1), multiples of 2^-23, on the CPU.

    Raises:
        TypeError: a seed that is no whole number.
        ValueError: seeds of another number than rows.
    """
    try:  # NumPy's and torch's whole numbers too
        seed = [*map(operator.index, seed)] if isinstance(seed, Sequence) else operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be a whole number, or one a row; got {seed!r}") from None
    if isinstance(seed, int):
        keys, places = torch.tensor([seed & _LOW, seed >> 32 & _LOW])[:, None], torch.arange(rows)
    else:
        if len(seed) != rows:
            raise ValueError(
                f"seed must be one number, or one for each of {rows} rows; got {len(seed)}"
            )
        pairs = [[s & _LOW, s >> 32 & _LOW] for s in seed]
        keys, places = torch.tensor(pairs).view(rows, 2).T, torch.zeros(rows, dtype=torch.int64)
    step, zero = torch.arange(steps)[None], torch.zeros(1, 1, dtype=torch.int64)
    words = philox((step, places[:, None], zero, zero), (keys[0][:, None], keys[1][:, None]))
    return (words[0] >> (32 - _BITS)).float() * 2.0**-_BITS
