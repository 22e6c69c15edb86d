"""How other programs read a LoRA adapter in PEFT's format: which keys, which options, which scale.

Each reader takes adapter_config.json and the tensors, as the program would, and gives for every
module the pair it would apply and the factor before it, or says why the program refuses. Comparing
the products with the true ones shows what a program misreads in silence.

Read in their sources (which are not run here):

* PEFT 0.21.2   s = alpha / r or alpha / sqrt(r), r and alpha by pattern
* vLLM          `vllm/lora/peft_helper.py` at e745baf, `lora_model.py` at 532cc25, `utils.py` at
                0fd1570: one r, one alpha, use_rslora read, patterns not; any key but A's and B's
                is refused, as are DoRA, biases and modules_to_save
* llama.cpp     `convert_lora_to_gguf.py` at 0b03ada: lora_alpha alone goes into the file, and the
                runtime divides it by the rank of B; use_rslora and alpha_pattern are not read
* SGLang        `python/sglang/srt/lora/lora.py` of early 2026: one alpha / r, no use_rslora, no
                patterns; A of q, k, v and of gate, up are stacked, so that they need one rank;
                keys it does not know are dropped

What a program's models make of module names is not told here: vLLM takes the modules that the
model's class names, llama.cpp those of the architectures it converts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_core.checkpoint.lora_options import PEFT_PREFIX
from lora_core.checkpoint.lora_scaling import stated_scalings
from lora_core.targets import nearest

__all__ = ["LOADERS", "Applied", "Refused", "check_pair", "loader_named"]

_ENDS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}
_COPY = ".base_layer.weight"
_EMBEDDINGS = (".embed_tokens" + _COPY, ".lm_head" + _COPY)  # vLLM's own list


class Refused(ValueError):
    """A program does not load the adapter; the message is the reason."""


@dataclass(frozen=True)
class Applied:
    """What a program applies at one module: `scale` · up · down.

    Attributes:
        down: A as it lies in the file.
        up: B, likewise.
        scale: the factor.
    """

    down: Tensor
    up: Tensor
    scale: float


Reader = Callable[[Mapping[str, Any], Mapping[str, Tensor]], dict[str, Applied]]


def read_as_peft(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Applied]:
    """Read as PEFT does, which is what the files mean.

    Args:
        raw: adapter_config.json.
        tensors: by key.

    Returns:
        {module: what is applied}; magnitudes, biases and whole modules are left out.

    Raises:
        ValueError: what PEFT would not load either: half a pair, other ranks than A's, a value of
            another type or out of range; and stacked experts, which are no single matrices.
    """
    if raw.get("target_parameters"):
        raise ValueError(
            "target_parameters: pairs of stacked experts, and plain layers written with them, have "
            "no exported or baked form; merge the adapter (`lora-core merge`)"
        )
    pairs = _pairs(tensors)[0]
    scalings = stated_scalings(raw, {site: len(down) for site, (down, _) in pairs.items()})
    return {site: Applied(down, up, scalings[site]) for site, (down, up) in pairs.items()}


def read_as_vllm(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Applied]:
    """Read as vLLM does; Refused as it refuses. `max_lora_rank` is the server's own setting."""
    if raw.get("modules_to_save"):
        raise Refused("vLLM supports no modules_to_save")
    if raw.get("use_dora"):
        raise Refused("vLLM supports no DoRA")
    if raw.get("bias", "none") != "none":
        raise Refused("vLLM supports no trained biases")
    pairs, rest = _pairs(tensors)
    if other := [key for key in rest if not key.endswith(_EMBEDDINGS)]:
        raise Refused(f"vLLM refuses the key {other[0]!r}")
    r, alpha = _needed("vLLM", raw, "r"), _needed("vLLM", raw, "lora_alpha")
    scale = alpha / math.sqrt(r) if raw.get("use_rslora") else alpha / r
    _no_convolutions("vLLM", pairs)
    for site, (down, _) in pairs.items():
        if len(down) > r:
            raise Refused(f"vLLM holds pairs of rank up to r = {r}; at {site!r} it is {len(down)}")
    return {site: Applied(down, up, scale) for site, (down, up) in pairs.items()}


