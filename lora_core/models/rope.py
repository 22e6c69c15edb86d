"""Rotary position embedding in Hugging Face's half-rotation layout, with the scalings in use.

Channel i of a head is paired with channel i + R/2 and the pair is turned by the angle
``position * inv_freq[i]``; R, the rotary channels, is the head dimension times
`partial_rotary_factor`, and further channels stay as they are. Frequencies, angles, cosines and
sines are float32 whatever the model's dtype, and the rotation itself is done in float32 and rounded
once. transformers rounds cosine and sine to the model's dtype first; in float32 the two are the
same numbers, in bfloat16 this one is closer to the exact rotation.

A scaling stretches the frequencies of a model to a context longer than it was trained on. Each is a
row of `ROPE_TYPES`: its formulas and the keys that these read. Two of them depend on how long the
text is (dynamic, longrope): they keep a second table and choose by the largest position of the
call, with `torch.where` on a tensor, so that nothing waits for a GPU and the choice can be compiled
and captured. The arithmetic follows transformers' in its order, so that frequencies agree to the
bit; an angle at position 100,000 multiplies a last bit by 100,000.

transformers keeps state for `dynamic`: once a long text was seen, frequencies stay those of the
longest one until a call is shorter than the original context. Here they are a function of the call
alone, so that a result does not depend on what ran before. The two agree on the first call of a
model and as long as texts grow, as they do in generation.

The frequencies are no buffer: they are a handful of numbers that follow from the configuration, so
they are never saved, never cast by ``model.to(torch.bfloat16)`` and never left empty by
construction on the meta device.

Ref: Su et al. (RoFormer), arXiv:2104.09864; Chen et al. (position interpolation), arXiv:2306.15595;
Peng et al. (YaRN, and NTK scaling), arXiv:2309.00071; Ding et al. (LongRoPE), arXiv:2402.13753.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels import rotary

RopeParameters = Mapping[str, Any]
Tables = tuple[Tensor, ...]


def rotary_channels(head_dim: int, parameters: RopeParameters) -> int:
    """R: how many of a head's channels are turned, by `partial_rotary_factor`, rounded down."""
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def inverse_frequencies(head_dim: int, parameters: RopeParameters) -> Tensor:
    """Angle per token of each channel pair: theta^(-2i/R), then the scaling of `rope_type`.

    Args:
        head_dim: D.
        parameters: `rope_type`, `rope_theta` and that type's own keys (see `check_rope`).

    Returns:
        (R/2,) float32 on the CPU, also under `torch.device("meta")`. For types that depend on the
        length: within the original context.

    Ref: RoFormer, arXiv:2104.09864, section 3.2.2.
    """
    return _tables(head_dim, parameters)[0]


def _tables(head_dim: int, parameters: RopeParameters) -> Tables:
    channels = rotary_channels(head_dim, parameters)
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device="cpu") / channels
    return ROPE_TYPES[str(parameters["rope_type"])].tables(exponent, parameters)


def _per_turn(exponent: Tensor, parameters: RopeParameters) -> Tensor:
    """theta^(2i/R): tokens per radian of each pair, (R/2,)."""
    return float(parameters["rope_theta"]) ** exponent


def _default(exponent: Tensor, parameters: RopeParameters) -> Tables:
    return (1.0 / _per_turn(exponent, parameters),)


def _linear(exponent: Tensor, parameters: RopeParameters) -> Tables:
    """Divide all frequencies by `factor`, as if positions were.

    Ref: position interpolation, arXiv:2306.15595, equation 4.
    """
    return (1.0 / _per_turn(exponent, parameters) / float(parameters["factor"]),)


def _dynamic(exponent: Tensor, parameters: RopeParameters) -> Tables:
    return 1.0 / _per_turn(exponent, parameters), exponent


