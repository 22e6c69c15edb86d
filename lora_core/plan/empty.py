"""A model with every shape and no memory: built by the library's own code, on fake tensors.

The steps are those of `lora-core finetune`: build on the meta device, make the linear layers 4-bit
as `load_model(quantize=…)` does, add the adapter. What a plan counts is then what a run would make,
by the same rules: which layers stay dense, how codes and scales are laid out, which targets match.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.models import CausalLM, ModelConfig
from lora_core.models.experts import Experts
from lora_core.quant import NF4Linear

__all__ = ["METHODS", "empty_model", "give_fake_tensors", "own_tensors"]

METHODS = ("full", "lora", "qlora")


def empty_model(
    config: ModelConfig,
    method: str,
    adapter: LoRAConfig,
    dtype: torch.dtype,
    code: str = "nf4",
    layers: int | None = None,
) -> CausalLM:
    """Build a model as a run would, on the meta device.

    Args:
        config: sizes.
        method: "full" trains every weight, "lora" an adapter, "qlora" an adapter on 4 bits.
        adapter: for "lora" and "qlora".
        dtype: of the weights that are not 4-bit; adapters are float32 whatever it is.
        code: of the 4-bit weights.
        layers: how many decoder layers; None: all.

    Returns:
        The model in training mode; its adapter's tensors are on the meta device too.

    Raises:
        ValueError: an unknown method, an adapter that does not fit, or one that starts from
            weights, which are not here.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if layers is not None:
        config = config.with_layers(layers)
    with torch.device("meta"):
        model = CausalLM(config)
    model.to(dtype)
    if method == "qlora":
        _make_4bit(model, code, dtype)
    if method == "full":
        model.requires_grad_(True)
    else:
        _refuse(adapter)
        add_adapter(model, adapter)
    return model.train()


def _make_4bit(model: CausalLM, code: str, dtype: torch.dtype) -> None:
    """Put 4-bit layers where `load_model` puts them: every linear layer but the head; experts."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            parts = {
                matrix: NF4Linear(k, n, False, code=code, device="meta").quantized
                for matrix, (n, k) in ((key, w.shape) for key, w in module.matrices().items())
            }
            model.set_submodule(name, module.with_4bit(parts))
        if type(module) is nn.Linear and name != "lm_head":  # routers are of another class
            sizes = (module.in_features, module.out_features, module.bias is not None)
            layer = NF4Linear(*sizes, code=code, device="meta", dtype=dtype)
            model.set_submodule(name, layer)


def _refuse(adapter: LoRAConfig) -> None:
    starts = adapter.init if adapter.init not in ("kaiming", "gaussian") else None
    if adapter.use_dora or starts or adapter.bias != "none":
        what = "use_dora" if adapter.use_dora else f"init={starts!r}" if starts else "bias"
        raise ValueError(
            f"a plan has no weights, and {what} starts from them: plan without it (plain LoRA "
            "needs about as much)"
        )


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a model's modules hold, plain attributes included, with its name."""
    for name, module in model.named_modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for key, value in held.items():
                for tensor in value if isinstance(value, tuple) else (value,):
                    if isinstance(tensor, Tensor):
                        yield f"{name}.{key}", tensor


def give_fake_tensors(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace all tensors of a model by fake ones that say they are on the CPU.

    Args:
        model: any module; shared tensors stay shared.
        mode: whose fake tensors these are.
    """
    done: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            plain = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            done[id(tensor)] = nn.Parameter(plain, tensor.requires_grad) if is_parameter else plain
        return done[id(tensor)]

    def replaced(value: Any) -> Any:
        if isinstance(value, Tensor):
            return fake(value)
        if type(value) is tuple and any(isinstance(part, Tensor) for part in value):
            return tuple(map(replaced, value))
        return value

    with mode:
        for module in model.modules():
            kinds: Any = (module._parameters, module._buffers, vars(module))
            for held in kinds:
                for key, value in list(held.items()):
                    held[key] = replaced(value)
