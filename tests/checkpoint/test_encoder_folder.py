"""Encoders through the same two calls: heads kept, left out or made anew, and 4-bit layers."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_core.checkpoint import load_model, save_model
from lora_core.models import EncoderConfig, EncoderModel, build_model
from lora_core.quant import NF4Linear

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
}


def encoder(head: str | None = None, model_type: str = "bert") -> nn.Module:
    config = EncoderConfig.from_dict({"model_type": model_type, **SIZES})
    return build_model(config, head=head or "none").eval()


def load(folder: Path, **options: Any) -> nn.Module:
    model: nn.Module = load_model(folder, **options)
    assert isinstance(model, EncoderModel)
    return model


def same(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
@pytest.mark.parametrize("head", [None, "masked", "sequence", "token", "span"])
def test_round_trip_dense_and_4_bit(head: str | None, model_type: str, tmp_path: Path) -> None:
    model = encoder(head, model_type)
    with silent():
        save_model(model, tmp_path / "a", max_shard_size=20_000)
        assert same(load(tmp_path / "a"), model)
        packed = load(tmp_path / "a", quantize="nf4")
        save_model(packed, tmp_path / "b", quantized=True)
        assert same(load(tmp_path / "b"), packed)
    layers = [name for name, m in packed.named_modules() if isinstance(m, NF4Linear)]
    assert len(layers) >= 12  # six a layer
    assert not [n for n in layers if "classifier" in n or n.endswith(("decoder", "qa_outputs"))]
    skipped = json.loads((tmp_path / "b/config.json").read_text())["quantization_config"]
    dense = [name for name, m in packed.named_modules() if isinstance(m, nn.Linear)]
    assert skipped["llm_int8_skip_modules"] == (dense or ["lm_head"])


def test_another_head_is_left_out_and_the_wanted_one_made(tmp_path: Path) -> None:
    save_model(encoder("masked"), tmp_path)
    with pytest.warns(UserWarning) as said:  # noqa: PT030  # two, matched below
        model = load(tmp_path, head="sequence", num_labels=3, dtype="bfloat16")
    told = [str(warning.message) for warning in said]
    assert len(told) == 2
    assert "5 tensors (cls." in told[0]
    assert "left out (cls): no part of the model" in told[0]
    assert "lacks 4 tensors (bert.pooler.dense.weight" in told[1]
    assert told[1].endswith("made anew, to be trained before use")
    classifier = model.get_submodule("classifier")
    assert isinstance(classifier, nn.Linear)
    assert classifier.weight.shape == (3, 32)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(p.isfinite().all() and not p.is_meta for p in model.parameters())
    assert classifier.weight.std() > 0


def test_a_head_that_the_folder_says_it_has_must_be_there(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_model(encoder("token"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["classifier.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks tensor classifier\.weight, which config\.json"):
        load(tmp_path)


def test_a_head_is_refused_for_a_decoder(llama_folder: Path) -> None:
    with pytest.raises(ValueError, match="head and num_labels are for encoders"):
        load_model(llama_folder, head="token")
