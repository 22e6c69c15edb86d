r"""Losses on preferences: which of two completions is better, or whether one is good.

All take one number a completion. Written with ℓ for its log-probability (a sum over its tokens, or
ℓ̄ for their mean) and

    Δ = (ℓ_c − ℓ_c^ref) − (ℓ_r − ℓ_r^ref)

for how much more the policy prefers the chosen one than the reference does. DPO's family asks for a
reference; SimPO and ORPO do without one. Which of them takes sums and which means is part of the
loss, and said at each: a mean in DPO is another loss, with a β some hundred times too small.

−log σ(x) is `logsigmoid`, exact for any x. Smoothing uses −log σ(−x) = x − log σ(x): one
transcendental in place of two, and no difference of two large numbers. Rows are kept apart on
request, `reduction="none"`, for a loop that divides by the rows of its whole step.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.losses.reduction import (
    Reduction,
    aligned,
    check_not_negative,
    check_positive,
    reduced,
)

_ROUNDING = 1e-4  # a mean of log-probabilities may lie so far above 0, by its summation


def log_ratio_margin(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> Tensor:
    """Δ = (chosen − ref_chosen) − (rejected − ref_rejected), row by row.

    Args:
        chosen: log-probabilities of the chosen completions under the policy, (B,).
        rejected: of the rejected ones, (B,).
        ref_chosen: of the chosen ones under the reference, (B,).
        ref_rejected: of the rejected ones, (B,).

    Returns:
        (B,), float32 or float64.

    Raises:
        ValueError: shapes that differ.
        TypeError: not floating.
    """
    chosen, rejected, ref_chosen, ref_rejected = aligned(
        chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    # each against its own reference first: equal policies give 0 exactly
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Direct preference optimization: −(1 − ε) log σ(βΔ) − ε log σ(−βΔ).

    ln 2 where the policy is the reference, whatever ε. ε is the share of pairs that are taken to be
    labelled the wrong way round ("conservative" DPO).

    Args:
        chosen: *summed* log-probabilities of the chosen completions, (B,).
        rejected: of the rejected ones, (B,).
        ref_chosen: of the chosen ones under the reference, (B,).
        ref_rejected: of the rejected ones, (B,).
        beta: β, how dear it is to leave the reference; above 0.
        label_smoothing: ε in [0, 0.5).
        reduction: "mean", or "none" for (B,).

    Returns:
        A scalar, or (B,); float32, float64 for float64.

    Raises:
        ValueError: shapes that differ, or a setting out of range.
        TypeError: not floating.

    Ref:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 7; Mitchell 2023, "A note on DPO with noisy
        preferences & relationship to IPO", for ε.
    """
    x = _scaled_margin(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing)
    losses = -F.logsigmoid(x)
    if label_smoothing:
        losses = losses + label_smoothing * x
    return reduced(losses, reduction)


def robust_dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Robust DPO: [−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε).

    If a share ε of the pairs is labelled the wrong way round, its expectation over them is DPO's
    loss on the right labels. A single row's may be below 0, without bound.

    Args:
        chosen: *summed* log-probabilities of the chosen completions, (B,).
        rejected: of the rejected ones, (B,).
        ref_chosen: of the chosen ones under the reference, (B,).
        ref_rejected: of the rejected ones, (B,).
        beta: β > 0.
        label_smoothing: ε in [0, 0.5).
        reduction: "mean", or "none" for (B,).

    Returns:
        A scalar, or (B,); float32, float64 for float64.

    Raises:
        ValueError: shapes that differ, or a setting out of range.
        TypeError: not floating.

    Ref:
        Chowdhury et al. 2024, arXiv:2403.00409, section 3, the loss rDPO.
    """
    x = _scaled_margin(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing)
    losses = -F.logsigmoid(x)
    if label_smoothing:
        losses = losses - label_smoothing / (1 - 2 * label_smoothing) * x
    return reduced(losses, reduction)


def hinge_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The hinge on DPO's margin: max(0, 1 − βΔ).

    Args:
        chosen: *summed* log-probabilities of the chosen completions, (B,).
        rejected: of the rejected ones, (B,).
        ref_chosen: of the chosen ones under the reference, (B,).
        ref_rejected: of the rejected ones, (B,).
        beta: β > 0; a margin of 1 / β is enough.
        reduction: "mean", or "none" for (B,).

    Returns:
        A scalar, or (B,); float32, float64 for float64.

    Raises:
        ValueError: shapes that differ, or a β out of range.
        TypeError: not floating.

    Ref:
        Liu et al. 2023, arXiv:2309.06657, the loss hinge-norm: SLiC's on normalized likelihoods.
    """
    return reduced(
        F.relu(1 - _scaled_margin(chosen, rejected, ref_chosen, ref_rejected, beta)), reduction
    )


