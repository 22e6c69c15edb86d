"""LoRAConfig: which layers, of which rank and scale, with what beside them, and what is refused."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    LoRA,
    LoRAConfig,
    LoRALinear,
    TrainableTokens,
    adapted_modules,
    add_adapter,
    set_adapters,
)
from lora_core.adapters.biases import TrainedBias
from lora_core.adapters.config import build_all
from lora_core.adapters.dora import DoRA
from lora_core.adapters.full import FullCopy
from lora_core.adapters.inject import attach_built
from lora_core.targets import pattern_value

State = Callable[[nn.Module], dict[str, object]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.q_proj(x) + self.k_proj(x).repeat_interleave(2, -1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = h + layer(h)
        return self.head(h + self.conv(h.mT).mT)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def added(config: LoRAConfig) -> Model:
    model = Model()
    add_adapter(model, config)
    return model


def pairs(model: nn.Module) -> dict[str, LoRA]:
    found = {site: host.adapter("default") for site, host in adapted_modules(model)}
    return {site: pair for site, pair in found.items() if isinstance(pair, LoRA)}


def test_patterns_choose_rank_and_scale() -> None:
    config = LoRAConfig(
        r=2,
        alpha=8,
        rank_pattern={"k_proj": 3, r"layers\.1\.q_proj": 4, "q_proj": 1},
        alpha_pattern={r"layers\.[02]\.q_proj": 5},
    )
    found = {site: (pair.r, pair.alpha) for site, pair in pairs(added(config)).items()}
    assert found == {
        "layers.0.q_proj": (1, 5),
        "layers.0.k_proj": (3, 8),
        "layers.1.q_proj": (4, 8),
        "layers.1.k_proj": (3, 8),
        "layers.2.q_proj": (1, 5),
        "layers.2.k_proj": (3, 8),
    }
    for rslora in (False, True):
        config = dataclasses.replace(config, use_rslora=rslora)
        for pair in pairs(added(config)).values():
            assert pair.scaling == pair.alpha / (pair.r**0.5 if rslora else pair.r)
            assert pair.A.shape[0] == pair.B.shape[1] == pair.r


def test_a_pattern_matches_whole_names_from_the_end() -> None:
    assert pattern_value({"q_proj": 1}, "layers.0.q_proj", 0) == 1
    assert pattern_value({"proj": 1}, "layers.0.q_proj", 0) == 0
    assert pattern_value({".*_proj": 1}, "layers.0.q_proj", 0) == 1
    assert pattern_value({r"^layers\.0": 1}, "layers.0.q_proj", 0) == 0
    assert pattern_value({"a|b": 1}, "x.b", 0) == 1


def test_all_linear_means_linear_layers_alone() -> None:
    names = list(pairs(added(LoRAConfig(r=2))))
    assert all("proj" in name for name in names)
    assert len(names) == 6
    model = Model()
    add_adapter(model, LoRAConfig(r=2, targets=["embed", "conv", "head", "layers.0.q_proj"]))
    assert list(pairs(model)) == ["embed", "layers.0.q_proj", "conv", "head"]
    assert isinstance(model.head, LoRALinear)


def test_everything_at_once() -> None:
    """Pairs, rows, a copy and biases in one adapter, trained together."""
    model = Model()
    ids = torch.tensor([[1, 2, 3, 4]])
    y = model(ids)
    config = LoRAConfig(
        r=2,
        use_dora=True,
        bias="all",
        modules_to_save=["layers.2.norm", "head"],
        trainable_token_indices=[3, 10],
        rank_pattern={"k_proj": 1},
    )
    report = add_adapter(model, config)
    assert torch.equal(model(ids), y)
    kinds = {site: type(host.adapter("default")) for site, host in adapted_modules(model)}
    assert kinds == {
        "embed": TrainableTokens,
        **{f"layers.{i}.{p}": DoRA for i in range(3) for p in ("q_proj", "k_proj")},
        "layers.0.norm": TrainedBias,
        "layers.1.norm": TrainedBias,
        "layers.2.norm": FullCopy,
        "conv": TrainedBias,
        "head": FullCopy,
    }
    q, k = 2 * (8 + 8) + 8 + 8, (8 + 4) + 4 + 4  # A and B, lengths, bias
    assert report.parameters == 2 * 8 + 3 * (q + k) + 2 * 8 + 2 * 8 + 8 + 8 * 11
    model(ids).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.sub_(p.grad, alpha=0.1)
    assert not torch.equal(model(ids), y)
    set_adapters(model, [])
    assert torch.equal(model(ids), y)


@pytest.mark.parametrize(
    ("targets", "r", "message"),
    [
        (["k_proj"], 5, "r = 5 is above the size of 'layers.0.k_proj', 4 × 8: lower it with rank"),
        (["conv"], 9, "r = 9 is above the size of 'conv', 8 × 24"),
        (["embed"], 9, "r = 9 is above the size of 'embed', 8 × 11"),
    ],
)
def test_a_rank_above_the_layer_s_size(
    targets: list[str], r: int, message: str, state_of: State
) -> None:
    model = Model()
    before = state_of(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        add_adapter(model, LoRAConfig(r=r, targets=targets))
    assert state_of(model) == before
    # one that is loaded was trained so: it is taken as it is
    config = LoRAConfig(r=r, targets=targets)
    attach_built(model, config, "loaded", build_all(config, model))
    add_adapter(Model(), dataclasses.replace(config, r=r - 1))


def test_the_size_of_a_grouped_convolution_counts_its_groups() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 2, groups=4))
    add_adapter(model, LoRAConfig(r=8, targets=["0"]))  # 4 blocks of 2 × 2: rank 8 in all
    with pytest.raises(ValueError, match="r = 12 is above the size of '0', 8 × 8"):
        add_adapter(model, LoRAConfig(r=12, targets=["0"]), "more")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"rank_pattern": {"q_proj": 0}}, "r must be a whole number of at least 1, got 0"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha must be a finite number, got nan"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: '(' is no regular expression"),
        ({"dropout": -0.1}, "dropout must be in [0, 1), got -0.1"),
        ({"bias": "some"}, "bias must be one of 'none', 'all', 'lora_only', got 'some'"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LoRAConfig(**options)


def test_patterns_are_dicts() -> None:
    for option in ("rank_pattern", "alpha_pattern", "parts"):
        with pytest.raises(
            TypeError, match=f"{option} must be a dict of {{pattern: value}}, got 3"
        ):
            LoRAConfig(**{option: 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"v_proj": 2}}, "rank_pattern: 'v_proj' matches no target; nearest"),
        ({"alpha_pattern": {"head": 2}}, "alpha_pattern: 'head' matches no target"),
        (
            {"targets": ["norm"]},
            "targets: 'norm' matches only modules of another kind, such as 'layers.0.norm'",
        ),
        (
            {"targets": ["embed"], "trainable_token_indices": [1]},
            "'embed' is both a target and tied to (or named in) trainable_token_indices",
        ),
        (
            {"modules_to_save": ["embed"], "trainable_token_indices": [1]},
            "'embed' is both tied to (or named in) trainable_token_indices and in modules_to_save",
        ),
    ],
)
def test_choices_that_clash_leave_the_model(
    options: dict[str, Any], message: str, state_of: State
) -> None:
    model = Model()
    before = state_of(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        add_adapter(model, LoRAConfig(**{"r": 2, **options}))
    assert state_of(model) == before
