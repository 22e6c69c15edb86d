"""AdamW whose two moments are kept in 8 bits: one step over many tensors.

Why: AdamW in float32 keeps 8 bytes a parameter and moves 28 a step. With codes of one byte and two
float32 units a block of 256 it keeps 2.03 and moves 16. A step is one call whatever the number of
tensors, so nothing is launched, waited for or allocated parameter by parameter.

Format. Both moments are powers of whole numbers in units of their block:

    m = c |c| u_m           c int8, -127 … 127, u_m = max |m| / 127²
    sqrt(v) = c⁴ u_s        c uint8, 0 … 255, u_s = max sqrt(v) / 255⁴; 0 for v = 0 alone

A code costs one or two square roots to find, which are exact everywhere, and no table to read:
PyTorch, C and Triton give the same bits. m is a numerator and its error counts in the absolute:
half a step is 0.8 % of it at the block's largest, 2.5 % at a tenth of that, and it reaches down to
6e-5. sqrt(v) is a divisor and its error counts relatively: 0.8 %, 1.4 % at a tenth, 2.5 % at a
hundredth, 8 % at 1e-4, and it reaches down to 2e-10.

Differences from bitsandbytes, whose codes index a table of decades (signed for m, unsigned for v):

* The root is coded, not v. The update divides by sqrt(v), and v has twice the decades: a table that
  is nearest for v turns what is 1e-7 of the largest to 0, and then m / (0 + eps) is an explosion.
  Here whatever is above 0 gets at least code 1: the update of such an element is damped, at worst
  stopped. Linear codes for v, which have the fault at its largest, end a run at more than twice the
  loss that it should reach (tests/convergence/test_adamw8.py).
* sqrt(v) is rounded up or down at random, in proportion. A step changes v by a thousandth
  (1 - beta2) where codes are percents apart: rounded to the nearest, v would never move until one
  squared gradient were tens of v, so that an element whose gradients have calmed down beside a
  neighbour whose have not would keep its old v for ever. The random number is a hash of the
  element's index and the step's number, so a step is a function of its arguments: resuming is
  exact, and every backend rounds alike. m moves by a tenth a step and is rounded to the nearest.
  The price is a jitter: with beta2 = 0.999 sqrt(v) wanders by about sqrt(2.8 / c), 10 % to 20 %,
  and as its inverse is what counts, steps are about 1 % longer on average. Where gradients have no
  noise at all, bitsandbytes' nearest codes follow float32 more closely (tests/train/test_optim.py).

Measured on a small decoder with LoRA, 150 steps in which the loss halves, one moment at a time,
largest and mean relative difference of the loss from float32 state: m by the table of decades
0.34 %, +0.00 %, by squares 0.22 %, +0.00 %; v by the table 0.19 %, -0.06 %, its root by fourth
powers to the nearest 0.24 %, -0.07 %, at random 0.15 %, -0.02 %. Both: the tables 0.41 %, this
format 0.22 %. (Squares for the root do as well there, but at 1e-4 of the largest their jitter is as
large as the root, and such elements run away at several times their speed.)

The definition works on flat pieces of at most `PIECE` elements, into which the tensors are copied:
its temporaries are bounded and its operations do not grow with the number of tensors. C and Triton
read the tensors where they lie, from a table of addresses.

Ref: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2 (AdamW); Dettmers et al. 2022, 8-bit
Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2 (blocks, dynamic map).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.dispatch import backend_for, device_of

__all__ = ["BLOCK", "Moments8", "adamw8_", "adamw8_reference", "decode", "no_moments"]

BACKENDS = ("reference", "native", "triton")
BLOCK = 256  # elements that share a unit
PIECE = 1 << 20  # elements that the definition copies together
ROOT_TOP = 255
MEAN_SCALE, ROOT_SCALE = 1 / 127**2, 1 / 255**4  # a unit over the largest of its block
CODES = (torch.int8, torch.float32, torch.uint8, torch.float32)  # types of `Moments8`
TINY = torch.finfo(torch.float32).tiny  # the least unit

torch.library.define(
    "lora_kernels::adamw8_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] mean, Tensor(c!)[] mean_unit, "
    "Tensor(d!)[] root, Tensor(e!)[] root_unit, float[] factors, int seed) -> ()",
)


class Moments8(NamedTuple):
    """The moments of one parameter of n elements.

    Attributes:
        mean: codes of m, int8 (n,).
        mean_unit: float32 (ceil(n / 256),).
        root: codes of sqrt(v), uint8 (n,).
        root_unit: float32 (ceil(n / 256),).
    """

    mean: Tensor
    mean_unit: Tensor
    root: Tensor
    root_unit: Tensor


class Factors(NamedTuple):
    """The numbers of one step, worked out on the host in float64.

    Attributes:
        decay: 1 - lr · weight_decay.
        beta1: of the mean.
        rest1: 1 - beta1.
        beta2: of the mean square.
        rest2: 1 - beta2.
        correction: 1 / sqrt(1 - beta2^step).
        eps: under the root.
        rate: lr / (1 - beta1^step).
    """

    decay: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    correction: float
    eps: float
    rate: float


def no_moments(param: Tensor) -> Moments8:
    """The moments before the first step: zeros.

    Args:
        param: n elements on any device.

    Returns:
        They lie on its device.
    """
    n, device = param.numel(), param.device
    return Moments8(
        torch.zeros(n, dtype=torch.int8, device=device),
        torch.zeros(-(-n // BLOCK), dtype=torch.float32, device=device),
        torch.zeros(n, dtype=torch.uint8, device=device),
        torch.zeros(-(-n // BLOCK), dtype=torch.float32, device=device),
    )


def decode(moments: Moments8) -> tuple[Tensor, Tensor]:
    """What the codes stand for.

    Args:
        moments: of n elements.

    Returns:
        m and sqrt(v), float32 (n,).
    """
    n = moments.mean.numel()

    def spread(unit: Tensor) -> Tensor:
        return unit.repeat_interleave(BLOCK)[:n]

    mean, root = moments.mean.float(), moments.root.float()
    return (
        mean * mean.abs() * spread(moments.mean_unit),
        (root * root) * (root * root) * spread(moments.root_unit),
    )


@torch.no_grad()
def adamw8_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Moments8],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Update parameters and their moments in place, by AdamW with decoupled decay.

    Nothing waits for the device. Gradients have to be finite: a NaN spoils its block for good.

    Args:
        params: float32, contiguous, any shapes, all on one device.
        grads: float32, of the shapes of params.
        moments: theirs, as `no_moments` makes them.
        lr: learning rate.
        beta1: decay of the mean, in [0, 1).
        beta2: decay of the mean square, in [0, 1).
        eps: added to the root of the mean square.
        weight_decay: a step and unit of lr.
        step: this step's number, from 1: the bias correction, and which way roots are rounded.

    Raises:
        TypeError: a parameter or gradient that is not float32, or codes of another type.
        ValueError: lists of different lengths, tensors that do not fit or lie on several devices, a
            step below 1, or a forced backend that cannot run.

    Ref:
        Loshchilov & Hutter 2019, algorithm 2.
    """
    _check(params, grads, moments, step)
    if not params:
        return
    factors = Factors(
        decay=1 - lr * weight_decay,
        beta1=beta1,
        rest1=1 - beta1,
        beta2=beta2,
        rest2=1 - beta2,
        correction=1 / math.sqrt(1 - beta2**step),
        eps=eps,
        rate=lr / (1 - beta1**step),
    )
    states = [list(part) for part in zip(*moments, strict=True)]
    grads = [g.contiguous() for g in grads]
    torch.ops.lora_kernels.adamw8_(list(params), grads, *states, list(factors), step)
    if not torch.compiler.is_compiling():  # C and Triton write behind autograd's back
        torch.autograd.graph.increment_version(params)