def _dynamic_at(tables: Tables, parameters: RopeParameters, length: Tensor) -> Tensor:
    """Beyond the original context, a larger theta: the longer the text, the larger.

    theta' = theta · (factor · length / original - (factor - 1))^(R / (R - 2)), such that the
    longest wave is stretched as by interpolation and the shortest not at all.

    Ref: "NTK-aware" and "dynamic NTK" scaling in YaRN, arXiv:2309.00071, section 3.
    """
    plain, exponent = tables
    channels = 2 * exponent.numel()
    theta, factor = float(parameters["rope_theta"]), float(parameters["factor"])
    original = float(parameters["original_max_position_embeddings"])
    stretch = factor * length.clamp(min=original).float() / original - (factor - 1)
    grown = theta * stretch ** (channels / (channels - 2))  # theta', a scalar
    return torch.where(length > original, 1.0 / grown**exponent, plain)


def _llama3(exponent: Tensor, parameters: RopeParameters) -> Tables:
    """Stretch long wavelengths by `factor`, keep short ones, blend in between.

    Ref: Llama 3.1's published reference code, `apply_scaling`.
    """
    factor, low, high, context = (float(parameters[key]) for key in ROPE_TYPES["llama3"].needed)
    inv_freq = 1.0 / _per_turn(exponent, parameters)
    wavelength = 2 * math.pi / inv_freq  # tokens per turn, (R/2,)
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / factor, inv_freq)
    between = (wavelength <= context / low) & (wavelength >= context / high)
    return (torch.where(between, blended, scaled),)


def _yarn(exponent: Tensor, parameters: RopeParameters) -> Tables:
    """Interpolate pairs that turn seldom within the original context, keep those that turn often.

    Pairs with more than `beta_fast` turns are kept, with fewer than `beta_slow` interpolated by
    `factor`, and blended by their index in between.

    Ref: "NTK-by-parts" in YaRN, arXiv:2309.00071, section 3.
    """
    per_turn, pairs = _per_turn(exponent, parameters), exponent.numel()
    kept, interpolated = 1.0 / per_turn, 1.0 / (float(parameters["factor"]) * per_turn)
    first = _pair_with(parameters.get("beta_fast", 32.0), pairs, parameters)
    last = _pair_with(parameters.get("beta_slow", 1.0), pairs, parameters)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    index = torch.arange(pairs, dtype=torch.float32, device=exponent.device)
    share = 1 - ((index - first) / (last - first)).clamp(0, 1)  # of the kept frequency
    return (interpolated * (1 - share) + kept * share,)


def _pair_with(turns: float, pairs: int, parameters: RopeParameters) -> float:
    """Index, not whole, of the pair that turns so often within the original context."""
    context, theta = parameters["original_max_position_embeddings"], parameters["rope_theta"]
    return 2 * pairs * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))


def _yarn_attention(parameters: RopeParameters) -> float:
    """Given, or 0.1 · ln(factor) + 1, the root of the attention's temperature.

    With `mscale` and `mscale_all_dim` (DeepSeek): the quotient of the two, each with its own weight
    in the place of 0.1.

    Ref: YaRN, arXiv:2309.00071, section 3.
    """
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    grown = math.log(max(parameters["factor"], 1.0))
    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if above and below:
        return (0.1 * above * grown + 1.0) / (0.1 * below * grown + 1.0)
    return 0.1 * grown + 1.0


def _longrope(exponent: Tensor, parameters: RopeParameters) -> Tables:
    """Divide each frequency by a factor of its own, one list for short texts and one for long ones.

    Ref: LongRoPE, arXiv:2402.13753, section 3.
    """
    per_turn = _per_turn(exponent, parameters)
    factors = (
        torch.tensor(parameters[key], dtype=torch.float32, device=exponent.device)
        for key in ("short_factor", "long_factor")
    )
    return tuple(1.0 / (factor * per_turn) for factor in factors)


def _longrope_at(tables: Tables, parameters: RopeParameters, length: Tensor) -> Tensor:
    short, long = tables
    return torch.where(length > parameters["original_max_position_embeddings"], long, short)


