"""PEFT's LoRA on a grouped convolution, whose A sees the channels of all groups.

In a convolution with g groups, output channel n sees the C/g input channels of its group. The form
of forms.py keeps to that: A is grouped too, and s·B A is an update of the grouped weight. PEFT
makes A an ordinary convolution and only B a grouped one, so that the update of each output channel
reads all C channels: a different layer, which no grouped weight holds, and which PEFT itself does
not merge. Such an adapter is run and trained here as it is; a new one has the grouped form.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.adapters.forms import ConvForm
from lora_core.adapters.lora import LoRA

__all__ = ["MixedConvForm", "mixed_pair"]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class MixedConvForm(ConvForm):
    """A grouped convolution under an A of all channels: A (r, C·|kernel|), B (N, r/g)."""

    def matrix(self, weight: Tensor) -> Tensor:
        """Return (N, C·|kernel|), an ordinary convolution's, of a weight (N, C/g, *kernel)."""
        g = self.groups
        blocks = [block.flatten(1) for block in weight.chunk(g)]  # (N/g, C/g·|kernel|) each
        return torch.block_diag(*blocks)  # type: ignore[no-untyped-call]  # torch's

    def apply(self, x: Tensor, down: Tensor, up: Tensor, base: Any) -> Tensor:
        """Return the update (B, N, *out) for x (B, C, *in), or without B for both."""
        down, up = self.on_disk(down, up)
        h = self._convolve(x, down, base, 1)  # (B, r, *out)
        return _CONVOLUTIONS[len(self.kernel)](h, up, groups=self.groups)

    def apply_rows(
        self, x: Tensor, down: Tensor, up: Tensor, base: Any, slots: Tensor | None = None
    ) -> Tensor:
        """Return the update (B, N, *out) for x (B, C, *in), entry by entry."""
        if slots is not None:
            down, up = down.index_select(0, slots), up.index_select(0, slots)
        rows = [
            self.apply(one, a, b, base)
            for one, a, b in zip(torch.split(x, 1), down, up, strict=True)
        ]
        return torch.cat(rows)


def mixed_pair(pair: LoRA, channels: int) -> LoRA:
    """Make the pair for a grouped convolution whose A sees all channels.

    Args:
        pair: the one of the grouped form, whose settings it takes; without a start of its own.
        channels: C.

    Returns:
        The pair, its A to be loaded; it cannot be merged.

    Raises:
        ValueError: the pair is a DoRA, which needs the grouped weight's rows.
    """
    form = pair.form
    if not isinstance(form, ConvForm) or type(pair) is not LoRA:
        raise ValueError(f"{type(pair).__name__} cannot have an A that sees all groups' channels")
    kernel = 1
    for size in form.kernel:
        kernel *= size
    mixed = LoRA(
        channels * kernel,
        form.out_features,
        r=pair.r,
        alpha=pair.alpha,
        dropout=pair.dropout,
        use_rslora=pair.use_rslora,
        form=MixedConvForm(channels * kernel, form.out_features, form.groups, form.kernel),
        bias=pair.bias0,
        up_bias=pair.up_bias is not None,
    )
    mixed.unmergeable = (
        "its A sees the channels of all groups, as PEFT's on a grouped convolution, and no grouped "
        "weight holds that"
    )
    return mixed