def ipo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Identity preference optimization: (Δ̄ − 1 / (2β))².

    A margin to reach, not to exceed: what is preferred always cannot drive the policy arbitrarily
    far from the reference.

    Args:
        chosen: log-probabilities of the chosen completions, each the *mean* over its tokens, (B,).
        rejected: of the rejected ones, (B,).
        ref_chosen: of the chosen ones under the reference, (B,).
        ref_rejected: of the rejected ones, (B,).
        beta: β > 0, the paper's τ.
        reduction: "mean", or "none" for (B,).

    Returns:
        A scalar, or (B,); float32, float64 for float64.

    Raises:
        ValueError: shapes that differ, or a β out of range.
        TypeError: not floating.

    Ref:
        Azar et al. 2023, arXiv:2310.12036, eq. 17. Means rather than sums are the authors' later
        advice: with sums the margin to reach does not grow with the length.
    """
    check_positive("beta", beta)
    margin = log_ratio_margin(chosen, rejected, ref_chosen, ref_rejected)
    return reduced((margin - 1 / (2 * beta)) ** 2, reduction)


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    beta: float = 2.0,
    gamma: float = 1.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Simple preference optimization: −log σ(β (ℓ̄_c − ℓ̄_r) − γ), without a reference.

    Args:
        chosen: log-probabilities of the chosen completions, each the *mean* over its tokens, (B,).
        rejected: of the rejected ones, (B,).
        beta: β > 0.
        gamma: γ ≥ 0, the target margin itself, in the units of β (ℓ̄_c − ℓ̄_r). Other trainers ask
            for the ratio γ / β, by which the margin would move with β.
        reduction: "mean", or "none" for (B,).

    Returns:
        A scalar, or (B,); float32, float64 for float64.

    Raises:
        ValueError: shapes that differ, or a setting out of range.
        TypeError: not floating.

    Ref:
        Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    check_positive("beta", beta)
    check_not_negative("gamma", gamma)
    chosen, rejected = aligned(chosen=chosen, rejected=rejected)
    return reduced(-F.logsigmoid(beta * (chosen - rejected) - gamma), reduction)


def log1mexp(x: Tensor) -> Tensor:
    r"""log(1 − eˣ) for x ≤ 0: the log-probability of the opposite.

    Above −ln 2 it is log(−expm1(x)), for 1 − eˣ would cancel; below, log1p(−eˣ), for expm1 rounds
    to −1. Where it is not taken the second is kept from its pole at 0, or its gradient there, inf ·
    0, would be NaN.

    Args:
        x: any shape, floating, at most 0.

    Returns:
        Of x's shape and dtype; −inf at 0, NaN above.

    Ref:
        Mächler 2012, "Accurately computing log(1 − exp(−|a|))", eq. 7.
    """
    border = -math.log(2)
    near = x > border
    log_of_small = torch.log(-torch.expm1(x))
    log_of_large = torch.log1p(-torch.exp(torch.where(near, border, x)))
    return torch.where(near, log_of_small, log_of_large)


def orpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    nll: Tensor,
    beta: float = 0.1,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Odds ratio preference optimization: nll − β log σ(log odds(ℓ̄_c) − log odds(ℓ̄_r)).

    log odds(ℓ̄) = ℓ̄ − log(1 − e^ℓ̄), without a reference. A mean within ε of 0 (the dtype's
    resolution, below which a log-softmax cannot tell it from 0) is read as −ε: the gradient of the
    odds of what is certain would be infinite.

    Args:
        chosen: log-probabilities of the chosen completions, each the *mean* over its tokens, (B,);
            at most 0.
        rejected: of the rejected ones, (B,).
        nll: the chosen rows' own loss of fine-tuning, (B,).
        beta: the paper's λ > 0.
        reduction: "mean", or "none" for (B,).

    Returns:
        A scalar, or (B,); float32, float64 for float64.

    Raises:
        ValueError: shapes that differ, a β out of range, or a mean above 0 (seen on the CPU).
        TypeError: not floating.

    Ref:
        Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7.
    """
    check_positive("beta", beta)
    chosen, rejected, nll = aligned(chosen=chosen, rejected=rejected, nll=nll)
    log_odds = _log_odds("chosen", chosen) - _log_odds("rejected", rejected)
    return reduced(nll - beta * F.logsigmoid(log_odds), reduction)


def _log_odds(name: str, x: Tensor) -> Tensor:
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and x.numel() and x.max().item() > _ROUNDING:
        raise ValueError(
            f"{name} must hold mean log-probabilities, at most 0; got {x.max().item():g}"
        )
    # the value is moved, the gradient goes through
    below = x + (x.clamp(max=-torch.finfo(x.dtype).eps) - x).detach()
    return below - log1mexp(below)


def _scaled_margin(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """βΔ, (B,), once the settings are seen to be in range."""
    check_positive("beta", beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), the share of pairs labelled the wrong way "
            f"round; got {label_smoothing}"
        )
    return beta * log_ratio_margin(chosen, rejected, ref_chosen, ref_rejected)
