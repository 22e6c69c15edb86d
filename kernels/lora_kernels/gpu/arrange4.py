"""A second copy of the codes in the order in which tensor cores read them.

Why: `mma` keeps a 16-row operand spread over the 32 lanes of a warp: lane 4 g + j holds, of rows g
and g + 8, every fourth group of columns. From the stored codes, row after row, a lane therefore
loads 8 bytes twice from rows that are K / 2 bytes apart, and a warp's load touches 8 lines of the
cache. Arranged, what a warp needs for 16 rows and 64 columns is one run of 512 bytes, and a lane's
share 16 of them: half the load instructions, and as few cache lines as there can be.

    arranged[N / 16][K / 64][g 0…7][j 0…3][h 0, 1][8 bytes]
        = codes of row 16 n + 8 h + g, columns 64 k + 16 j … 64 k + 16 j + 15

The 8 bytes are 8 stored bytes in their order. Which columns meet in one `mma` is free, as long as x
is read in the same order: a lane's 16 columns stand for the groups that `mma` calls 4 j … 4 j + 3,
16 + 4 j …, or for 16-bit operands 2 j, 2 j + 1, 2 j + 8, 2 j + 9. One format serves all widths.

Known fast 4-bit kernels (Marlin, Machete, FLUTE) store weights only in such an order, made for one
kernel. Here it is an extra that can be dropped or remade at any time and is never saved; the price
is a second N K / 2 bytes on the device for whoever asks for it.
"""

from torch import Tensor

from lora_kernels.operands import Weight4

__all__ = ["COLUMNS", "ROWS", "arrange", "restore"]

ROWS, COLUMNS = 16, 64  # of a group of 512 bytes


def arrange(weight: Weight4) -> Tensor | None:
    """Copy the codes of a weight into the order above.

    Args:
        weight: the codes of W (N, K).

    Returns:
        uint8 (N K / 2,), or None if N is no multiple of 16 or K none of 64.
    """
    n, k = weight.out_features, weight.in_features
    if n % ROWS or k % COLUMNS:
        return None
    codes = weight.codes.reshape(n // ROWS, 2, 8, k // COLUMNS, 4, 8)  # n, h, g, k, j, byte
    return codes.permute(0, 3, 2, 4, 1, 5).reshape(-1)


def restore(arranged: Tensor, out_features: int, in_features: int) -> Tensor:
    """Undo `arrange`.

    Args:
        arranged: what `arrange` returned.
        out_features: N.
        in_features: K.

    Returns:
        uint8 (N K / 2,), the codes row by row.

    Raises:
        ValueError: sizes that `arrange` does not take, or another number of bytes.
    """
    n, k = out_features, in_features
    if n % ROWS or k % COLUMNS or arranged.numel() != n * k // 2:
        raise ValueError(
            f"an arranged copy has N K / 2 bytes for N a multiple of {ROWS} and K of {COLUMNS}; "
            f"got {arranged.numel()} bytes for N = {n}, K = {k}"
        )
    codes = arranged.reshape(n // ROWS, k // COLUMNS, 8, 4, 2, 8)  # n, k, g, j, h, byte
    return codes.permute(0, 4, 2, 1, 3, 5).reshape(-1)
