"""4-bit blockwise codes: quantize; `scales4.py` encodes the scales, `expand4.py` dequantizes.

A tensor is read flat, row-major, in blocks of `block_size`. Each block is divided by its largest
magnitude, the block's scale, and each quotient becomes the index of the nearest of 16 table
entries. Two indices share a byte, the first in the high nibble:

    elements  e0 e1 e2 e3 …            codes  c0 c1 c2 c3 …
    bytes     [c0 << 4 | c1] [c2 << 4 | c3] …           ceil(n / 2) of them
    scales    [max |e0 … e63|] [max |e64 … e127|] …     ceil(n / block_size), float32

`blockwise4_reference.py` holds the definition in plain PyTorch, byte for byte bitsandbytes' on a
CPU. The 16-entry table and the 256-entry table of the scales are arguments; nothing here knows a
data type by name.

Quantizing is one operator, `lora_kernels::quantize4`, with three implementations that are equal to
the bit: the definition; C on a CPU (`cpu/quantize4.c`), which reads a weight once and needs no
memory beside the result; one launch on a GPU (`gpu/quantize4.py`), which does not wait for the
device, except to tell whether all values were finite. Whoever quantizes many weights passes a
`flag` for each, which the device sets, and reads them all once at the end.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 (equations 1-4).
"""

import math

import torch
from torch import Tensor

from lora_kernels import blockwise4_reference as reference
from lora_kernels.dispatch import backend_for
from lora_kernels.expand4 import FLOATS, check_table, dequantize4, expand4, expand4_slice
from lora_kernels.operands import Weight4
from lora_kernels.scales4 import SCALE_GROUP, TINY, check_flag, decode_scales, encode_scales

__all__ = [
    "SCALE_GROUP",
    "Weight4",
    "decode_scales",
    "dequantize4",
    "encode_scales",
    "expand4",
    "expand4_slice",
    "quantize4",
]

torch.library.define(
    "lora_kernels::quantize4",
    "(Tensor x, Tensor table, int block_size, Tensor(a!)? flag) -> (Tensor, Tensor)",
)


def quantize4(
    x: Tensor,
    table: Tensor,
    block_size: int,
    name: str = "tensor",
    *,
    check_finite: bool = True,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize to 4-bit codes with one float32 scale a block.

    `scale_b = max_{i in b} |x_i|`, `code_i = argmin_c |x_i / scale_b - table_c|`.

    Args:
        x: any shape and layout, float16, bfloat16, float32 or float64 (rounded to float32 first).
        table: float32 (16,), in the order of the codes; of equal entries the first is used.
        block_size: elements that share a scale, a power of two from 32 to 4096.
        name: what `x` is called in messages.
        check_finite: wait for the result and refuse what is not finite.
        flag: int32 (1,) on the device of `x`, set to 1 if a value is not finite; then nothing is
            waited for and `check_finite` has no say.

    Returns:
        codes uint8 (ceil(n / 2),) and scales float32 (ceil(n / block_size),). The low nibble that
        an odd n leaves over holds the code of 0. Codes of a block that is not finite mean nothing.

    Raises:
        TypeError: `x` is not floating-point.
        ValueError: NaN or infinity in `x`, no data (meta), or a bad block size, table or flag.
    """
    check_block_size(block_size)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {x.dtype}")
    if x.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values to quantize")
    check_table(table)
    check_flag(flag, x)
    with torch.no_grad():
        x = x.detach()
        found = flag
        if found is None and check_finite:
            found = torch.zeros(1, dtype=torch.int32, device=x.device)
        codes, scales = torch.ops.lora_kernels.quantize4(x, table, block_size, found)
        if flag is None and found is not None and bool(found):
            raise ValueError(reference.describe_non_finite(x, name))
    return codes, scales


@torch.library.impl("lora_kernels::quantize4", "default")
def _quantize4(
    x: Tensor, table: Tensor, block_size: int, flag: Tensor | None
) -> tuple[Tensor, Tensor]:
    offered = {
        "reference": reference.quantize,
        "native": _quantize4_native,
        "triton": _quantize4_triton,
    }
    return offered[backend_for(x, offered)](x, table, block_size, flag)


def _quantize4_fake(
    x: Tensor, table: Tensor, block_size: int, flag: Tensor | None
) -> tuple[Tensor, Tensor]:
    codes = x.new_empty((x.numel() + 1) // 2, dtype=torch.uint8)
    # rounded up without a negative number, on which symbolic sizes stumble
    return codes, x.new_empty((x.numel() + block_size - 1) // block_size, dtype=torch.float32)


def _quantize4_native(
    x: Tensor, table: Tensor, block_size: int, flag: Tensor | None
) -> tuple[Tensor, Tensor]:
    from lora_kernels.cpu import quantize4 as native

    return native.quantize(x, table, block_size, flag)


def _quantize4_triton(
    x: Tensor, table: Tensor, block_size: int, flag: Tensor | None
) -> tuple[Tensor, Tensor]:
    from lora_kernels.gpu import quantize4 as gpu

    return gpu.quantize(x, *_ranks(table.to(x.device)), block_size, TINY, flag)


torch.library.register_fake("lora_kernels::quantize4", _quantize4_fake)


def check_block_size(block_size: int) -> None:
    """Refuse a block size that is not a power of two from 32 to 4096.

    Raises:
        ValueError: with the value.
    """
    if block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"block_size must be a power of two from 32 to 4096; got {block_size!r}")


def _ranks(table: Tensor) -> tuple[Tensor, Tensor]:
    """What turns a number of midpoints into a code, without a look at the values on the host.

    Returns:
        The 15 midpoints of the sorted table and infinity, float32 (16,); the code of each rank,
        int32 (16,). Equal entries have a midpoint between them too, and the first one's code on
        both sides of it.
    """
    values, order = table.sort(stable=True)
    middle = torch.nn.functional.pad((values[:-1] + values[1:]) / 2, (0, 1), value=math.inf)
    rank = torch.arange(16, device=table.device)
    first = rank.masked_fill(torch.nn.functional.pad(values[1:] == values[:-1], (1, 0)), 0)
    return middle, order[first.cummax(0).values].to(torch.int32)
