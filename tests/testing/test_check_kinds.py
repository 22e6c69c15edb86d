"""`check_adapter` on every kind of LoRA, and on kinds with a fault planted in them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import Adapted, LoRA, LoRAConfig, LoRALinear, add_adapter
from lora_core.adapters.biases import TrainedBias
from lora_core.adapters.dora import DoRA
from lora_core.quant import NF4Linear
from lora_core.testing import check_adapter

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "parts": {"parts": {"0": [3, 5]}},
    "trained bias": {"bias": "lora_only"},
    "B's bias": {"lora_bias": True, "use_rslora": True},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "pissa in parts": {"init": "pissa", "parts": {"0": [3, 5]}},
    "dora from pissa": {"init": "pissa", "use_dora": True},
    "dora with biases": {"use_dora": True, "bias": "lora_only", "lora_bias": True},
}


def made(**options: Any) -> Callable[[nn.Module], nn.Module]:
    def make(base: nn.Module) -> nn.Module:
        model = nn.Sequential(base)
        add_adapter(model, LoRAConfig(r=3, targets=["0"], **options))
        return model[0]

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("four_bit", [False, True])
def test_every_kind_passes(kind: str, four_bit: bool, full_run: bool) -> None:
    base = NF4Linear.from_linear(nn.Linear(64, 8)) if four_bit else nn.Linear(12, 8)
    options = KINDS[kind]
    check_adapter(
        made(**options),
        base,
        exact_start="init" not in options,
        examples=100 if full_run else 4,
    )


def host(adapter: Callable[[nn.Module], Any]) -> Callable[[nn.Module], nn.Module]:
    def make(base: nn.Module) -> nn.Module:
        layer = LoRALinear.around(base.requires_grad_(False))
        pair = adapter(base)
        if isinstance(pair, DoRA):
            pair.begin(base)
        layer.attach("default", pair)
        layer.active = ["default"]
        return layer

    return make


class NoCross(DoRA):
    """Leaves the cross term out of the norm."""

    def norms(self, base: nn.Module) -> Tensor:
        zero = nn.Linear(12, 8, bias=False)
        zero.weight.data.zero_()
        return super().norms(zero)


class BiasInDirection(DoRA):
    """Scales the base's bias with the rows."""

    def update(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        bias = base.bias
        base.bias = None
        out = super().update(x, y, base)
        base.bias = bias
        return out


class WrongLength(DoRA):
    """Reads the length of the base's rows from their sum."""

    def measure(self, base: nn.Module) -> None:
        self.lengths = base.weight.detach().float().abs().sum(1)


class Swapped(LoRA):
    """The blocks of two parts in each other's columns."""

    def _spread(self, up: Tensor) -> Tensor:
        return super()._spread(up).flip(1)

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        up = super()._spread(self.B)
        return self.form.delta(self.A.to(dtype), up.to(dtype) * self.scaling)


class Kept(LoRA):
    """Starts away from zero and takes nothing off."""

    def begin(self, base: nn.Module) -> None:
        self.start_at(torch.ones_like(self.A), torch.ones_like(self.B), subtract=False)


class Doubled(TrainedBias):
    """Adds the change of the bias twice."""

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return super().forward(x, super().forward(x, y, base), base)


def kept(base: nn.Module) -> LoRA:
    pair = Kept(12, 8, 3)
    pair.begin(base)
    return pair


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (lambda base: NoCross(12, 8, 3), "the output in eval"),
        (lambda base: BiasInDirection(12, 8, 3), "the output in eval"),
        (lambda base: WrongLength(12, 8, 3), "the output in eval"),
        (lambda base: Swapped(12, 8, 3, parts=[3, 5]), "delta_weight"),
        (Doubled, "the output in eval"),
        (kept, "the output of a new adapter"),
    ],
)
def test_a_fault_is_found(adapter: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_adapter(
            host(adapter), nn.Linear(12, 8), exact_start=adapter is not kept, dtypes=[torch.float32]
        )
    assert isinstance(host(adapter)(nn.Linear(12, 8)), Adapted)
