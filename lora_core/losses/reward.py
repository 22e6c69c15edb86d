r"""The loss of a reward model: the chosen completion's score above the rejected one's.

Bradley and Terry's model gives the chosen one the probability σ(r_c − r_r), which scores leave
undetermined up to a constant: adding 5 to every score changes nothing. `center` pulls the pair's
sum towards 0, so that scores of different prompts can be compared and a policy's reward has a zero.
"""

from torch import Tensor
from torch.nn import functional as F

from lora_core.losses.reduction import Reduction, aligned, check_not_negative, reduced


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    center: float = 0.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""−log σ(r_c − r_r − m) + center · (r_c + r_r)².

    Args:
        chosen: scores of the chosen completions, (B,).
        rejected: of the rejected ones, (B,).
        margin: m, by how much each chosen one is better, (B,); None: 0.
        center: weight of the squared sum of a pair's scores, 0 or more.
        reduction: "mean", or "none" for (B,).

    Returns:
        A scalar, or (B,); float32, float64 for float64.

    Raises:
        ValueError: shapes that differ, or a negative `center`.
        TypeError: not floating.

    Ref:
        Bradley & Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1; Touvron et al. 2023,
        arXiv:2307.09288, eq. 2, for the margin; Eisenstein et al. 2023, arXiv:2312.09244,
        section 2.2, for centering.
    """
    check_not_negative("center", center)
    if margin is None:
        chosen, rejected = aligned(chosen=chosen, rejected=rejected)
        x = chosen - rejected
    else:
        chosen, rejected, margin = aligned(chosen=chosen, rejected=rejected, margin=margin)
        x = chosen - rejected - margin
    losses = -F.logsigmoid(x)
    if center:
        losses = losses + center * (chosen + rejected) ** 2
    return reduced(losses, reduction)
