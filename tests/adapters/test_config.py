"""LoRAConfig: what it builds, and what it refuses."""

import dataclasses
import math

import pytest
from torch import nn

from lora_core.adapters import Adapter, LoRA, LoRAConfig, adapted_modules, add_adapter


def built(model: nn.Module, config: LoRAConfig) -> dict[str, Adapter]:
    add_adapter(model, config)
    return {name: host.adapter("default") for name, host in adapted_modules(model)}


def test_patterns_override_rank_and_alpha(mlp: nn.Module) -> None:
    config = LoRAConfig(
        r=4,
        alpha=8,
        targets=r".*",
        rank_pattern={"0": 2, "head": 3},
        alpha_pattern={r"mid\..*": 6, "in": 1},
        use_rslora=True,
        dropout=0.25,
    )
    with pytest.raises(ValueError, match="alpha_pattern: 'in' matches no target"):
        add_adapter(mlp, config)
    config = dataclasses.replace(config, alpha_pattern={r"mid\..*": 6})
    pairs = built(mlp, config)
    assert [(n, p.r, p.scaling) for n, p in pairs.items()] == [
        ("inp", 4, 8 / 2),
        ("mid.0", 2, 6 / math.sqrt(2)),
        ("head", 3, 8 / math.sqrt(3)),
    ]
    assert all(isinstance(p, LoRA) and p.dropout == 0.25 for p in pairs.values())


def test_a_regex_or_exclusion_selects(mlp: nn.Module) -> None:
    assert list(built(mlp, LoRAConfig(targets="all-linear", exclude=["inp"]))) == ["mid.0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be"),
        ({"alpha": math.nan}, "alpha must be a finite number"),
        ({"dropout": -0.1}, "dropout must be in"),
        ({"init": "x"}, "init must be one of"),
        ({"rank_pattern": {"q": 0}}, "r must be a whole number of at least 1, got 0"),
        ({"alpha_pattern": {"q": math.inf}}, "alpha must be a finite number"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is no regular expression"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern: '\(' is no regular expression"),
    ],
)
def test_bad_values_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**options)


@pytest.mark.parametrize("patterns", [["q"], "q", 3, {1: 2}])
@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_patterns_are_a_dict(option: str, patterns: object) -> None:
    with pytest.raises(TypeError, match=rf"{option} must be a dict of {{pattern: value}}, got "):
        LoRAConfig(**{option: patterns})


def test_every_field_is_documented() -> None:
    from lora_core.cli.flags import field_help

    assert set(field_help(LoRAConfig)) == {field.name for field in dataclasses.fields(LoRAConfig)}
