"""Baked scaling: a LoRA whose factors alone are the update, so that no reader can scale it wrongly.

    s·B A  ->  B' A',  B' = fl(s·B), r' = max r, alpha' = r': every reader's factor is r'/r' = 1

Ranks below r' are filled up with rows of zeros in A and columns of zeros in B, since a reader that
knows one rank alone takes it for all. s·B is rounded to float32 once, which is all that is lost:

    |B' A' - s·B A| <= u |s·B| |A|,  u = 2⁻²⁴          element by element, products of moduli

and that bound is what `check` holds each reader's own product to, in float64.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.checkpoint.loaders import Applied, Reader, read_as_peft
from lora_core.checkpoint.lora_options import PEFT_PREFIX

__all__ = ["baked", "check"]

_ROUNDING = 2.0**-24
_SMALLEST = 2.0**-126  # below it a float32 has fewer digits


def baked(
    record: Mapping[str, Any], tensors: Mapping[str, Tensor], rank: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fold every pair's scaling into B, and give all one rank.

    Args:
        record: adapter_config.json.
        tensors: by key; DoRA's lengths, B's biases and whole modules among them.
        rank: r'; None: the largest there is.

    Returns:
        The same for the baked adapter, tensors in float32.

    Raises:
        ValueError: `rank` is below the largest, or numbers leave float32's range.
    """
    pairs = read_as_peft(record, tensors)
    ranks = {site: len(pair.down) for site, pair in pairs.items()}
    largest = max(ranks, key=ranks.__getitem__)
    r = ranks[largest] if rank is None else rank
    if r < ranks[largest]:
        raise ValueError(
            f"rank {rank} is below the {ranks[largest]} of {largest!r}: leave it out, or convert "
            f"with --to-lora {rank} (to_lora={rank}), which has an error"
        )
    new = dict(tensors)
    for site, pair in pairs.items():
        down, up = _padded(site, pair, r)
        first = f"{PEFT_PREFIX}{site}."
        embedding = f"{first}lora_embedding_A" in tensors
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("A", "B")
        for name, tensor in zip(names, (down, up), strict=True):
            key = first + (name if embedding else f"lora_{name}.weight")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{key!r} with its scaling {pair.scale:g} leaves float32's range")
            new[key] = tensor
        if (bias := f"{first}lora_B.bias") in tensors:
            new[bias] = (tensors[bias].double() * pair.scale).float()
    target = record.get("target_modules")
    # an expression that names the pairs stands because their names are the ends of others'
    stays = isinstance(target, list) or target == "|".join(map(re.escape, sorted(pairs)))
    scaling = {"r": r, "lora_alpha": r, "rank_pattern": {}, "alpha_pattern": {}}
    scaling |= {"use_rslora": False, "init_lora_weights": True}
    scaling |= {"target_modules": target if stays else sorted(pairs)}
    return {**record, **scaling}, new


def _padded(site: str, pair: Applied, r: int) -> tuple[Tensor, Tensor]:
    """A and s·B of rank r, float32; the r / g rows of each group of a convolution stay together."""
    groups = len(pair.down) // pair.up.shape[1]
    if r % groups:
        raise ValueError(f"rank {r} is no multiple of the {groups} groups of {site!r}")
    more = (r - len(pair.down)) // groups
    down = pair.down.float()
    down = down.reshape(groups, -1, *down.shape[1:])  # (g, r/g, …)
    down = F.pad(down, (0, 0) * (down.dim() - 2) + (0, more))
    up = (pair.up.double() * pair.scale).float()  # (N, r/g, …)
    up = F.pad(up, (0, 0) * (up.dim() - 2) + (0, more))
    return down.flatten(0, 1).contiguous(), up.contiguous()


def check(
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    true: Mapping[str, Applied],
    read: Reader,
) -> float:
    """Compare what a reader makes of a baked adapter with what the adapter is.

    Args:
        record: adapter_config.json of the baked one.
        tensors: its tensors.
        true: what the adapter applies at each module.
        read: the reader.

    Returns:
        The largest |ΔW' - ΔW| / |ΔW| over the modules, Frobenius norms.

    Raises:
        ValueError: a module is missing, or an element is off by more than the one rounding.
        Refused: the reader refuses the adapter.
    """
    got = read(record, tensors)
    worst = 0.0
    if odd := sorted(got.keys() ^ true.keys()):
        raise ValueError(f"{odd[0]!r} is in the adapter or in what is read of it, not in both")
    for site, pair in true.items():
        wanted, size = product(pair), product(pair, moduli=True)
        difference = (product(got[site]) - wanted).abs()
        # products in float64 round too, by 2^-53 for each of r terms
        bound = size * (_ROUNDING + 2 * (len(pair.down) + 2) * 2.0**-53)
        bound = bound + product(Applied(pair.down, torch.ones_like(pair.up), _SMALLEST), True)
        if not bool((difference <= bound).all()):
            raise ValueError(
                f"the update read at {site!r} is off by {float(difference.max()):.3g} of "
                f"{float(wanted.abs().max()):.3g}"
            )
        norm = float(wanted.norm())
        worst = max(worst, float(difference.norm()) / norm if norm else 0.0)
    return worst


def product(pair: Applied, moduli: bool = False) -> Tensor:
    """scale · B A as a matrix, (N, K) in float64, or the product of the moduli."""
    groups = len(pair.down) // pair.up.shape[1]
    down = pair.down.double().reshape(groups, len(pair.down) // groups, -1)  # (g, r/g, K)
    up = pair.up.double().reshape(groups, len(pair.up) // groups, -1)  # (g, N/g, r/g)
    if moduli:
        down, up = down.abs(), up.abs()
    scale = math.fabs(pair.scale) if moduli else pair.scale
    return ((up * scale) @ down).flatten(0, 1)
