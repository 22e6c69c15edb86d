r"""Starts of a LoRA pair that are computed from the weight: PiSSA, OLoRA, LoftQ.

    pissa    W = U S Vᵀ;  s·B A = U_r S_r V_rᵀ: the r largest singular directions are trained
    olora    W = Q R;     B = Q[:, :r], A = R[:r]
    loftq    repeat: Q = quantize(W - s·B A), then s·B A = best rank r of W - dequantize(Q)

The papers then train y = (W - s·B0 A0) x + s·B A x with the residual in the base's place. Here the
base stays and the start is subtracted beside it, y = W x + s (B A - B0 A0) x: the same function and
the same gradients, without rounding W - s·B0 A0 to 16 bits, without changing the base under other
adapters, and what is saved is a plain LoRA of rank 2r for the plain base. It costs a second frozen
pair. LoftQ is about the quantized base itself, so there the base is replaced: by Q, which is left
when the adapter is deleted or unloaded.

PEFT leaves s out of LoftQ, so that its start is right for alpha = r alone; here s·B A is the fit.

Ref: Meng et al. 2024, PiSSA, arXiv:2404.02948, equations 2 to 4; Büyükakyüz 2024, OLoRA,
arXiv:2406.01775, section 3; Li et al. 2023, LoftQ, arXiv:2310.08659, algorithm 1.
"""

import math
import re

import torch
from torch import Tensor, nn

from lora_core.adapters.layers import dense_weight, is_linear
from lora_core.adapters.lora import LoRA
from lora_core.quant import NF4Linear

__all__ = ["check_start", "loftq", "olora", "pissa", "start_pair"]

STARTS = ("kaiming", "gaussian", "pissa", "pissa_niter_<n>", "olora", "loftq")
_NITER = re.compile(r"pissa_niter_(\d+)")


def check_start(init: str, loftq_steps: int) -> None:
    """Check the name of a start; ValueError lists the known ones."""
    if init not in STARTS[:3] + STARTS[4:] and not (
        isinstance(init, str) and _NITER.fullmatch(init)
    ):
        raise ValueError(f"init must be one of {', '.join(map(repr, STARTS))}, got {init!r}")
    if not isinstance(loftq_steps, int) or isinstance(loftq_steps, bool) or loftq_steps < 1:
        raise ValueError(f"loftq_steps must be a whole number of at least 1, got {loftq_steps!r}")


def pissa(
    weight: Tensor, r: int, scaling: float, niter: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the pair whose product is the best approximation of rank r.

    Args:
        weight: (N, K) floating-point.
        r: rank, at most min(N, K).
        scaling: s, above 0.
        niter: power iterations of a randomized SVD, many times faster than the whole; None: whole.

    Returns:
        A (r, K) and B (N, r) with s·B A = U_r S_r V_rᵀ, each with half of S_r.
    """
    if niter is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, q=r, niter=niter)
        vh = v.t()
    root = (s[:r] / scaling).sqrt()  # (r,)
    return root[:, None] * vh[:r], u[:, :r] * root


def olora(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A = R[:r] and B = Q[:, :r] of the QR decomposition of a weight (N, K)."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]


def loftq(
    weight: Tensor, bias: Tensor | None, r: int, scaling: float, steps: int = 1
) -> tuple[NF4Linear, Tensor, Tensor]:
    """Fit a 4-bit weight and a pair to a weight, in turn.

    Args:
        weight: (N, K) floating-point.
        bias: (N,) or None, for the layer.
        r: rank.
        scaling: s.
        steps: rounds.

    Returns:
        The 4-bit layer Q (NF4, blocks of 64, double quantization), A (r, K) and B (N, r) of the
        best round, so that |W - Q - s·B A| never grows with the rounds, which by themselves
        promise no such thing; after one it is at most |W - quantize(W)|.
    """
    fit, least = torch.zeros_like(weight), math.inf
    for _ in range(steps):
        layer = NF4Linear.from_tensor(weight - fit, bias)
        rest = weight - layer.dense_weight(weight.dtype)
        down, up = pissa(rest, r, scaling)
        fit = scaling * (up @ down)
        if (error := float((rest - fit).norm())) < least:
            least, best = error, (layer, down, up)
    return best


@torch.no_grad()
def start_pair(pair: LoRA, base: nn.Module, init: str, loftq_steps: int, name: str) -> None:
    """Set a new pair to the start of its name; "kaiming" and "gaussian" are the pair's own.

    Args:
        pair: just made for the layer.
        base: the layer; not changed. With "loftq" what is to take its place goes to
            `pair.new_base`.
        init: see `check_start`.
        loftq_steps: rounds of "loftq".
        name: of the layer, for messages.

    Raises:
        ValueError: a rank above the layer's size, a scaling that is not positive, a layer in
            groups, or "loftq" on what is no dense linear layer.
    """
    if init in ("kaiming", "gaussian"):
        return
    rows, columns = pair.form.out_features, pair.form.in_features
    least = min(columns, *(pair.parts or (rows,)))
    if pair.r > least:
        raise ValueError(f"init={init!r}: r = {pair.r} is above the size of {name!r}, {least}")
    if not pair.scaling > 0 or not math.isfinite(pair.scaling):
        raise ValueError(f"init={init!r} needs alpha above 0; at {name!r} it is {pair.alpha}")
    if pair.form.groups > 1:
        raise ValueError(f"init={init!r} cannot be used for {name!r}, a convolution in groups")
    if init == "loftq":
        _start_loftq(pair, base, loftq_steps, name)
        return
    weight = pair.form.matrix(dense_weight(base).float())  # (N, K)
    sizes = list(pair.parts or (rows,))
    pieces = [_decomposed(part, pair, init) for part in torch.split(weight, sizes)]
    pair.start_at(torch.cat([down for down, _ in pieces]), torch.cat([up for _, up in pieces]))


def _decomposed(weight: Tensor, pair: LoRA, init: str) -> tuple[Tensor, Tensor]:
    if init == "olora":
        return olora(weight, pair.r)
    named = _NITER.fullmatch(init)
    return pissa(weight, pair.r, pair.scaling, None if named is None else int(named[1]))


def _start_loftq(pair: LoRA, base: nn.Module, steps: int, name: str) -> None:
    if not is_linear(base) or not isinstance(getattr(base, "weight", None), Tensor) or pair.parts:
        raise ValueError(
            f"init='loftq' needs a dense linear layer in one part, which it quantizes itself; "
            f"{name!r} is {type(base).__name__}: load the model without quantize="
        )
    bias = getattr(base, "bias", None)
    layer, down, up = loftq(dense_weight(base).float(), bias, pair.r, pair.scaling, steps)
    pair.start_at(down, up, subtract=False)
    pair.new_base = (layer.train(base.training),)
