"""Products with a 4-bit weight on a CPU: straight from the codes, or through panels of W.

    few rows of x     matmul4.c: half a byte a weight is read and nothing of W is written
    more              W is expanded a panel at a time, and PyTorch multiplies by the panel

Few rows are bound by memory, and reading codes instead of a dense W is the whole gain. More rows
are bound by multiplications, which PyTorch's library does best: so W is expanded for it, but never
all at once. A panel is a few megabytes, written and read again while it lies in a cache, and each
takes the place of the one before. So the product needs a hundredth of the dense weight's memory,
and takes as long as if W had been dense all along; bitsandbytes expands all of W, writes it to
memory and reads it back.

Products of float16 are formed in float32: PyTorch has no fast ones of float16 on most CPUs.

`x Wᵀ` is cut along the rows of W and `dy W` along its columns. Either way an element of the result
is one sum over all of W's row or column, rounded once.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.cpu import arguments, blockwise4, library
from lora_kernels.cpu.blockwise4 import BLOCK_STEP
from lora_kernels.expand4 import check_stored, expand4
from lora_kernels.operands import Weight4

__all__ = ["FEW_ROWS", "PANEL_BYTES", "PANEL_COLUMNS", "multiply", "multiply_dx"]

# rows up to which multiplying from the codes is faster (docs/log.md); float64 never is
FEW_ROWS = {torch.float32: 32, torch.bfloat16: 12, torch.float16: 32}
PANEL_BYTES = 8 << 20
PANEL_COLUMNS = 256  # of `dy W` at least: fewer and the library's product slows down
_ARGUMENTS = (
    *(ctypes.c_int, *arguments.WEIGHT, *[ctypes.c_int64] * 3),
    *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
)


def multiply(x: Tensor, weight: Weight4, bias: Tensor | None) -> Tensor:
    """`y = x Wᵀ + bias`.

    Args:
        x: (M, K), floating-point.
        weight: codes and scales of W (N, K), without gaps, on the CPU.
        bias: (N,) or None.

    Returns:
        (M, N) in the dtype of x. With few rows W is not rounded at all and the result once.

    Raises:
        ValueError: too many or too few codes or scales, scales that nothing decodes, a table of
            another kind, codes that are not uint8, or tensors on another device.
    """
    _check(weight, bias)
    n, k = weight.out_features, weight.in_features
    if _few(x, weight):
        return _from_codes(x, weight, bias)
    if x.dtype == torch.float16:
        return multiply(x.float(), weight, bias).half()
    bias = None if bias is None else bias.to(x.dtype)
    rows = max(1, PANEL_BYTES // (x.element_size() * max(k, 1)))
    if rows >= n or not _slices(weight):
        return F.linear(x, _dense(weight, x.dtype), bias)
    y, panels = x.new_empty(len(x), n), x.new_empty(rows, k)
    for a in range(0, n, rows):
        b = min(a + rows, n)
        panel = panels[: b - a]
        blockwise4.expand_slice(weight, a, b, 0, k, panel, stream=False)
        if bias is None:
            torch.mm(x, panel.t(), out=y[:, a:b])
        else:
            torch.addmm(bias[a:b], x, panel.t(), out=y[:, a:b])
    return y


def multiply_dx(dy: Tensor, weight: Weight4) -> Tensor:
    """`dx = dy W`.

    Args:
        dy: (M, N), floating-point.
        weight: codes and scales of W (N, K), without gaps, on the CPU.

    Returns:
        (M, K) in the dtype of dy.

    Raises:
        TypeError: as `multiply`.
        ValueError: as `multiply`.
    """
    _check(weight)
    if dy.dtype == torch.float16:
        return multiply_dx(dy.float(), weight).half()
    n, k, block = weight.out_features, weight.in_features, weight.block_size
    columns = max(PANEL_COLUMNS, PANEL_BYTES // (dy.element_size() * max(n, 1)))
    columns = max(columns // block, 1) * block
    if columns >= k or not _slices(weight):
        return dy @ _dense(weight, dy.dtype)
    dx, panels = dy.new_empty(len(dy), k), dy.new_empty(n * columns)
    for a in range(0, k, columns):
        b = min(a + columns, k)
        panel = panels[: n * (b - a)].view(n, b - a)
        blockwise4.expand_slice(weight, 0, n, a, b, panel, stream=False)
        torch.mm(dy, panel, out=dx[:, a:b])
    return dx


def _slices(weight: Weight4) -> bool:
    """Whether rows are whole blocks, and of a size that C takes."""
    return not (weight.in_features % weight.block_size or weight.block_size % BLOCK_STEP)


def _dense(weight: Weight4, dtype: torch.dtype) -> Tensor:
    """All of W (N, K), for an operator that is already inside torch's dispatcher."""
    w = weight
    if w.block_size % BLOCK_STEP:
        return expand4(w, dtype)
    out = torch.empty(w.out_features, w.in_features, dtype=dtype, device=w.codes.device)
    blockwise4.expand(w.codes, w.scales, w.table, w.block_size, w.nested, out)
    return out


def _few(x: Tensor, weight: Weight4) -> bool:
    """Whether C multiplies, which takes rows of whole blocks."""
    block = weight.block_size
    fits = block >= 32 and not block & (block - 1) and not weight.in_features % block
    return len(x) <= FEW_ROWS.get(x.dtype, -1) and fits


def _from_codes(x: Tensor, weight: Weight4, bias: Tensor | None) -> Tensor:
    w = weight
    y = x.new_empty(len(x), w.out_features)
    if not y.numel():
        return y
    # names stay: what is copied here has to live until the call is over
    x, held = x.contiguous(), arguments.at_hand(w.codes, w.scales, w.table, w.nested)
    bias = None if bias is None else bias.float().contiguous()
    library.function("lora_matmul4", *_ARGUMENTS)(
        library.threads(),
        *arguments.addresses(held),
        *(w.out_features, w.in_features, w.block_size),
        *(x.data_ptr(), len(x), arguments.DTYPES[x.dtype]),
        *(None if bias is None else bias.data_ptr(), y.data_ptr()),
    )
    return y


def _check(weight: Weight4, bias: Tensor | None = None) -> None:
    """Refuse what C cannot read, or would read past the end of."""
    w = weight
    for name, t in (("codes", w.codes), ("bias", bias)):
        if t is not None and not t.is_cpu:
            raise ValueError(f"{name} must be on the CPU, as x is; got {t.device}")
    numel = w.out_features * w.in_features
    check_stored(w.codes, w.scales, w.table, w.block_size, w.nested, numel)
    if w.nested is not None and w.scales.dtype != torch.uint8:
        raise ValueError(f"nested scales must be uint8; got {w.scales.dtype}")
