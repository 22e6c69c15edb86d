r"""Advantages: by how much a completion, or a token, did better than was to be expected.

*Groups* (GRPO, RLOO) expect what the other completions of the same prompt got, so no value model is
needed. *GAE* (PPO) expects what a value model says, token by token.

Rewards are a few numbers a step and advantages multiply every gradient, so they are computed in
float64 whatever comes in. Three edges are exact here and a matter of rounding elsewhere: a group
whose rewards are all equal has advantage 0 (the mean of three 0.1 is not 0.1, and 1e-17 over a
standard deviation of 1e-17 is a gradient); a reward that is NaN, an answer that could not be
judged, is left out of its group's mean and deviation and gets advantage 0; and nothing is ever
divided by a deviation of one number.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from lora_core.losses.reduction import aligned

Scale = Literal["group", "batch", "none"]

_VARIANCE_EPS = 1e-8


def group_advantages(
    rewards: Tensor, group_size: int, scale: Scale = "group", eps: float = 1e-4
) -> Tensor:
    r"""A_i = (r_i − mean of its group) / (s + eps).

    Args:
        rewards: (N,), a prompt's completions one after the other; NaN: left out, advantage 0.
        group_size: completions of a prompt, 2 or more; divides N.
        scale: s is the unbiased standard deviation of the "group", of the whole "batch", or
            "none": not divided by anything (Dr. GRPO: a group's spread is no reason to weigh it).
        eps: added to s, 0 or more.

    Returns:
        (N,) in the rewards' dtype, float32 at least, without a gradient. Exactly 0 in a group (or
        for "batch" a batch) of equal rewards.

    Raises:
        ValueError: a group size that does not divide N or is below 2, an infinite reward, an
            unknown scale, a negative eps.
        TypeError: rewards that are not floating.

    Ref:
        Shao et al. 2024, arXiv:2402.03300, section 4.1.2; Liu et al. 2025, arXiv:2503.20783,
        section 3, for "none".
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f'scale must be "group", "batch" or "none"; got {scale!r}')
    if not eps >= 0:
        raise ValueError(f"eps must be 0 or more; got {eps}")
    groups, known, dtype = _groups(rewards, group_size)
    centered = _centered(groups, known)
    if scale == "group":
        spread = _deviation(centered, known.sum(1, keepdim=True))  # (G, 1)
        centered = _divided(centered, spread + eps)
    elif scale == "batch":
        # over all rewards about their common mean, not about the groups'
        flat, counted = groups.reshape(1, -1), known.reshape(1, -1)
        spread = _deviation(_centered(flat, counted), counted.sum(1, keepdim=True))  # (1, 1)
        centered = _divided(centered, spread + eps)
    return centered.reshape(-1).to(dtype)