def read_as_llama_cpp(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Applied]:
    """Read as convert_lora_to_gguf.py does; Refused as it stops."""
    pairs, rest = _pairs(tensors)
    for key in rest:
        if key.endswith(_COPY):
            continue
        if "_layernorm" in key or ".norm" in key:
            raise Refused(f"llama.cpp takes {key!r} for the norm's own weight")
        raise Refused(f"llama.cpp's convert_lora_to_gguf.py stops at the key {key!r}")
    _no_convolutions("llama.cpp", pairs)
    alpha = _needed("llama.cpp", raw, "lora_alpha")
    return {site: Applied(a, b, alpha / b.shape[-1]) for site, (a, b) in pairs.items()}


def read_as_sglang(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Applied]:
    """Read as SGLang does; Refused where it fails or would drop what matters."""
    if raw.get("use_dora"):
        raise Refused("SGLang supports no DoRA")
    pairs, rest = _pairs(tensors)
    if other := [key for key in rest if not key.endswith(_COPY)]:
        raise Refused(f"SGLang drops the key {other[0]!r} in silence")
    r, alpha = _needed("SGLang", raw, "r"), _needed("SGLang", raw, "lora_alpha")
    _no_convolutions("SGLang", pairs)
    for site, (down, _) in pairs.items():
        if len(down) != r:
            raise Refused(
                f"SGLang stacks pairs of one rank, r = {r}; at {site!r} it is {len(down)}"
            )
    return {site: Applied(a, b, alpha / r) for site, (a, b) in pairs.items()}


LOADERS: dict[str, Reader] = {
    "peft": read_as_peft,
    "vllm": read_as_vllm,
    "llama.cpp": read_as_llama_cpp,
    "sglang": read_as_sglang,
}


def loader_named(name: str) -> Reader:
    """A program's reader; ValueError with the nearest names if there is none."""
    if name not in LOADERS:
        raise ValueError(f"no loader {name!r} is known; {nearest(name, list(LOADERS))}")
    return LOADERS[name]


def _needed(program: str, raw: Mapping[str, Any], key: str) -> Any:
    if key not in raw:
        raise Refused(f"{program} needs {key} in the configuration, and does not take PEFT's own")
    return raw[key]


def check_pair(site: str, down: Tensor, up: Tensor) -> None:
    """Refuse tensors that no A and B are; ValueError names the module."""
    sound = all(t.dim() > 1 and t.numel() and t.is_floating_point() for t in (down, up))
    if not sound or len(down) % up.shape[1]:
        told = " and ".join(f"{tuple(t.shape)} {t.dtype}" for t in (down, up))
        raise ValueError(f"A and B of {site!r} are no pair: {told}")


def _no_convolutions(program: str, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for site, (down, _) in pairs.items():
        if down.dim() != 2:
            raise Refused(f"{program} has no LoRA for the convolution {site!r}")


def _pairs(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """{module: (A, B)} and the keys that are neither; ValueError if A and B are no pair."""
    found: dict[str, dict[str, Tensor]] = {}
    rest = []
    for key, tensor in tensors.items():
        end = next((end for end in _ENDS if key.endswith(end)), None)
        if end is None:
            rest.append(key)
            continue
        site = key.removesuffix(end).removeprefix(PEFT_PREFIX)
        found.setdefault(site, {})[_ENDS[end]] = tensor
    for site, both in found.items():
        if len(both) < 2:
            raise ValueError(f"{site!r} has only one of A and B")
        check_pair(site, both["A"], both["B"])
    return {site: (both["A"], both["B"]) for site, both in found.items()}, rest