def _check(
    params: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Moments8], step: int
) -> None:
    if step < 1:
        raise ValueError(f"steps are counted from 1; got {step}")
    if not len(params) == len(grads) == len(moments):
        raise ValueError(
            "each parameter needs a gradient and moments; got "
            f"{len(params)}, {len(grads)} and {len(moments)}"
        )
    for p, g, state in zip(params, grads, moments, strict=True):
        if p.dtype != torch.float32 or g.dtype != torch.float32:
            raise TypeError(
                f"parameters and gradients must be float32; got {p.dtype} and {g.dtype}"
            )
        if p.shape != g.shape or not p.is_contiguous():
            raise ValueError(
                f"a parameter must be contiguous and of its gradient's shape; got "
                f"{tuple(p.shape)} with strides {p.stride()} and {tuple(g.shape)}"
            )
        if tuple(t.dtype for t in state) != CODES:
            kinds = ", ".join(str(t.dtype).removeprefix("torch.") for t in state)
            raise TypeError(f"codes are int8 and uint8, units float32; got {kinds}")
        blocks = -(-p.numel() // BLOCK)
        if tuple(len(t) for t in state) != (p.numel(), blocks, p.numel(), blocks):
            raise ValueError(
                f"the moments of {p.numel()} elements need {p.numel()} codes and {blocks} units "
                f"each; got {[len(t) for t in state]}"
            )
        if not all(t.is_contiguous() for t in state):  # kernels go by their addresses
            raise ValueError("codes and units must be contiguous; call .contiguous() on them")
        if len({t.device for t in (params[0], p, g, *state)}) != 1:
            raise ValueError("parameters, gradients and moments must lie on one device")


def adamw8_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Moments8],
    factors: Factors,
    seed: int,
) -> None:
    """The definition, on flat copies of many tensors at a time.

    Args:
        params: as `adamw8_`.
        grads: as `adamw8_`, contiguous.
        moments: as `adamw8_`.
        factors: of the step.
        seed: of the rounding: the step's number.
    """
    states = [(p.view(-1), g.view(-1), *s) for p, g, s in zip(params, grads, moments, strict=True)]
    for piece in _pieces([p.numel() for p in params]):
        _update_piece([_views(states[i], a, b) for i, a, b in piece], piece, factors, seed)


