r"""How far a policy is from its reference: estimates from sampled tokens, and controllers of β.

For a token drawn from the policy, with x = log π − log ref,

    k1 = x                   unbiased, may be below 0, of great variance
    k2 = x² / 2              biased, of small variance; its gradient is that of the KL
    k3 = e⁻ˣ − 1 + x         unbiased, never below 0

k3 near 0 is a difference of almost equal numbers: in float32 at x = 1e-4 the plain form is off by
parts in a thousand and may be below 0, and policies under training are there. Its series is exact
to rounding, and so is that of its gradient. Where e⁻ˣ overflows k3 is infinite, and stays so.

A controller moves β so that the measured KL comes to a target, or leaves it. Its state is a float
or two, so that a checkpoint can hold it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_core.losses.reduction import check_not_negative, check_positive

KLKind = Literal["k1", "k2", "k3"]

_NEAR = 0.25  # the series is used below
_TERMS = 14  # 0.25¹⁴ / 16! is below float64's rounding of the first term


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: KLKind = "k3") -> Tensor:
    r"""Each token's estimate of KL(policy ‖ reference), in nats.

    Args:
        log_probs: log-probabilities of sampled tokens under the policy, any shape; 16 bits are
            widened to float32, float64 stays.
        ref_log_probs: under the reference, of the same shape.
        kind: "k1", "k2" or "k3"; see the module.

    Returns:
        Of their shape, differentiable.

    Raises:
        ValueError: an unknown kind, or shapes that differ.

    Ref:
        Schulman 2020, "Approximating KL Divergence"; k3 in Shao et al. 2024, arXiv:2402.03300, eq.
        4.
    """
    if log_probs.shape != ref_log_probs.shape:
        raise ValueError(
            f"ref_log_probs must have the shape of log_probs, {tuple(log_probs.shape)}; "
            f"got {tuple(ref_log_probs.shape)}"
        )
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    x = log_probs.to(dtype) - ref_log_probs.to(dtype)
    if kind == "k1":
        return x
    if kind == "k2":
        return x * x / 2
    if kind == "k3":
        return _exp_beyond_line(-x)
    raise ValueError(f'kl must be "k1", "k2" or "k3"; got {kind!r}')


def _exp_beyond_line(d: Tensor) -> Tensor:
    """e^d − 1 − d, 0 or more: d²/2 · (1 + d/3 · (1 + d/4 · (…))) near 0."""
    near = d.abs() < _NEAR
    small = torch.where(near, d, 0.0)  # the branch that is not taken gets no gradient of inf · 0
    series = torch.ones_like(small)
    for n in range(_TERMS, 2, -1):
        series = 1 + small / n * series
    return torch.where(near, small * small / 2 * series, torch.expm1(d) - d)


@dataclass
class FixedKL:
    """A weight of the KL penalty that stays as it is."""

    coef: float
    """β, 0 or more"""

    def __post_init__(self) -> None:
        check_not_negative("kl_coef", self.coef)

    def update(self, kl: float, samples: int) -> None:
        """Nothing moves it."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.coef = float(state["coef"])


@dataclass
class AdaptiveKL(FixedKL):
    r"""A weight that grows while the KL is above its target, and shrinks below.

    β ← β (1 + clip(KL / target − 1, ±0.2) · samples / horizon).

    Ref:
        Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    target: float = 6.0
    """nats a completion"""
    horizon: float = 10_000.0
    """samples over which an error at its bound moves β by 20 %"""

    def __post_init__(self) -> None:
        check_positive("kl_coef", self.coef)  # 0 would stay 0
        check_positive("kl_target", self.target)
        check_positive("kl_horizon", self.horizon)

    def update(self, kl: float, samples: int) -> None:
        """Take a measured KL into account.

        Args:
            kl: the mean over completions of the sum over tokens, in nats.
            samples: completions it was measured on.
        """
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef = max(self.coef * (1 + error * samples / self.horizon), 0.0)
