"""LoRA's part beside a product on a GPU: low_rank.py by the kernels of lora4.py and outer4.py.

16-bit x alone; float32 and float64 take plain PyTorch.
"""

from torch import Tensor

from lora_kernels.dropout import threshold
from lora_kernels.gpu import lora4, outer4
from lora_kernels.gpu.finish4 import Update
from lora_kernels.gpu.lora_rows import Dropout
from lora_kernels.low_rank import LowRank

__all__ = ["add_update", "as_update", "gradients", "update"]


def as_update(lora: LowRank) -> Update:
    """What the kernels read; parameters are float32 and contiguous, so nothing is copied."""
    down, up, factor = (t.float().contiguous() for t in (lora.down, lora.up, lora.factor))
    rows = None if lora.rows is None else lora.rows.contiguous()
    return Update(down, up, factor, rows)


def update(x: Tensor, lora: LowRank) -> Tensor:
    """`s f (D(x) Aᵀ) Bᵀ`.

    Args:
        x: (M, K), 16-bit.
        lora: the low-rank part.

    Returns:
        (M, N) in the dtype of x.
    """
    down, up, factor, rows = as_update(lora)
    h = lora4.shrink(x, down, rows, dropout=_dropout(lora))
    return lora4.expand(h, up, x.dtype, rows, factor)


def add_update(y: Tensor, x: Tensor, lora: LowRank, in_place: bool) -> Tensor:
    """`y + update(x)`, rounded once.

    Args:
        y: (M, N), in the dtype of x, contiguous.
        x: (M, K), 16-bit.
        lora: the low-rank part.
        in_place: write into y, which must be the caller's own and saved by nobody.

    Returns:
        (M, N).
    """
    down, up, factor, rows = as_update(lora)
    h = lora4.shrink(x, down, rows, dropout=_dropout(lora))
    return lora4.add(y, h, up, rows, factor, in_place=in_place)


def gradients(
    dy: Tensor, x: Tensor, lora: LowRank, wants: tuple[bool, bool], dx: Tensor | None = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """As low_rank's `gradients`; its part of dx is added to `dx`, in place, if there is one.

    Args:
        dy: (M, N), in the dtype of x.
        x: (M, K), 16-bit.
        lora: the low-rank part.
        wants: whether dx is wanted, and whether dA and dB are.
        dx: (M, K) of the base's product, the caller's own; or None.

    Returns:
        (M, K) or None, and dA and dB in the shapes and dtypes of A and B; empty if not wanted.
    """
    down, up, factor, rows = as_update(lora)
    dropout, across = _dropout(lora), down.transpose(1, 2)
    dh = lora4.shrink(dy, up.transpose(1, 2), rows, factor)  # (M, r)
    ddown, dup = lora.down.new_empty(0), lora.up.new_empty(0)
    if wants[0] and dx is None:
        dx = lora4.expand(dh, across, x.dtype, rows, dropout=dropout)
    elif wants[0] and dx is not None:
        dx = lora4.add(dx, dh, across, rows, dropout=dropout, in_place=True)
    if wants[1]:
        adapters = len(down)
        h = lora4.shrink(x, down, rows, dropout=dropout)  # (M, r)
        ddown = outer4.outer(dh, x, rows, adapters, dropout=dropout).to(lora.down.dtype)
        dup = outer4.outer(h, dy, rows, adapters, factor, transposed=True).to(lora.up.dtype)
    return dx, ddown, dup


def _dropout(lora: LowRank) -> Dropout | None:
    return None if lora.seed is None else Dropout(lora.seed, threshold(lora.dropout))
