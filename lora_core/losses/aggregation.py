r"""How the losses of sampled tokens become one number: what GRPO's variants differ in.

Each is a sum over the batch divided by a count over the whole optimizer step, so that a loop may
cut the step into batches, on as many processes, as it likes:

    aggregation   sum over the batch                  count: `aggregation_count`
    dapo          of all tokens                       tokens
    grpo          of the sequences' means             sequences
    dr_grpo       of all tokens / max_length          sequences
    bnpo          the mean of the batch's tokens      1: a batch

Long completions weigh more in dapo, all alike in grpo (whose tokens then weigh less the longer
their completion is, wrong long answers among them), and by a constant in dr_grpo. bnpo is dapo
with the batch's own count: its result depends on how the step was cut, and is here to reproduce
others' runs.

A sequence is a row with a token that counts: a completion that is masked whole (because it was cut
short, say) is out of the sum and out of the count. Other trainers leave it in the count.
"""

from typing import Literal

import torch
from torch import Tensor

from lora_core.losses.advantages import check_mask

Aggregation = Literal["dapo", "grpo", "bnpo", "dr_grpo"]

AGGREGATIONS = ("dapo", "grpo", "bnpo", "dr_grpo")


def aggregation_count(mask: Tensor, aggregation: Aggregation = "dapo") -> int:
    """What the loss of a batch counts for in its optimizer step; see the module.

    Args:
        mask: bool (N, L).
        aggregation: one of AGGREGATIONS.

    Raises:
        ValueError: an unknown aggregation.
    """
    _check_aggregation(aggregation)
    if aggregation == "bnpo":
        return int(mask.any())
    return int(mask.sum() if aggregation == "dapo" else mask.any(1).sum())


def aggregate(
    token_losses: Tensor,
    mask: Tensor,
    aggregation: Aggregation = "dapo",
    max_length: int | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""One number from the tokens' losses; see the module.

    Args:
        token_losses: (N, L).
        mask: bool (N, L).
        aggregation: one of AGGREGATIONS.
        max_length: the longest a completion may be, in tokens; dr_grpo divides by it.
        normalizer: the sum of `aggregation_count` over the step's batches; None: this batch's.

    Returns:
        A scalar; 0 with zero gradient where no token counts.

    Raises:
        ValueError: an unknown aggregation, dr_grpo without `max_length`, a mask that does not fit.
        TypeError: a mask that is not bool.

    Ref:
        Yu et al. 2025, arXiv:2503.14476, eq. 12 (dapo); Shao et al. 2024, arXiv:2402.03300, eq. 3
        (grpo); Liu et al. 2025, arXiv:2503.20783, section 3 (dr_grpo).
    """
    check_mask(mask, token_losses)
    _check_aggregation(aggregation)
    kept = torch.where(mask, token_losses, 0.0)
    if aggregation == "grpo":
        total = (kept.sum(1) / mask.sum(1).clamp(min=1)).sum()
    elif aggregation == "bnpo":
        total = kept.sum() / mask.sum().clamp(min=1)
    else:
        total = kept.sum()
    if aggregation == "dr_grpo":
        if max_length is None or max_length < mask.shape[1]:
            raise ValueError(
                "dr_grpo divides by max_length, the longest a completion may be: give it, at least "
                f"{mask.shape[1]} for this batch; got {max_length}"
            )
        total = total / max_length
    if normalizer is None:
        normalizer = aggregation_count(mask, aggregation)
    if isinstance(normalizer, Tensor):
        return total / normalizer.clamp(min=1)
    if normalizer < 0:
        raise ValueError(f"normalizer is a count, 0 or more; got {normalizer}")
    return total / max(normalizer, 1)


def _check_aggregation(aggregation: str) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"aggregation must be one of {', '.join(AGGREGATIONS)}; got {aggregation!r}"
        )