def _longrope_attention(parameters: RopeParameters) -> float:
    """Given, or sqrt(1 + ln(factor) / ln(original context)), 1 where nothing is extended.

    Ref: Microsoft's published Phi-3 code, whose models were trained so.
    """
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    if parameters["factor"] <= 1.0:
        return 1.0
    context = parameters["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(parameters["factor"]) / math.log(context))


def _unscaled(parameters: RopeParameters) -> float:
    return 1.0


class RopeType(NamedTuple):
    """One scaling: its formulas and the keys of `rope_parameters` that they read."""

    tables: Callable[[Tensor, RopeParameters], Tables]
    """From the exponents 2i/R, (R/2,), the frequencies, and what `at_length` needs beside them."""
    needed: tuple[str, ...] = ()
    """Keys that must be there, beside `rope_theta`: positive numbers, or lists of them."""
    optional: tuple[str, ...] = ()
    """Keys that may be there: numbers, `truncate` a boolean."""
    attention: Callable[[RopeParameters], float] = _unscaled
    """What cosine and sine are multiplied by."""
    at_length: Callable[[Tables, RopeParameters, Tensor], Tensor] | None = None
    """The frequencies for a text of so many tokens, an integer tensor (); None: for all alike."""
    switches: bool = False
    """Whether they are two sets, and keys turned by one of no use beside those of the other."""


_CONTEXT = "original_max_position_embeddings"
ROPE_TYPES: dict[str, RopeType] = {
    "default": RopeType(_default),
    "linear": RopeType(_linear, ("factor",)),
    "dynamic": RopeType(_dynamic, ("factor", _CONTEXT), at_length=_dynamic_at),
    "llama3": RopeType(_llama3, ("factor", "low_freq_factor", "high_freq_factor", _CONTEXT)),
    "yarn": RopeType(
        _yarn,
        ("factor", _CONTEXT),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        _yarn_attention,
    ),
    "longrope": RopeType(
        _longrope,
        ("short_factor", "long_factor", "factor", _CONTEXT),
        ("attention_factor",),
        _longrope_attention,
        _longrope_at,
        switches=True,
    ),
}


class Rotary(nn.Module):
    """Cosines and sines of the rotation, in float32, for given positions.

    Args:
        head_dim: D.
        parameters: as `check_rope` returns them.
    """

    def __init__(self, head_dim: int, parameters: RopeParameters) -> None:
        super().__init__()
        self.kind = ROPE_TYPES[str(parameters["rope_type"])]
        self.rope = dict(parameters)
        self.tables = _tables(head_dim, parameters)
        self.attention = self.kind.attention(parameters)

    @property
    def inv_freq(self) -> Tensor:
        """(R/2,) float32: the angles per token, within the original context."""
        return self.tables[0]

    @property
    def switches_after(self) -> int | None:
        """Longest text, in tokens, with the first of two sets of frequencies; None: one set."""
        return int(self.rope[_CONTEXT]) if self.kind.switches else None

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every angle, times the attention factor of the type.

        Args:
            position_ids: (B, T) or (1, T) integers. The largest one decides, for types that depend
                on the length.

        Returns:
            Two float32 tensors (B or 1, 1, T, R), the angles repeated for both halves.
        """
        tables = self._tables_on(position_ids.device)
        inv_freq = tables[0]
        if self.kind.at_length is not None:
            inv_freq = self.kind.at_length(tables, self.rope, position_ids.max() + 1)
        angles = position_ids[:, None, :, None].float() * inv_freq  # (B, 1, T, R/2)
        angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, R)
        if self.attention == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * self.attention, angles.sin() * self.attention

    def _tables_on(self, device: torch.device) -> Tables:
        if self.inv_freq.device == device:
            return self.tables
        moved = tuple(table.to(device) for table in self.tables)
        if device.type != "meta":  # there is no way back from there
            self.tables = moved
        return moved


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + R/2) of x by the angles, in float32, rounded once.

    Args:
        x: (B, H, T, D), by any strides.
        cos: (B or 1, 1, T, R) float32, R at most D: further channels stay as they are.
        sin: likewise.

    Returns:
        (B, H, T, D) in the dtype and layout of x; kept for backward are cos and sin alone.
    """
    return rotary(x, cos, sin)
