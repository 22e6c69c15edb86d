"""AdamW with 8-bit state tracks float32 AdamW's loss, step by step."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lora_core import LoRAConfig, TrainConfig, add_adapter, train
from lora_core.data import collate
from lora_kernels import adamw8 as operator

STEPS = 110


def make_batches() -> list[dict[str, Tensor]]:
    """50 batches of 6 rows of 24 tokens: each next token follows from the row's start and step."""
    generator = torch.Generator().manual_seed(11)
    batches = []
    for _ in range(50):
        rows = []
        for _ in range(6):
            start, step = torch.randint(1, 8, (2,), generator=generator).tolist()
            ids = [20 + (start + i * step + (i % 3) * start) % 20 for i in range(24)]
            rows.append({"input_ids": ids, "labels": ids})
        batches.append(collate(rows))
    return batches


def make_model(small_decoder: Callable[..., nn.Module]) -> nn.Module:
    """A random decoder with LoRA of 4096 elements a matrix: the smallest that get codes."""
    model = small_decoder(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator) * 0.08
            p.copy_(noise if p.ndim > 1 else torch.ones(p.shape))
    torch.manual_seed(2)
    add_adapter(model, LoRAConfig(r=64, alpha=64))
    return model


@pytest.fixture(scope="module")
def losses(small_decoder: Callable[..., nn.Module]) -> Callable[[str], Tensor]:
    """The losses of a run with an optimizer."""
    batches = make_batches()

    def run(optimizer: str) -> Tensor:
        config = TrainConfig(
            optimizer=optimizer, lr=2e-3, steps=STEPS, accumulate=1, warmup=5, progress=False
        )
        result = train(make_model(small_decoder), batches, config)
        return torch.tensor([record["loss"] for record in result.history])

    return run


@pytest.fixture(scope="module")
def exact(losses: Callable[[str], Tensor]) -> Tensor:
    return losses("adamw")


def apart(found: Tensor, exact: Tensor) -> float:
    """The largest relative difference of a step's loss."""
    return float((found / exact - 1).abs().max())


def test_every_loss_is_within_a_hundredth(losses: Callable[[str], Tensor], exact: Tensor) -> None:
    assert exact[-1] < 0.7 * exact[0]  # it learns
    found = apart(losses("adamw8bit"), exact)
    assert 0 < found <= 0.01


def linear(flat: tuple[Tensor, ...], noise: Tensor, f: operator.Factors) -> tuple[Tensor, ...]:
    """The step with v itself in linear codes, of which the small ones become 0."""
    p, g, mean, code, mean_unit, unit = flat
    v = f.beta2 * (code.float() * unit) + f.rest2 * g * g
    updated = list(operator.float_codes(flat, noise, f))
    m = f.beta1 * (mean.float() * mean.float().abs() * mean_unit) + f.rest1 * g
    updated[0] = p * f.decay - f.rate * (m / (v.sqrt() * f.correction + f.eps))
    updated[4] = (v.amax(1, keepdim=True) / 255).clamp(min=operator.TINY)
    updated[2] = (v / updated[4]).round().to(torch.uint8)
    return tuple(updated)


@pytest.mark.parametrize(("fault", "bound"), [("linear codes of v", 0.5), ("3 bits", 0.01)])
def test_worse_codes_are_farther_away(
    losses: Callable[[str], Tensor],
    exact: Tensor,
    fault: str,
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORA_KERNELS", "reference")
    if fault == "3 bits":
        monkeypatch.setattr(operator, "MEAN_SCALE", 1 / 3**2)
        monkeypatch.setattr(operator, "ROOT_SCALE", 1 / 7**4)
        monkeypatch.setattr(operator, "ROOT_TOP", 7)
    else:
        monkeypatch.setattr(operator, "float_codes", operator._updated, raising=False)
        monkeypatch.setattr(operator, "_updated", linear)
    assert apart(losses("adamw8bit"), exact) > bound
