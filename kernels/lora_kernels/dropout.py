"""Dropout that stores nothing: the mask is drawn again wherever it is needed.

PyTorch's dropout keeps a mask of a byte an element and the dropped copy of x, three bytes a number
beside the two of a bfloat16 x, for each adapted layer. Here an element's fate is a function of a
seed and of where the element stands, so that backward, and each kernel that reads x, works it out
again. What is saved is the seed, 8 bytes.

The function is Philox 4x32-10, a counter-based generator: ten rounds of two multiplications turn a
key and a counter into 128 random bits. Of x (M, K) the element in row i and column k has

    key      seed mod 2^32, seed div 2^32
    counter  k div 8, i mod 2^32, i div 2^32, 0
    number   the (k mod 8)-th 16 bits of the result, the low half of each of its four words first

and is dropped when its number is below t = round(p 2^16). So one draw serves eight neighbours,
which is some 12 instructions an element, and p is a multiple of 2^-16. Eight never straddle two
rows, so that a tile of any kernel draws for itself, whatever K is.

`drop` puts zeros and does not scale what is left: whoever multiplies by the result has a factor
anyway, and takes 1 / (1 - t 2^-16) into that. No element is rounded then, and the factor is exact
to float32, where PyTorch multiplies each 16-bit element and rounds it. A dropped element is 0 even
if it was infinite or NaN.

The same bits come from PyTorch (this file, on 64-bit integers), from C (cpu/dropout.c) and from
Triton (gpu/dropout.py). The price beside a stored mask: x is read once more in backward, which
recomputes the draws, a few percent of the products that stand beside it.

Ref: Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, section 3.3 (Philox);
Srivastava et al. 2014, dropout.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lora_kernels.dispatch import backend_for, device_of

__all__ = ["check_dropout", "draw_seed", "drop", "drop_rows", "kept_scale", "philox", "threshold"]

BACKENDS = ("reference", "native", "triton")
LEVELS = 1 << 16  # of a probability
GROUP = 8  # neighbours in a row that share a draw
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what is added to the key after each round
_LOW = 0xFFFFFFFF

torch.library.define("lora_kernels::drop", "(Tensor x, Tensor seed, float p) -> Tensor")


def drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Put zeros in the place of dropped elements; the others stay as they are, unscaled.

    Args:
        x: (..., K), floating-point, of 16 bits or more.
        seed: int64 (1,) on the device of x, as `draw_seed` makes it.
        p: probability of dropping an element, in [0, 1); taken to the nearest multiple of 2^-16.

    Returns:
        Like x, contiguous, differentiable; times `kept_scale(p)` it is x in the mean.

    Raises:
        TypeError: x is not floating-point, or of 8 bits.
        ValueError: p out of range, or a seed of another kind or on another device.
    """
    check_dropout(p, seed, x)
    return torch.ops.lora_kernels.drop(x, seed, p)


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed from the device's own generator, which checkpoints and recomputation restore.

    Args:
        device: of x; on a GPU nothing waits for the number.

    Returns:
        int64 (1,).
    """
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """Numbers below which an element is dropped, of 65536.

    Args:
        p: probability of dropping.

    Returns:
        The nearest integer to 65536 p, at most 65535.
    """
    return min(round(p * LEVELS), LEVELS - 1)


def kept_scale(p: float) -> float:
    """The factor that makes up for what is dropped, 1 / (1 - p) of the p that is applied.

    Args:
        p: probability of dropping.

    Returns:
        At least 1.
    """
    return LEVELS / (LEVELS - threshold(p))


def check_dropout(p: float, seed: Tensor | None, x: Tensor) -> None:
    """Refuse a probability, a seed or an x that cannot be used; the error says which."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {p!r}")
    if p and not (x.is_floating_point() and x.element_size() > 1):
        raise TypeError(f"dropout takes floating-point numbers of 16 bits or more; got {x.dtype}")
    if seed is None:
        return
    if seed.dtype != torch.int64 or seed.shape != (1,):
        raise ValueError(f"seed must be int64 (1,); got {seed.dtype} {tuple(seed.shape)}")
    if seed.device != x.device:
        raise ValueError(f"seed must be on the device of x, {x.device}; got {seed.device}")


# --- the definition ------------------------------------------------------------------------------


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10.

    Args:
        counter: four tensors of 32-bit numbers held in int64, of shapes that broadcast.
        key: two, likewise.

    Returns:
        Four tensors of 32-bit numbers held in int64.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # the products need all 64 bits: what overflows into the sign is masked off again
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 32 & _LOW) ^ c1 ^ k0, b & _LOW, (a >> 32 & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
    return c0, c1, c2, c3


def drop_reference(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """The definition: draw for every group of eight, compare, select.

    Args:
        x: (M, K).
        seed: int64 (1,).
        p: probability of dropping.

    Returns:
        (M, K), zeros where dropped.
    """
    m, k = x.shape
    row = torch.arange(m, device=x.device)[:, None]  # (M, 1)
    group = torch.arange(-(-k // GROUP), device=x.device)[None]  # (1, G)
    counter = (group, row & _LOW, row >> 32, torch.zeros_like(row))
    words = philox(counter, (seed & _LOW, seed >> 32 & _LOW))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    numbers = torch.stack(halves, dim=2)  # (M, G, 8)
    kept = numbers.reshape(m, math.prod(numbers.shape[1:]))[:, :k] >= threshold(p)
    return torch.where(kept, x, 0)


# --- the operator --------------------------------------------------------------------------------


def drop_rows(x: Tensor, seed: Tensor, p: float, in_place: bool = False) -> Tensor:
    """`drop` of rows, for use inside an operator: no derivative, no checks.

    Args:
        x: (M, K).
        seed: int64 (1,).
        p: probability of dropping.
        in_place: write into x, which must be the caller's own, contiguous and saved by nobody.

    Returns:
        (M, K), contiguous; x itself if in place.
    """
    backend = backend_for(x, BACKENDS)
    if backend == "reference":
        dropped = drop_reference(x, seed, p).contiguous()
        return x.copy_(dropped) if in_place else dropped
    if backend == "native":
        from lora_kernels.cpu import dropout as cpu

        return cpu.drop(x, seed, threshold(p), in_place)
    from lora_kernels.gpu import dropout as gpu

    return gpu.drop(x, seed, threshold(p), in_place)


@torch.library.impl("lora_kernels::drop", "default")
def _drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    with device_of(x):
        return drop_rows(rows, seed, p).view(x.shape)


def _fake(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.p = inputs[2]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.lora_kernels.drop(dy, *ctx.saved_tensors, ctx.p), None, None


torch.library.register_fake("lora_kernels::drop", _fake)
torch.library.register_autograd("lora_kernels::drop", _backward, setup_context=_save)
