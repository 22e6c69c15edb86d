"""Rotary embedding on a GPU: one launch, x read once and written once.

A program turns the heads of one token, a tile of them at a time, so the token's cosines and sines
are loaded once, and a tile is HEADS x HALF pairs. Everything goes by strides: q and k are
transposed views of what the projections give, and stay where they are. For 16 bits 4 bytes a
channel are moved, and 4 R a token for the angles.

Products and sums are not contracted (`enable_fp_fusion=False`), so that results are the
definition's to the bit.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.gpu.decode import narrow
from lora_kernels.gpu.variant import Variant

__all__ = ["rotate", "variants"]

PAIRS = 1024  # channel pairs of a tile, about
WARPS = 4


@triton.jit
def _widen(x):
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "heads"])
def _kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    tokens,
    heads,
    half,
    rest,  # channels that are copied
    x_batch,  # strides
    x_head,
    x_token,
    out_batch,
    out_head,
    out_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    i = tl.arange(0, HALF)[None, :]  # (1, HALF)
    turned = i < half
    c = tl.load(cos_ptr + batch * cos_batch + token * cos_token + i, mask=turned, other=0.0)
    s = tl.load(sin_ptr + batch * sin_batch + token * sin_token + i, mask=turned, other=0.0)
    if INVERSE:
        s = -s
    x_ptr += batch * x_batch + token * x_token
    out_ptr += batch * out_batch + token * out_token
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    for start in range(0, heads, HEADS):
        h = start + tl.arange(0, HEADS).to(tl.int64)[:, None]  # (HEADS, 1)
        inside = (h < heads) & turned
        x_at, out_at = x_ptr + h * x_head + i, out_ptr + h * out_head + i
        a = _widen(tl.load(x_at, mask=inside, other=0.0))
        b = _widen(tl.load(x_at + half, mask=inside, other=0.0))
        tl.store(out_at, narrow(a * c - b * s, dtype), mask=inside)
        tl.store(out_at + half, narrow(b * c + a * s, dtype), mask=inside)
        if REST > 0:
            j = tl.arange(0, REST)[None, :]  # (1, REST)
            some = (h < heads) & (j < rest)
            copied = tl.load(x_ptr + h * x_head + 2 * half + j, mask=some, other=0.0)
            tl.store(out_ptr + h * out_head + 2 * half + j, copied, mask=some)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor) -> None:
    """Turn x (B, H, T, D) by the angles, or back, into `out`.

    Args:
        x: channels side by side, other strides as they are.
        cos: (B, 1, T, R/2) float32, channels side by side, for the first R channels of x.
        sin: likewise.
        inverse: by the negative angles.
        out: (B, H, T, D) in the dtype of x, channels side by side.
    """
    batch, heads, tokens, channels = x.shape
    if x.numel() == 0:
        return
    half, rest = cos.shape[3], channels - 2 * cos.shape[3]
    tables = (cos.stride(0), cos.stride(2), sin.stride(0), sin.stride(2))
    sizes = (tokens, heads, half, rest, *x.stride()[:3], *out.stride()[:3], *tables)
    options = _constants(heads, half, rest, inverse)
    _kernel[(batch * tokens,)](
        x, cos, sin, out, *sizes, **options, num_warps=WARPS, enable_fp_fusion=False
    )


def _constants(heads: int, half: int, rest: int, inverse: bool) -> dict[str, Any]:
    pairs = triton.next_power_of_2(max(1, half))
    tile = min(triton.next_power_of_2(heads), max(1, PAIRS // pairs))
    left = triton.next_power_of_2(rest) if rest else 0
    return {"INVERSE": inverse, "HEADS": tile, "HALF": pairs, "REST": left}


def variants() -> list[Variant]:
    """Heads of 128 channels in every dtype and direction; of 64, and partly turned, once."""
    found = [
        _variant(dtype, 32, 128, 128, inverse)
        for dtype in ("bf16", "fp16", "fp32")
        for inverse in (False, True)
    ]
    more = ((8, 128, 128), (32, 64, 64), (32, 80, 32))
    return found + [_variant("bf16", *sizes, False) for sizes in more]


def _variant(dtype: str, heads: int, channels: int, turned: int, inverse: bool) -> Variant:
    constants = _constants(heads, turned // 2, channels - turned, inverse)
    types = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    signature = {
        name: types.get(name, "*fp32") if name.endswith("_ptr") else "i32"
        for name in _kernel.arg_names
    }
    return Variant(
        f"rotary/{dtype}/{heads} of {channels}, {turned} turned{'/back' if inverse else ''}",
        _kernel,
        signature | dict.fromkeys(constants, "constexpr"),
        constants,
        warps=WARPS,
        fp_fusion=False,
        exact=True,
        odd=frozenset(("tokens", "heads")),
    )
