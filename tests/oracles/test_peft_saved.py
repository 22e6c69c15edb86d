"""What PEFT keeps for backward in the case of ops/test_lora_saved.py, counted the same way."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from lora_core import LoRALinear

pytestmark = pytest.mark.oracle

TOKENS, WIDTH, RANK = 1024, 1024, 16
# MiB that PEFT 0.19 keeps under autocast, without dropout and with 0.05; x is 2.00
PEFT_KEEPS = {0.0: 6.3, 0.05: 18.3}


class Base(nn.Module):
    """q, k and v of one input."""

    def __init__(self) -> None:
        super().__init__()
        for name in "qkv":
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


def kept(model: nn.Module) -> float:
    """MiB of the distinct storages that autograd keeps under autocast, without parameters."""
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    tensors: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        model(x)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for at, size in storages.items() if at not in held) / (1 << 20)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_three_layers_that_share_an_input(
    oracle: Callable[[str], ModuleType], dropout: float
) -> None:
    peft = oracle("peft")
    config = peft.LoraConfig(r=RANK, target_modules=["q", "k", "v"], lora_dropout=dropout)
    theirs = kept(peft.get_peft_model(Base(), config).train())
    ours_model = Base().train()
    for name in "qkv":
        setattr(ours_model, name, LoRALinear(getattr(ours_model, name), r=RANK, dropout=dropout))
    ours = kept(ours_model)
    told = f"dropout {dropout}: PEFT {theirs:.2f} MiB, here {ours:.2f} MiB"
    assert ours <= 2.2, told
    assert theirs == pytest.approx(PEFT_KEEPS[dropout], abs=0.1), told