def _pieces(sizes: Sequence[int]) -> list[list[tuple[int, int, int]]]:
    """Cut tensors into pieces of `PIECE` elements: lists of (tensor, first block, last block)."""
    pieces: list[list[tuple[int, int, int]]] = []
    room = 0
    for i, size in enumerate(sizes):
        first, blocks = 0, -(-size // BLOCK)
        while first < blocks:
            if not room:
                pieces.append([])
                room = PIECE // BLOCK
            taken = min(room, blocks - first)
            pieces[-1].append((i, first, first + taken))
            first, room = first + taken, room - taken
    return pieces


def _views(state: tuple[Tensor, ...], first: int, last: int) -> tuple[Tensor, ...]:
    """Blocks first to last of a parameter's p, g, mean, mean_unit, root and root_unit."""
    p, g, mean, mean_unit, root, root_unit = state
    some = slice(first * BLOCK, last * BLOCK)
    return p[some], g[some], mean[some], mean_unit[first:last], root[some], root_unit[first:last]


def _update_piece(
    views: list[tuple[Tensor, ...]],
    piece: list[tuple[int, int, int]],
    factors: Factors,
    seed: int,
) -> None:
    """Copy a piece's tensors together, update them, and copy them back."""
    p, g, mean, mean_unit, root, root_unit = (list(part) for part in zip(*views, strict=True))
    wide = [_gathered(part, piece, BLOCK) for part in (p, g, mean, root)]
    units = [_gathered(part, piece, 1) for part in (mean_unit, root_unit)]
    noise = _noise(piece, seed, p[0].device)
    updated = _updated((*wide, *units), noise, factors)
    for part, values in zip((p, mean, root), updated[:3], strict=True):
        torch._foreach_copy_(part, _cut(values, piece, part))
    for part, values in zip((mean_unit, root_unit), updated[3:], strict=True):
        torch._foreach_copy_(part, _cut(values, piece, part))


def _gathered(part: list[Tensor], piece: list[tuple[int, int, int]], width: int) -> Tensor:
    """Flat tensors below each other, (blocks, width); zeros fill a last block that is partial."""
    blocks = sum(last - first for _, first, last in piece)
    flat = torch.zeros((blocks, width), dtype=part[0].dtype, device=part[0].device)
    torch._foreach_copy_(_cut(flat, piece, part), part)
    return flat


def _cut(flat: Tensor, piece: list[tuple[int, int, int]], part: list[Tensor]) -> list[Tensor]:
    """The views into (blocks, width) that hold each tensor of a part."""
    sizes = [(last - first) * flat.shape[1] for _, first, last in piece]
    rows = torch.split(flat.view(-1), sizes)
    return [row[: t.numel()] for row, t in zip(rows, part, strict=True)]


def _noise(piece: list[tuple[int, int, int]], seed: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1), (blocks, 256): a hash of the element's index in its tensor and the seed.

    Ref: the 32-bit mixing function is C. Wellons' "lowbias32" (2018).
    """
    block = torch.cat([torch.arange(first, last) for _, first, last in piece])  # on the host
    block = block.to(device, non_blocking=True)
    x = block[:, None] * BLOCK + torch.arange(BLOCK, device=device)
    x = (x ^ (seed * 0x9E3779B9)) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    return (x >> 8).float() * 2.0**-24


def _updated(flat: tuple[Tensor, ...], noise: Tensor, f: Factors) -> tuple[Tensor, ...]:
    """The formulas, on blocks.

    Args:
        flat: p, g, codes of m and of the root, (blocks, 256); their units, (blocks, 1).
        noise: (blocks, 256), in [0, 1).
        f: of the step.

    Returns:
        All but g anew.
    """
    p, g, mean, root, mean_unit, root_unit = flat
    codes = mean.float()
    m = f.beta1 * (codes * codes.abs() * mean_unit) + f.rest1 * g
    squares = root.float() * root.float()
    s = squares * squares * root_unit
    s = _sqrt(f.beta2 * (s * s) + f.rest2 * (g * g))  # the new sqrt(v)
    p = p * f.decay - f.rate * (m / (s * f.correction + f.eps))

    mean_unit = _unit(m, MEAN_SCALE)
    codes = (_sqrt(m.abs() / mean_unit) + 0.5).to(torch.int8)
    mean = torch.where(m < 0, -codes, codes)
    root_unit = _unit(s, ROOT_SCALE)
    codes = (_sqrt(_sqrt(s / root_unit)) + noise).clamp(max=ROOT_TOP).to(torch.uint8)
    root = torch.where(s > 0, codes.clamp(min=1), codes)
    return p, mean, root, mean_unit, root_unit


def _sqrt(x: Tensor) -> Tensor:
    """The square root, rounded correctly: on a CPU PyTorch calls MKL's, which is off by a bit."""
    return x.double().sqrt().float() if x.device.type == "cpu" else x.sqrt()


def _unit(values: Tensor, scale: float) -> Tensor:
    """The unit of each block, from its largest magnitude."""
    return (values.abs().amax(1, keepdim=True) * scale).clamp(min=TINY)


def _native(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Moments8],
    factors: Factors,
    seed: int,
) -> None:
    from lora_kernels.cpu import adamw8 as cpu

    cpu.step(params, grads, moments, factors, seed)


def _triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Moments8],
    factors: Factors,
    seed: int,
) -> None:
    from lora_kernels.gpu import adamw8 as gpu

    gpu.step(params, grads, moments, factors, seed)


@torch.library.impl("lora_kernels::adamw8_", "default")
def _adamw8(
    params: list[Tensor],
    grads: list[Tensor],
    mean: list[Tensor],
    mean_unit: list[Tensor],
    root: list[Tensor],
    root_unit: list[Tensor],
    factors: list[float],
    seed: int,
) -> None:
    moments = [Moments8(*state) for state in zip(mean, mean_unit, root, root_unit, strict=True)]
    offered = {"reference": adamw8_reference, "native": _native, "triton": _triton}
    run = offered[backend_for(params[0], BACKENDS)]
    with device_of(params[0]):
        run(params, grads, moments, Factors(*factors), seed)


def _fake(*args: object) -> None:
    """Nothing is returned."""


torch.library.register_fake("lora_kernels::adamw8_", _fake)
