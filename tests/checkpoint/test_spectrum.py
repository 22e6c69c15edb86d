"""Spectra from a folder against those from the model that it was saved from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_core import LoRAConfig, add_adapter, load_model, save_adapter, save_model
from lora_core.adapters import (
    BottleneckConfig,
    SpectrumReport,
    adapter_spectrum,
)
from lora_core.checkpoint import read_spectrum

RELATIVE = 64 * 64 * 2.0**-53  # rounding of float64 in sums of some 64 terms, in two orders


def same(ours: SpectrumReport, theirs: SpectrumReport, base: bool = True) -> None:
    assert {layer.name for layer in ours.layers} == {layer.name for layer in theirs.layers}
    by_name = {layer.name: layer for layer in theirs.layers}
    for layer in ours.layers:
        other = by_name[layer.name]
        assert layer.kind == other.kind
        values = torch.tensor(layer.singular_values)
        # rounding may leave a value where the other has none
        pad = max(layer.rank, other.rank)
        wanted = torch.tensor(other.singular_values + (0.0,) * (pad - other.rank))
        values = torch.cat([values, torch.zeros(pad - layer.rank)])
        assert float((values - wanted).abs().max()) <= RELATIVE * (layer.base_norm or 10)
        assert layer.norm == pytest.approx(other.norm, rel=1e-9)
        assert layer.bias_change == pytest.approx(other.bias_change, rel=1e-9)
        if base:
            assert layer.base_norm == pytest.approx(other.base_norm, rel=1e-12)
        else:
            assert layer.base_norm is None


def base_folder(model: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    return folder


KINDS = {
    "plain": {"r": 4, "alpha": 3, "targets": ["embed", "fused", "mix", "conv", "grouped"]},
    "rslora": {"r": 4, "use_rslora": True, "targets": ["fused", "mix"]},
    "parts": {"r": 3, "parts": {"fused": [3, 5, 7]}, "targets": ["fused"]},
    "pissa": {"r": 3, "init": "pissa", "targets": ["fused", "mix", "conv"]},
    "patterns": {"r": 4, "rank_pattern": {"mix": 2}, "alpha_pattern": {"fused": 1}},
    "dora": {"r": 3, "use_dora": True, "targets": ["embed", "fused", "mix", "conv"]},
    "biases": {"r": 3, "lora_bias": True, "targets": ["fused", "mix"]},
    "copies": {"r": 3, "targets": ["mix"], "modules_to_save": ["fused"]},
}


@pytest.mark.filterwarnings("ignore:.*export --baked")
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_and_the_model_it_came_from(shake, every_form, kind, tmp_path) -> None:
    model = every_form
    base = base_folder(model, tmp_path / "base")
    add_adapter(model, LoRAConfig(**KINDS[kind]))
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    wanted = adapter_spectrum(model)
    if kind == "copies":  # the bias of a copy is not looked at in a folder
        assert dict(read_spectrum(tmp_path / "adapter", base).left_out).keys() == {"fused.bias"}
        model.fused.adapters["default"].copy.bias.data.copy_(model.fused.base.bias)
        wanted = adapter_spectrum(model)
    same(read_spectrum(tmp_path / "adapter", base), wanted)
    if kind in ("dora", "copies"):
        without = "has no update of a weight" if kind == "dora" else None
        if without:
            with pytest.raises(ValueError, match=f"{without}.*needs the base's weight"):
                read_spectrum(tmp_path / "adapter")
        else:
            left_out = dict(read_spectrum(tmp_path / "adapter").left_out)
            assert "needs the base's weight" in left_out["fused.weight"]
    else:
        same(read_spectrum(tmp_path / "adapter"), wanted, base=False)


@pytest.fixture
def decoder(small_decoder) -> nn.Module:
    torch.manual_seed(2)
    model = small_decoder(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model.init_weights(0.2)
    return model


@pytest.mark.parametrize("code", [None, "nf4"])
def test_folders_of_models_sharded_and_in_four_bits(shake, decoder, tmp_path, code) -> None:
    save_model(decoder, tmp_path / "dense", max_shard_size=50_000)
    model = load_model(tmp_path / "dense", quantize=code)
    where = tmp_path / "dense"
    if code is not None:
        where = tmp_path / "packed"
        save_model(model, where, quantized=True)
    add_adapter(model, LoRAConfig(r=2))
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    same(read_spectrum(tmp_path / "adapter", where), adapter_spectrum(model))


def test_names_with_and_without_the_heads_prefix(shake, decoder, tmp_path) -> None:
    """A base saved as part of a larger model, or an adapter trained on a part of it."""
    add_adapter(decoder, LoRAConfig(r=2, targets=["q_proj"]))
    shake(decoder)
    save_adapter(decoder, tmp_path / "adapter")
    state = {
        f"language.{key}": value.clone()
        for key, value in decoder.state_dict().items()
        if "adapters" not in key
    }
    (tmp_path / "base").mkdir()
    renamed = {key.replace(".base.", "."): value for key, value in state.items()}
    save_file(renamed, tmp_path / "base" / "model.safetensors")
    same(read_spectrum(tmp_path / "adapter", tmp_path / "base"), adapter_spectrum(decoder))


@pytest.fixture
def saved(shake, every_form, tmp_path):
    """A folder with an adapter, its configuration and tensors edited."""
    model = every_form
    base_folder(model, tmp_path / "base")
    add_adapter(model, LoRAConfig(r=2, targets=["fused", "mix"]))
    shake(model)
    save_adapter(model, tmp_path / "adapter")

    def edited(config=None, tensors=None) -> Path:
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
        weights = tmp_path / "adapter" / "adapter_model.safetensors"
        if tensors is not None:
            save_file(tensors(load_file(weights)), weights)
        return tmp_path / "adapter"

    return edited


def test_layers_are_in_order(tmp_path) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))
    add_adapter(model, LoRAConfig(r=2))
    save_adapter(model, tmp_path)
    assert [layer.name for layer in read_spectrum(tmp_path).layers] == [str(i) for i in range(12)]


def test_what_is_in_neither_is_named(saved) -> None:
    extra = "base_model.model.mix.lora_A.extra"
    folder = saved(tensors=lambda t: t | {extra: torch.ones(1)})
    report = read_spectrum(folder)
    assert report.left_out == (("mix.lora_A.extra", "no pair and no copy of a weight matrix"),)
    assert report.name == "adapter"


@pytest.mark.parametrize(
    ("config", "tensors", "told"),
    [
        ({"peft_type": "LOHA"}, None, r"holds LOHA, not LoRA: load it.*adapter_spectrum\(model\)"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            None,
            "init_lora_weights='pissa_niter_4': the base was changed too, so A and B are not",
        ),
        ({"rank_pattern": [1]}, None, "rank_pattern must be a dict of {pattern: value}, got"),
        ({"alpha_pattern": {"[": 1}}, None, r"alpha_pattern: '\[' is no regular expression"),
        ({"lora_alpha": "4"}, None, "alpha must be a finite number, got '4'"),
        ({"r": 3}, None, "the configuration says rank 3 for 'fused', its A has 2 rows"),
        (
            {},
            lambda t: {k: v for k, v in t.items() if "mix.lora_B" not in k},
            "'mix' has only one of A and B",
        ),
        (
            {},
            lambda t: t | {"base_model.model.mix.lora_B.weight": torch.ones(8, 3)},
            r"A and B of 'mix' are no pair: \(2, 15\) torch.float32 and \(8, 3\)",
        ),
        (
            {},
            lambda t: t | {"base_model.model.mix.lora_B.weight": torch.full((8, 2), torch.nan)},
            "the update of 'mix' holds NaN or infinity",
        ),
        (
            {},
            lambda t: t | {"base_model.model.mix.lora_B.weight": torch.ones(9, 2)},
            r"base's 'mix.weight' is torch.float32 \(8, 15\), the update 9 × 15: .*another base",
        ),
    ],
)
def test_refusals(saved, tmp_path, config, tensors, told) -> None:
    with pytest.raises(ValueError, match=told) as error:
        read_spectrum(saved(config, tensors), tmp_path / "base")
    assert "\n" not in str(error.value)


def test_folders_that_are_none(every_form, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        read_spectrum(tmp_path / "none")
    model = every_form
    add_adapter(model, BottleneckConfig(2, feed_forward=["mix"]))
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="holds LORA_CORE_BOTTLENECK, not LoRA"):
        read_spectrum(tmp_path)
