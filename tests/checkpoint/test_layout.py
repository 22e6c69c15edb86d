"""Folders whose sizes, vocabulary or names do not fit: one line each, before anything is built."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core.checkpoint import folder, load_model, save_model
from lora_core.checkpoint.layout import build_empty
from lora_core.models import CausalLM, ModelConfig
from lora_core.quant import NF4Linear

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def model() -> CausalLM:
    return CausalLM(ModelConfig(**SIZES)).eval()


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def reconfigure(where: Path, **changes: Any) -> None:
    path = where / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(where: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = where / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(state), path)


def refused(where: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_model(where)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 10**9}, r"config\.json: vocab_size is 10+, more than the files have"),
        ({"hidden_size": 10**9}, r"hidden_size is 10+, more than the files have weights"),
        ({"intermediate_size": 10**9}, r"intermediate_size is 10+, more than"),
        ({"num_attention_heads": 10**9}, r"num_attention_heads is 10+, more than"),
        ({"num_hidden_layers": 5000}, r"num_hidden_layers is 5000, but the files hold only 21"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_absurd_sizes_build_nothing(
    changes: dict[str, int],
    message: str,
    model: CausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_model(model, tmp_path)
    reconfigure(tmp_path, head_dim=8, **changes)

    def built(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(folder, "build_model", built)
    refused(tmp_path, message)


def test_sizes_that_no_tensor_can_have_are_one_line(
    model: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model, tmp_path)
    monkeypatch.setattr(folder, "check_sizes", lambda *args: None)
    reconfigure(tmp_path, num_attention_heads=2**30, head_dim=2**30)
    refused(tmp_path, r"config\.json: no model can have these sizes: ")


@pytest.mark.parametrize("rows", [47, 49])
@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_differs_is_said_as_such(
    rows: int, tied: bool, model: CausalLM, tmp_path: Path
) -> None:
    save_model(model, tmp_path)
    reconfigure(tmp_path, vocab_size=rows, tie_word_embeddings=tied)
    if tied:
        rewrite(tmp_path, lambda s: {n: t for n, t in s.items() if n != "lm_head.weight"})
    refused(
        tmp_path,
        rf"tensor .* has shape \(48, 32\); config\.json calls for \({rows}, 32\): vocab_size is "
        rf"{rows}, but the file has 48 rows",
    )


def test_a_head_of_another_vocabulary_than_the_embedding(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    rewrite(tmp_path, lambda s: s | {"lm_head.weight": torch.zeros(50, 32)})
    refused(tmp_path, r"lm_head\.weight has .*: vocab_size is 48, but the file has 50 rows")
    rewrite(tmp_path, lambda s: s | {"lm_head.weight": torch.zeros(50, 31)})
    refused(tmp_path, r"lm_head\.weight has shape \(50, 31\); config\.json calls for \(48, 32\)$")


def test_a_tied_trunk_without_prefix_loads(tmp_path: Path) -> None:
    model = CausalLM(ModelConfig(**SIZES, tie_word_embeddings=True))
    save_model(model, tmp_path)
    rewrite(tmp_path, lambda s: {n.removeprefix("model."): t for n, t in s.items()})
    assert same(load_model(tmp_path), model)


def test_a_trunk_without_a_head_lacks_it(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    rewrite(
        tmp_path,
        lambda s: {n.removeprefix("model."): t for n, t in s.items() if n != "lm_head.weight"},
    )
    refused(tmp_path, r"lacks tensor lm_head\.weight, which .*needs tie_word_embeddings")


def test_either_of_a_tied_pair_may_be_there(tmp_path: Path) -> None:
    model = CausalLM(ModelConfig(**SIZES, tie_word_embeddings=True))
    save_model(model, tmp_path)
    rewrite(
        tmp_path,
        lambda s: {n.replace("model.embed_tokens", "lm_head"): t for n, t in s.items()},
    )
    assert same(load_model(tmp_path), model)


def wrap(where: Path, text: str, head: str, vision: str) -> None:
    """Make a multimodal folder of it, with a vision part, in an older or a newer dialect."""

    def rename(name: str) -> str:
        return name.replace("lm_head.", head) if "lm_head" in name else text + name[len("model.") :]

    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = ("vision_tower.a.weight", "multi_modal_projector.b.weight")
        named = {rename(name): tensor for name, tensor in state.items()}
        return named | {vision + part: torch.zeros(3, dtype=torch.int8) for part in parts}

    rewrite(where, change)
    reconfigure(where, text_config={})


@pytest.mark.parametrize(
    "dialect",
    [
        ("language_model.model.", "language_model.lm_head.", ""),
        ("model.language_model.", "lm_head.", "model."),
    ],
    ids=["older", "newer"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_vision_part_is_left_out_and_said_once(
    dialect: tuple[str, str, str], packed: bool, model: CausalLM, tmp_path: Path
) -> None:
    save_model(model, tmp_path)
    if packed:
        model = load_model(tmp_path, quantize="nf4")
        save_model(model, tmp_path, quantized=True)
    wrap(tmp_path, *dialect)
    message = r"2 tensors \(.*\) left out \(multi_modal_projector, vision_tower\): no part of the"
    with pytest.warns(UserWarning, match=message) as said:
        loaded = load_model(tmp_path)
    assert len(said) == 1
    assert same(loaded, model)


def test_what_else_is_in_a_multimodal_folder_is_an_error(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    wrap(tmp_path, "model.language_model.", "lm_head.", "model.")
    rewrite(tmp_path, lambda s: s | {"model.audio_tower.weight": torch.zeros(1)})
    refused(tmp_path, r"holds tensor model\.audio_tower\.weight, which config\.json has no place")


def test_messages_name_a_tensor_as_the_file_does(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    wrap(tmp_path, "model.language_model.", "lm_head.", "model.")
    rewrite(tmp_path, lambda s: s | {"model.language_model.norm.weight": torch.zeros(7)})
    refused(tmp_path, r"tensor model\.language_model\.norm\.weight has shape \(7,\)")


def test_saving_the_text_part_keeps_its_own_keys_alone(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path / "a")
    reconfigure(tmp_path / "a", text_config={"house": "kept"}, vision_config={}, image_token_id=7)
    save_model(model, tmp_path / "b", source=tmp_path / "a")
    raw = json.loads((tmp_path / "b/config.json").read_text())
    assert raw["house"] == "kept"
    assert not raw.keys() & {"text_config", "vision_config", "image_token_id"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load_model(tmp_path / "b"), model)


def test_float64_without_a_dtype_asks_for_one(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    rewrite(tmp_path, lambda s: {name: tensor.double() for name, tensor in s.items()})
    reconfigure(tmp_path, dtype=None)
    refused(tmp_path, "holds weights of float64, and config.json names no dtype.*: give dtype=")
    assert same(load_model(tmp_path, dtype="float32"), model)


@pytest.mark.parametrize("name", ["qweight", "weight_scale", "SCB"])
def test_quantized_in_a_way_that_config_json_hides(
    name: str, model: CausalLM, tmp_path: Path
) -> None:
    save_model(model, tmp_path)
    extra = f"model.layers.0.mlp.up_proj.{name}"
    rewrite(tmp_path, lambda s: s | {extra: torch.zeros(2)})
    refused(tmp_path, rf"holds tensor {re.escape(extra)}.*; it looks quantized, and config\.json")


def test_4_bit_layers_are_made_of_the_values_on_disk(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    narrow = load_model(tmp_path, quantize="nf4", dtype="bfloat16")
    assert narrow.model.norm.weight.dtype == torch.bfloat16
    expected = NF4Linear.from_linear(model.model.layers[1].mlp.up_proj)  # type: ignore[arg-type]
    found = narrow.model.layers[1].mlp.up_proj
    assert same(found, expected)  # type: ignore[arg-type]


class Table(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, 4, padding_idx=0)
        self.linear = nn.Linear(4, 4)


def test_a_model_without_memory_draws_no_first_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(*_: object, **__: object) -> None:
        raise AssertionError("worked out for nobody, by a compiler that takes a second to import")

    monkeypatch.setattr(torch.Tensor, "normal_", drawn)
    model = build_empty(Table, 3, "config.json")
    assert model.embedding.weight.is_meta
    assert model.linear.weight.is_meta
    with pytest.raises(AssertionError, match="a second"):  # elsewhere they are drawn as ever
        Table(3)