def rloo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    r"""REINFORCE leave-one-out: A_i = r_i − mean of the *other* completions' rewards.

    = n / (n − 1) · (r_i − mean of all n), so a group's advantages sum to 0.

    Args:
        rewards: (N,), a prompt's completions one after the other; NaN: left out, advantage 0.
        group_size: completions of a prompt, 2 or more; divides N.

    Returns:
        (N,) in the rewards' dtype, float32 at least, without a gradient; 0 for the one reward that
        is known in its group.

    Raises:
        ValueError: a group size that does not divide N or is below 2, or an infinite reward.
        TypeError: rewards that are not floating.

    Ref:
        Ahmadian et al. 2024, arXiv:2402.14740, section 2.3, the estimator RLOO.
    """
    groups, known, dtype = _groups(rewards, group_size)
    n = known.sum(1, keepdim=True)  # (G, 1)
    centered = _centered(groups, known) * n / (n - 1).clamp(min=1)
    return centered.reshape(-1).to(dtype)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    r"""Generalized advantage estimation: A_t = Σ_k (γλ)ᵏ δ_{t+k}, δ_t = r_t + γ V_{t+1} − V_t.

    Backwards, A_t = δ_t + γλ A_{t+1}. The next of a token is the next one that the mask keeps: what
    lies between two turns is no step. Beyond the last token the value is 0, as the text has ended.

    Args:
        rewards: each token's reward (N, L); a score of the whole stands at its last token.
        values: what the value model expects from each token on, (N, L).
        mask: bool (N, L), the tokens that were sampled.
        gamma: γ in [0, 1].
        lam: λ in [0, 1]: 0 trusts the values, 1 the rewards.

    Returns:
        Advantages, and returns A + V for the value loss to learn, both (N, L) and without a
        gradient; 0 where masked.

    Raises:
        ValueError: shapes that differ, γ or λ out of range.
        TypeError: not floating, or a mask that is not bool.

    Ref:
        Schulman et al. 2015, arXiv:1506.02438, eq. 16.
    """
    for name, weight in (("gamma", gamma), ("lam", lam)):
        if not 0 <= weight <= 1:
            raise ValueError(f"{name} must be in [0, 1]; got {weight}")
    rewards, values = aligned(2, rewards=rewards.detach(), values=values.detach())
    check_mask(mask, rewards)
    advantages = torch.zeros_like(rewards)  # (N, L)
    ahead = rewards.new_zeros(len(rewards))  # (N,) the next token's advantage
    value = rewards.new_zeros(len(rewards))  # (N,) and its value
    for t in reversed(range(rewards.shape[1])):
        kept = mask[:, t]
        delta = rewards[:, t] + gamma * value - values[:, t]
        ahead = torch.where(kept, delta + gamma * lam * ahead, ahead)
        value = torch.where(kept, values[:, t], value)
        advantages[:, t] = torch.where(kept, ahead, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    r"""(x − mean) / √(variance + 1e-8) over what the mask keeps.

    Args:
        x: (N, L).
        mask: bool (N, L).
        shift_mean: whether the mean becomes 0; else it is added again.

    Returns:
        (N, L), float32 or float64, 0 where masked; the unbiased variance. Equal numbers give 0
        exactly, and so does a single one.

    Raises:
        ValueError: shapes that differ.
        TypeError: not floating, or a mask that is not bool.

    Ref:
        Huang et al. 2022, "The 37 Implementation Details of PPO", detail 7.
    """
    (x,) = aligned(2, x=x)
    check_mask(mask, x)
    flat, kept = x.double().reshape(1, -1), mask.reshape(1, -1)
    flat = torch.where(kept, flat, 0.0)
    count = kept.sum()
    centered = _centered(flat, kept)
    variance = centered.square().sum() / (count - 1).clamp(min=1)
    white = centered * torch.rsqrt(variance + _VARIANCE_EPS)
    if not shift_mean:
        white = white + flat.sum() / count.clamp(min=1)
    return torch.where(mask, white.view_as(x), 0.0).to(x.dtype)


def check_mask(mask: Tensor, like: Tensor) -> None:
    """Refuse a mask that is not bool, (N, L) like the tensor it masks."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool; got {mask.dtype}")
    if mask.shape != like.shape:
        raise ValueError(f"mask must be (N, L) = {tuple(like.shape)}; got {tuple(mask.shape)}")


def _groups(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor, torch.dtype]:
    """Rewards (G, group) in float64, 0 where unknown; which are known; the dtype to return."""
    (rewards,) = aligned(rewards=rewards.detach())
    if group_size < 2:
        raise ValueError(
            f"a group is compared with itself, so it needs 2 completions or more; got {group_size}"
        )
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not divide into groups of {group_size}")
    infinite = torch.isinf(rewards).nonzero()
    if len(infinite):
        where = int(infinite[0])
        raise ValueError(
            f"reward {where} is {float(rewards[where])}: give a finite number, or NaN for a "
            "completion to leave out"
        )
    groups = rewards.double().view(-1, group_size)
    known = ~groups.isnan()
    return torch.where(known, groups, 0.0), known, rewards.dtype


def _centered(rows: Tensor, known: Tensor) -> Tensor:
    """Each row minus its mean over what is known; 0 elsewhere, and in a row of equal numbers."""
    if not rows.numel():
        return rows
    mean = rows.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    largest = torch.where(known, rows, -math.inf).amax(1, keepdim=True)
    smallest = torch.where(known, rows, math.inf).amin(1, keepdim=True)
    return torch.where(known & (largest > smallest), rows - mean, 0.0)


def _deviation(centered: Tensor, count: Tensor) -> Tensor:
    """The unbiased standard deviation of centered rows; 0 for a single number."""
    return (centered.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def _divided(centered: Tensor, spread: Tensor) -> Tensor:
    """0 / 0 is 0: with eps 0, equal rewards have no spread."""
    return torch.where(centered == 0, 0.0, centered / spread)
