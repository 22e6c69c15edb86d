r"""Policy gradients with a clipped ratio: GRPO and its kin, and PPO.

For a sampled token with advantage A, ρ = π(token) / π_old(token),

    −min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A)

Where the sampling policy is the current one ρ is 1, so the *value* says nothing (with advantages
that sum to 0 it is about 0) while the gradient, −A ∇log π, is the plain policy gradient.

How the tokens' losses become one number is aggregation.py's.

A clipped token has no gradient, and none of ρ's overflow either: the choice is made on log ρ, since
inf · 0 in backward is NaN. What overflows and is *not* clipped (A < 0 and a token e^88 times as
likely as when it was sampled) is no policy to go on from: refused on the CPU, infinite elsewhere,
never clamped.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from lora_core.losses.advantages import check_mask
from lora_core.losses.aggregation import Aggregation, aggregate
from lora_core.losses.kl import KLKind, kl_estimate
from lora_core.losses.reduction import aligned, check_not_negative, check_positive

Ratio = Literal["token", "sequence"]


def log_ratios(
    log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, ratio: Ratio = "token"
) -> Tensor:
    r"""log ρ of each token, 0 where masked.

    Args:
        log_probs: of the sampled tokens under the policy, (N, L).
        old_log_probs: under the policy that sampled them, (N, L).
        mask: bool (N, L).
        ratio: "token", or "sequence": each of a row's tokens has the mean over the row, the log of
            the ratio of whole sequences to the power of 1 / length.

    Returns:
        (N, L), float32 or float64.

    Raises:
        ValueError: shapes that differ, or an unknown ratio.
        TypeError: not floating, or a mask that is not bool.

    Ref:
        Zheng et al. 2025, arXiv:2507.18071, eq. 7, for sequences.
    """
    log_probs, old = aligned(2, log_probs=log_probs, old_log_probs=old_log_probs)
    check_mask(mask, log_probs)
    # zeros before the difference: what stands in the padding may be NaN
    delta = torch.where(mask, log_probs, 0.0) - torch.where(mask, old.detach(), 0.0)
    if ratio == "token":
        return delta
    if ratio != "sequence":
        raise ValueError(f'ratio must be "token" or "sequence"; got {ratio!r}')
    length = mask.sum(1, keepdim=True).clamp(min=1)  # (N, 1)
    return torch.where(mask, delta.sum(1, keepdim=True) / length, 0.0)


def clipped(
    log_ratio: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float | None = None
) -> Tensor:
    """Which tokens are clipped, bool (N, L): past the bound on the side their advantage pulls to.

    Args:
        log_ratio: log ρ, (N, L).
        advantages: (N, 1) or (N, L).
        clip_low: ε_low in [0, 1].
        clip_high: ε_high ≥ 0; None: as ε_low.
    """
    low, high = _log_bounds(clip_low, clip_high)
    return ((advantages > 0) & (log_ratio > high)) | ((advantages < 0) & (log_ratio < low))


def policy_token_losses(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    ratio: Ratio = "token",
) -> Tensor:
    r"""−min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A), token by token.

    Args:
        log_probs: of the sampled tokens under the policy, (N, L).
        old_log_probs: under the policy that sampled them, (N, L); no gradient goes there.
        advantages: of the completions (N,), or of the tokens (N, L); no gradient goes there.
        mask: bool (N, L).
        clip_low: ε_low in [0, 1].
        clip_high: ε_high ≥ 0; None: as ε_low.
        ratio: ρ of each "token", or one for the "sequence".

    Returns:
        (N, L), 0 where masked or where the advantage is 0.

    Raises:
        ValueError: shapes that differ, a setting out of range, or a ratio that overflows (seen on
            the CPU).
        TypeError: not floating, or a mask that is not bool.

    Ref:
        Schulman et al. 2017, arXiv:1707.06347, eq. 7; Yu et al. 2025, arXiv:2503.14476, eq. 10, for
        two bounds.
    """
    log_ratio = log_ratios(log_probs, old_log_probs, mask, ratio)
    gain = _by_token(advantages, log_ratio)
    out = clipped(log_ratio, gain, clip_low, clip_high)
    above = 1 + (clip_low if clip_high is None else clip_high)
    bound = torch.where(gain > 0, torch.full_like(gain, above), 1 - clip_low)  # in gain's dtype
    silent = out | ~mask | (gain == 0)
    rho = torch.where(out, bound, torch.exp(torch.where(silent, 0.0, log_ratio)))
    losses = torch.where(mask & (gain != 0), -rho * gain, 0.0)
    _check_finite(losses, log_ratio)
    return losses


def grpo_loss(  # noqa: PLR0913  # the published loss and its variants, by name
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_log_probs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    kl_coef: float = 0.0,
    kl: KLKind = "k3",
    aggregation: Aggregation = "dapo",
    max_length: int | None = None,
    normalizer: float | Tensor | None = None,
    ratio: Ratio = "token",
) -> Tensor:
    r"""Group relative policy optimization: the clipped loss of completions, + β KL to a reference.

    Args:
        log_probs: of the sampled tokens under the policy, (N, L), at the temperature they were
            sampled with.
        old_log_probs: under the policy that sampled them, (N, L); None: it is the current one.
        advantages: (N,); see `group_advantages` and `rloo_advantages`.
        mask: bool (N, L), the completions' tokens.
        ref_log_probs: under the reference, (N, L), without a gradient; needed where kl_coef > 0.
        clip_low: ε_low in [0, 1].
        clip_high: ε_high ≥ 0; None: as ε_low.
        kl_coef: β ≥ 0.
        kl: the KL's estimate, "k1", "k2" or "k3"; see `kl_estimate`.
        aggregation: "dapo", "grpo", "bnpo" or "dr_grpo"; see aggregation.py.
        max_length: the longest a completion may be, in tokens, for dr_grpo.
        normalizer: the sum of `aggregation_count` over the step's batches; None: this batch's.
        ratio: ρ of each "token", or one for the "sequence" (GSPO, with aggregation "grpo").

    Returns:
        A scalar, float32 or float64.

    Raises:
        ValueError: shapes that differ, a setting out of range or unknown, kl_coef without
            `ref_log_probs`, dr_grpo without `max_length`, an overflow (seen on the CPU).
        TypeError: not floating, or a mask that is not bool.

    Ref:
        Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4.
    """
    check_not_negative("kl_coef", kl_coef)
    if advantages.dim() != 1:
        raise ValueError(f"advantages must be (N,), one a completion; got {advantages.shape}")
    old = log_probs if old_log_probs is None else old_log_probs
    losses = policy_token_losses(log_probs, old, advantages, mask, clip_low, clip_high, ratio)
    if kl_coef:
        if ref_log_probs is None:
            raise ValueError(f"kl_coef is {kl_coef:g}, which needs ref_log_probs; got none")
        current, ref = aligned(2, log_probs=log_probs, ref_log_probs=ref_log_probs)
        current = torch.where(mask, current, 0.0)
        ref = torch.where(mask, ref.detach(), 0.0)
        losses = losses + kl_coef * kl_estimate(current, ref, kl)
        _check_finite(losses, current - ref)
    return aggregate(losses, mask, aggregation, max_length, normalizer)


def ppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Proximal policy optimization's clipped loss, one mean over all tokens.

    Args:
        log_probs: of the sampled tokens under the policy, (N, L).
        old_log_probs: under the policy that sampled them, (N, L).
        advantages: of the tokens, (N, L); see `gae` and `whiten`.
        mask: bool (N, L).
        clip: ε in [0, 1].
        normalizer: tokens of the whole step; None: of this batch.

    Returns:
        A scalar, float32 or float64.

    Raises:
        ValueError: shapes that differ, ε out of range, an overflow (seen on the CPU).
        TypeError: not floating, or a mask that is not bool.

    Ref:
        Schulman et al. 2017, arXiv:1707.06347, eq. 7.
    """
    if advantages.shape != log_probs.shape:
        raise ValueError(
            f"advantages must be (N, L) = {tuple(log_probs.shape)}, one a token; "
            f"got {tuple(advantages.shape)}"
        )
    losses = policy_token_losses(log_probs, old_log_probs, advantages, mask, clip)
    return aggregate(losses, mask, normalizer=normalizer)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = 0.2,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""½ · mean of max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²).

    Args:
        values: what the value model expects now, (N, L).
        old_values: what it expected when the tokens were sampled, (N, L).
        returns: R, (N, L); see `gae`.
        mask: bool (N, L).
        clip: ε > 0 in the reward's unit; None: plain squares.
        normalizer: tokens of the whole step; None: of this batch.

    Returns:
        A scalar, float32 or float64.

    Raises:
        ValueError: shapes that differ, or ε out of range.
        TypeError: not floating, or a mask that is not bool.

    Ref:
        Huang et al. 2022, "The 37 Implementation Details of PPO", detail 9.
    """
    values, old, returns = aligned(2, values=values, old_values=old_values, returns=returns)
    check_mask(mask, values)
    values, old, returns = (
        torch.where(mask, x, 0.0) for x in (values, old.detach(), returns.detach())
    )
    losses = (values - returns) ** 2
    if clip is not None:
        check_positive("clip", clip)
        near = old + (values - old).clamp(-clip, clip)
        losses = torch.maximum(losses, (near - returns) ** 2)
    return 0.5 * aggregate(losses, mask, normalizer=normalizer)


def _log_bounds(clip_low: float, clip_high: float | None) -> tuple[float, float]:
    """log(1 − ε_low), −inf for 1, and log(1 + ε_high)."""
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must be in [0, 1], the ratio's room below 1; got {clip_low}")
    clip_high = clip_low if clip_high is None else clip_high
    check_not_negative("clip_high", clip_high)
    return math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)


def _by_token(advantages: Tensor, like: Tensor) -> Tensor:
    """Advantages as (N, L), or (N, 1) for completions', in the other's dtype."""
    if not advantages.is_floating_point():
        raise TypeError(f"advantages must be of floating dtype; got {advantages.dtype}")
    if advantages.shape == like.shape[:1]:
        advantages = advantages.unsqueeze(1)  # (N, 1)
    elif advantages.shape != like.shape:
        raise ValueError(
            f"advantages must be (N,) = {tuple(like.shape[:1])} or (N, L) = {tuple(like.shape)}; "
            f"got {tuple(advantages.shape)}"
        )
    return advantages.detach().to(like.dtype)


def _check_finite(losses: Tensor, log_ratio: Tensor) -> None:
    """Refuse what has overflowed; not on a GPU, which would wait, nor while compiling."""
    if losses.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = torch.isinf(losses).nonzero()
    if len(wrong):
        n, t = wrong[0].tolist()
        raise ValueError(
            f"the loss of completion {n}, token {t} is infinite: the policies' log-probabilities "
            f"differ by {log_ratio[n, t].item():g} there; lower the learning rate, or sample anew"
        )
