"""Every key of every family's config.json: of a wrong type, out of range, or missing, by name."""

from pathlib import Path
from typing import Any

import pytest

from lora_core.models import ModelConfig
from lora_core.models.config_checks import required
from lora_core.models.families import FAMILIES, WRAPPERS
from lora_core.models.reading import COMMON

REQUIRED = required(ModelConfig)
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "sliding_window": 8,
    "use_sliding_window": True,
}
KEYS = [
    (model_type, name)
    for model_type, family in FAMILIES.items()
    for name in (*COMMON, *family.keys)
]
# what no key may hold, whatever its type: JSON has more kinds of values than a key has
NEVER = [[["x"]], {"a": 1}, "x y", float("nan"), -(10**40)]


def raw_of(model_type: str) -> dict[str, Any]:
    return SIZES | {"model_type": model_type}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_size_is_required_by_name(model_type: str) -> None:
    ModelConfig.from_dict(raw_of(model_type))
    for key in REQUIRED:
        raw = {k: v for k, v in raw_of(model_type).items() if k != key}
        for absent in (raw, raw | {key: None}):
            with pytest.raises(ValueError, match=f"the key {key} is missing"):
                ModelConfig.from_dict(absent)


@pytest.mark.parametrize(("model_type", "name"), KEYS)
def test_each_key_refuses_what_it_cannot_hold(model_type: str, name: str) -> None:
    key = FAMILIES[model_type].renamed.get(name, name)
    for value in NEVER:
        with pytest.raises((ValueError, TypeError)) as caught:
            ModelConfig.from_dict(raw_of(model_type) | {key: value})
        message = str(caught.value)
        assert key in message or name in message, f"{value!r}: {message}"
        assert "\n" not in message
        assert len(message) < 400


@pytest.mark.parametrize("name", [n for n in REQUIRED if n != "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 10**12, True, 4.0, "4"])
def test_sizes_out_of_range(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        ModelConfig.from_dict(raw_of("llama") | {name: value})


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_a_wrapper_needs_its_text_part(model_type: str) -> None:
    for bad in ({}, {"text_config": None}, {"text_config": [1]}):
        with pytest.raises(TypeError, match=f"text_config of a {model_type} model"):
            ModelConfig.from_dict({"model_type": model_type} | bad)


@pytest.mark.parametrize(
    ("model_type", "key"),
    [(kind, key) for kind, family in FAMILIES.items() for key in family.refused],
)
def test_keys_that_make_it_another_model(model_type: str, key: str) -> None:
    ModelConfig.from_dict(raw_of(model_type) | {key: None})
    with pytest.raises(ValueError, match=f"{key} .* is not implemented for {model_type}"):
        ModelConfig.from_dict(raw_of(model_type) | {key: 0.5})


def test_a_field_that_the_family_does_not_read() -> None:
    with pytest.raises(ValueError, match="logits_scaling is no key of llama's configuration"):
        ModelConfig(**{k: SIZES[k] for k in REQUIRED}, logits_scaling=2.0)
    kinds = ("sliding_attention", *3 * ["full_attention"])
    with pytest.raises(ValueError, match="layer_types is no key of mistral's configuration"):
        ModelConfig(
            **{k: SIZES[k] for k in REQUIRED},
            model_type="mistral",
            sliding_window=8,
            layer_types=kinds,
        )


def test_layers_one_by_one() -> None:
    raw = raw_of("qwen3")
    for value, message in (
        (["full_attention"], "layer_types must have an entry for each of 4 layers; got 1"),
        (4 * ["chunked_attention"], "layer type 'chunked_attention' is not implemented"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig.from_dict(raw | {"layer_types": value})
    slides = {"layer_types": 4 * ["sliding_attention"], "use_sliding_window": False}
    with pytest.raises(ValueError, match="sliding_attention layers need sliding_window"):
        ModelConfig.from_dict(raw | slides)


@pytest.mark.parametrize("text", ["[" * 100_000, "", "null", '{"a": 1', "\ufeff{}", "{}{}"])
def test_what_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        ModelConfig.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
