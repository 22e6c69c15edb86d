"""Models to adapt and comparisons that the adapter tests share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import Adapted, adapted_modules


class Mlp(nn.Module):
    """Two hidden layers under names that patterns can tell apart, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 24)
        self.mid = nn.Sequential(nn.Linear(24, 24, bias=False), nn.ReLU(), nn.LayerNorm(24))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(torch.relu(self.inp(x))))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class TokenModel(nn.Module):
    """An embedding and a head, tied or not, with a linear layer between."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.config = type("Config", (), {})()
        self.config.vocab_size, self.config.tie_word_embeddings = 11, tied
        self.vocab_size = 11
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids))))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.fixture
def mlp() -> Mlp:
    return Mlp()


@pytest.fixture
def make_mlp() -> Callable[[], nn.Module]:
    return Mlp


@pytest.fixture
def make_token_model() -> Callable[[bool], nn.Module]:
    return TokenModel


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Tensor, Tensor], bool]:
    """Equal in dtype, shape and every bit, the signs of zeros and NaN included."""
    ints = {8: torch.int64, 4: torch.int32, 2: torch.int16}

    def same(a: Tensor, b: Tensor) -> bool:
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        kind = ints[a.element_size()]
        return torch.equal(a.detach().contiguous().view(kind), b.detach().contiguous().view(kind))

    return same


@pytest.fixture(scope="session")
def shake() -> Callable[[nn.Module, float], None]:
    """Give every adapter parameter in a model numbers that matter."""

    def fill(model: nn.Module, scale: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, host in adapted_modules(model):
                assert isinstance(host, Adapted)
                for parameter in host.adapters.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise, alpha=scale)

    return fill


@pytest.fixture(scope="session")
def state_of() -> Callable[[nn.Module], dict[str, object]]:
    """Everything that an error must leave alone: modules, tensors, flags, active adapters."""

    def snapshot(model: nn.Module) -> dict[str, object]:
        hosts = {
            name: (list(host.active), list(host.adapters), host.enabled, host.merged)
            for name, host in adapted_modules(model)
        }
        return {
            "modules": [(name, id(module)) for name, module in model.named_modules()],
            "parameters": [
                (name, id(p), p.requires_grad, p.detach().clone().tolist())
                for name, p in model.named_parameters(remove_duplicate=False)
            ],
            "hosts": hosts,
        }

    return snapshot
