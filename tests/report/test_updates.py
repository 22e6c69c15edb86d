"""Relative size of the update, laid out by projection and layer."""

import math

import pytest
import torch
from torch import nn

from lora_core.adapters import LayerSpectrum, SpectrumReport, adapted_modules
from lora_core.report import by_layer, relative_updates
from lora_core.report.updates import NO_LAYER, depth


def test_the_sizes_are_those_of_the_weights(adapted: nn.Module) -> None:
    found = relative_updates(adapted)
    assert {kind: list(row) for kind, row in found.items()} == {
        "embed": [NO_LAYER],
        "q": [0, 1],
        "up": [0, 1],
    }
    for name, host in adapted_modules(adapted):
        lora, weight = host.adapters["default"], host.base.weight
        delta = lora.delta_weight().detach() if name != "embed" else None
        if delta is not None:
            ratio = float(torch.linalg.norm(delta) / torch.linalg.norm(weight.detach()))
            assert found[name.rsplit(".", 1)[-1]][depth(name)] == pytest.approx(ratio, rel=1e-5)


def test_no_adapter_of_that_name(adapted: nn.Module) -> None:
    with pytest.raises(ValueError, match="no adapter 'other' in the model"):
        relative_updates(adapted, "other")


def layer(name: str, norm: float, base: float | None) -> LayerSpectrum:
    return LayerSpectrum(name, "LoRA", (4, 4), norm, base, (norm,), 0.0)


def test_names_find_their_place() -> None:
    names = ["model.layers.3.self_attn.q_proj", "model.layers.12.mlp.up_proj", "lm_head"]
    found = by_layer(SpectrumReport("a", tuple(layer(name, 1.0, 2.0) for name in names)))
    assert found == {"q_proj": {3: 0.5}, "up_proj": {12: 0.5}, "lm_head": {NO_LAYER: 0.5}}


def test_two_attentions_of_a_layer_keep_apart() -> None:
    names = ["decoder.0.self_attn.q", "decoder.0.cross_attn.q", "decoder.0.mlp.up"]
    found = by_layer(SpectrumReport("a", tuple(layer(name, 1.0, 2.0) for name in names)))
    assert list(found) == ["self_attn.q", "cross_attn.q", "up"]


def test_experts_of_a_layer_are_one() -> None:
    parts = (("layers.1.experts.0.up", 3.0, 3.0), ("layers.1.experts.1.up", 4.0, 4.0))
    report = SpectrumReport("a", tuple(layer(*part) for part in parts))
    assert by_layer(report) == {"up": {1: 1.0}}


def test_without_the_base_there_is_no_ratio() -> None:
    report = SpectrumReport("a", (layer("layers.0.q", 1.0, None), layer("layers.1.q", 1.0, 0.0)))
    assert by_layer(report) == {"q": {1: math.inf}}
