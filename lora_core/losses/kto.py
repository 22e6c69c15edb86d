r"""KTO: completions that are good or bad on their own, without pairs.

A completion's reward is r = ℓ − ℓ^ref. Its value is judged against what the policy gains over the
reference anyway, z₀ = KL(policy ‖ reference), which nothing is differentiated through. The KL is
estimated on *mismatched* pairs, each prompt with another row's completion: on its own completion
the estimate would be the reward itself. `kto_baseline` takes their log-probabilities; over several
batches or processes average before the max, not after, or a negative part is lost.
"""

import torch
from torch import Tensor

from lora_core.losses.reduction import (
    Reduction,
    aligned,
    check_not_negative,
    check_positive,
    reduced,
)


def kto_baseline(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    r"""z₀ = max(0, mean(ℓ' − ℓ'^ref)) over mismatched pairs.

    Args:
        log_probs: summed log-probabilities of other rows' completions under the policy, (B,).
        ref_log_probs: under the reference, (B,).

    Returns:
        A scalar without a gradient; 0 where there is no row.

    Raises:
        ValueError: shapes that differ.
        TypeError: not floating.

    Ref:
        Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1.
    """
    log_probs, ref_log_probs = aligned(log_probs=log_probs, ref_log_probs=ref_log_probs)
    return reduced((log_probs - ref_log_probs).detach(), "mean").clamp(min=0)


def kto_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Kahneman–Tversky optimization: λ_D σ(−β (r − z₀)) for good, λ_U σ(β (r − z₀)) for bad.

    The paper's λ_y − v(x, y), with 1 − σ(x) written σ(−x), which does not cancel. Half the weight
    where the policy is the reference.

    Args:
        log_probs: *summed* log-probabilities under the policy, (B,).
        ref_log_probs: under the reference, (B,).
        desirable: bool (B,), whether the completion is good.
        kl: z₀ ≥ 0, a scalar; see `kto_baseline`. Nothing is differentiated through it.
        beta: β > 0.
        desirable_weight: λ_D ≥ 0.
        undesirable_weight: λ_U ≥ 0.
        reduction: "mean", or "none" for (B,).

    Returns:
        A scalar, or (B,); float32, float64 for float64.

    Raises:
        ValueError: shapes that differ, or a setting out of range.
        TypeError: log-probabilities that are not floating, or `desirable` that is not bool.

    Ref:
        Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1.
    """
    check_positive("beta", beta)
    check_not_negative("desirable_weight", desirable_weight)
    check_not_negative("undesirable_weight", undesirable_weight)
    log_probs, ref_log_probs = aligned(log_probs=log_probs, ref_log_probs=ref_log_probs)
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable must be bool, one a row; got {desirable.dtype}")
    if desirable.shape != log_probs.shape:
        raise ValueError(
            f"desirable must have the shape of log_probs, {tuple(log_probs.shape)}; "
            f"got {tuple(desirable.shape)}"
        )
    if isinstance(kl, Tensor):
        if kl.numel() != 1:
            raise ValueError(f"kl must be one number for the batch; got {tuple(kl.shape)}")
        kl = kl.detach().reshape(())
    gain = beta * (log_probs - ref_log_probs - kl)
    losses = torch.where(
        desirable,
        desirable_weight * torch.sigmoid(-gain),
        undesirable_weight * torch.sigmoid(gain),
    )
    return reduced(losses, reduction)
