"""The scales of 4-bit blocks in 8 bits (double quantization): encode and decode.

The scales of a weight have their mean taken off and are cut into groups of 256. Each group is
divided by its largest magnitude, and a scale becomes the index of the nearest of 256 table entries:

    q_b = argmin_c |(scale_b - offset) - table_c * absmax_g|        g = b // 256
    scale_b ~ table[q_b] * absmax_g + offset                        rounded twice

Nearest is meant exactly: quotients and midpoints are compared in float64, in which the midpoints of
float32 entries have no error.

There is one scale for 32 weights or more, so on a GPU nothing here is worth a kernel of its own:
the definition is a dozen operations on the scales' device and never waits for the host. On a CPU it
takes longer than to quantize the weight itself in C, so that encoding is C too (`cpu/scales8.c`).
Both are one operator, `lora_kernels::encode_scales`: what traces, batches or differentiates a
program does not meet C's addresses. What expands a weight decodes its scales on the way.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 (double quantization).
"""

import torch
from torch import Tensor

from lora_kernels.dispatch import backend_for

__all__ = ["SCALE_GROUP", "TINY", "decode_scales", "encode_scales"]

BACKENDS = ("reference", "native", "triton")  # on a GPU the definition runs
SCALE_GROUP = 256  # scales that share one scale of their own
TINY = 1e-38  # scales below are taken as this much, so that the reciprocal stays finite

torch.library.define(
    "lora_kernels::encode_scales",
    "(Tensor scales, Tensor offset, Tensor scale_table) -> (Tensor, Tensor)",
)


def encode_scales(
    scales: Tensor,
    scale_table: Tensor,
    *,
    check_finite: bool = True,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize scales to 8 bits: `q_b = argmin_c |(scale_b - offset) - table_c * absmax_g|`.

    Args:
        scales: float32 (blocks,), finite.
        scale_table: float32 (256,), ascending.
        check_finite: wait for the result and refuse an offset that is not finite.
        flag: int32 (1,) on the scales' device, set to 1 if the offset is not finite; then nothing
            is waited for and `check_finite` has no say.

    Returns:
        q uint8 (blocks,), absmax float32 (ceil(blocks / 256),), offset float32 () (the mean).

    Raises:
        ValueError: a table of another kind, or scales so large that their sum overflows float32.
    """
    if scale_table.shape != (256,) or scale_table.dtype != torch.float32:
        raise ValueError(
            "the scale table must be float32 (256,); got "
            f"{scale_table.dtype} {tuple(scale_table.shape)}"
        )
    check_flag(flag, scales)
    with torch.no_grad():
        if not scales.numel():
            return scales.new_zeros(0, dtype=torch.uint8), scales.new_zeros(0), scales.new_zeros(())
        offset = scales.mean()
        if flag is not None:
            flag.masked_fill_(offset.isfinite().logical_not(), 1)
        elif check_finite and not bool(offset.isfinite()):
            raise ValueError(
                f"the {scales.numel()} scales sum to more than float32 holds (largest "
                f"{float(scales.max()):g}); use double_quant=False or rescale the weight"
            )
        q, absmax = torch.ops.lora_kernels.encode_scales(scales.detach(), offset, scale_table)
        return q, absmax, offset


@torch.library.impl("lora_kernels::encode_scales", "default")
def _encode_scales(scales: Tensor, offset: Tensor, scale_table: Tensor) -> tuple[Tensor, Tensor]:
    if backend_for(scales, BACKENDS) == "native" and scales.dtype == torch.float32:
        from lora_kernels.cpu import quantize4 as native

        return native.encode_scales(scales, float(offset), scale_table)
    centred = scales - offset
    groups = -(-scales.numel() // SCALE_GROUP)
    padded = torch.nn.functional.pad(centred, (0, groups * SCALE_GROUP - scales.numel()))
    absmax = padded.view(groups, SCALE_GROUP).abs().amax(1)  # (groups,)
    bound = absmax.clamp(min=TINY).double()
    quotients = padded.view(groups, SCALE_GROUP).double() / bound[:, None]
    entries = scale_table.to(scales.device).double()
    middle = (entries[:-1] + entries[1:]) / 2  # exact in float64
    nearest = torch.bucketize(quotients.view(-1)[: scales.numel()], middle)
    return nearest.to(torch.uint8), absmax


def _fake(scales: Tensor, offset: Tensor, scale_table: Tensor) -> tuple[Tensor, Tensor]:
    # rounded up without a negative number, on which symbolic sizes stumble
    groups = (scales.numel() + SCALE_GROUP - 1) // SCALE_GROUP
    return scales.new_empty(scales.numel(), dtype=torch.uint8), scales.new_empty(groups)


torch.library.register_fake("lora_kernels::encode_scales", _fake)


def decode_scales(
    scales: Tensor,
    scale_absmax: Tensor | None = None,
    scale_offset: Tensor | None = None,
    scale_table: Tensor | None = None,
) -> Tensor:
    """Decode double-quantized scales: `table[q_b] * absmax[b // 256] + offset`, rounded twice.

    Args:
        scales: float32 (blocks,), returned as it is, or uint8 indices.
        scale_absmax: float32 (ceil(blocks / 256),), with uint8 scales.
        scale_offset: float32 (), with uint8 scales.
        scale_table: float32 (256,), with uint8 scales.

    Returns:
        float32 (blocks,).

    Raises:
        ValueError: uint8 scales without what decodes them.
    """
    if scales.dtype == torch.float32:
        return scales
    if scale_absmax is None or scale_offset is None or scale_table is None:
        raise ValueError(
            f"scales of {scales.dtype} need scale_absmax, scale_offset and scale_table to decode"
        )
    with torch.no_grad():
        values = scale_table.to(scales.device).index_select(0, scales.int())
        return values * scale_absmax.repeat_interleave(SCALE_GROUP)[: values.numel()] + scale_offset


def check_flag(flag: Tensor | None, data: Tensor) -> None:
    """Refuse a flag that a kernel could not set.

    Raises:
        ValueError: with what it is instead.
    """
    if flag is None:
        return
    if flag.shape != (1,) or flag.dtype != torch.int32 or flag.device != data.device:
        raise ValueError(
            f"flag must be int32 (1,) on {data.device}; got {flag.dtype} {tuple(flag.shape)} on "
            f"{flag.device}"
        )
