"""Double quantization: the scales of 4-bit blocks, themselves in 8 bits.

One float32 scale for 64 weights is half a bit a weight. Double quantization subtracts the mean of
all scales, cuts what is left into groups of 256, divides each group by its largest magnitude and
keeps, for each scale, the index of the nearest of 256 entries: 8/64 + 32/(64·256) = 0.127 bits a
weight instead of 0.5.

The 256 entries are bitsandbytes' signed dynamic map: seven decades from 1e-6 to 1, decade i with
2^i evenly spaced values of either sign, then 0 and 1. It is dense near zero in relative terms and
has 128 of its values above 0.1.

Difference from bitsandbytes: its CPU code looks the entry up in 65536 bins of [-1, 1], so one scale
in about 550 gets a neighbour of the nearest entry. Here it is the nearest always, by a search in
float64 (`lora_kernels.encode_scales`, to which the map is an argument); the format is the same, and
either reads the other's files.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 (double quantization); Dettmers et al.
2022, 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2 (dynamic map).
"""

import functools

import torch
from torch import Tensor

import lora_kernels

__all__ = ["dynamic_map", "encode_scales", "shared_map"]

_placed: dict[torch.device, Tensor] = {}


@functools.cache
@torch.inference_mode(False)  # or training could not use what evaluation made
def _dynamic_map() -> Tensor:
    signed = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        middle = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)  # (2^decade,)
        signed += [middle, -middle]
    ends = torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")
    return torch.cat((*signed, ends)).sort().values


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The signed dynamic 8-bit map.

    Args:
        device: where to put it.

    Returns:
        float32 (256,), ascending from -0.993 to 1; entry 127 is 0.
    """
    return _dynamic_map().to(device, copy=True)


def shared_map(device: torch.device) -> Tensor:
    """The map on a device, copied there once: for reading only, where `dynamic_map` gives a copy.

    Copying from the CPU waits for all that the device has to do, which a call that only reads the
    map should not.
    """
    found = _placed.get(device)
    if found is None:
        with torch.inference_mode(False):
            found = _dynamic_map().to(device)
        if type(found) is Tensor:  # not a fake one, while a compiler traces
            _placed[device] = found
    return found


def encode_scales(
    scales: Tensor, *, check_finite: bool = True, flag: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize scales to 8 bits with the dynamic map: `lora_kernels.encode_scales`.

    Args:
        scales: float32 (blocks,), finite.
        check_finite: as there.
        flag: as there.

    Returns:
        q uint8 (blocks,), absmax float32 (ceil(blocks / 256),), offset float32 () (the mean).

    Raises:
        ValueError: scales so large that their sum overflows float32.
    """
    table = shared_map(scales.device)
    return lora_kernels.encode_scales(scales, table, check_finite=check_finite, flag=flag)
