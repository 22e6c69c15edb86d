"""Folders of every family in each dialect of config.json and of tensor names, and written here."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core.checkpoint import save_model
from lora_core.models import ModelConfig
from lora_core.models.families import FAMILIES, Family

pytestmark = pytest.mark.oracle


def agree(ours: ModelConfig, theirs: Any) -> None:
    """What transformers' configuration says, ours says too."""
    family, compared = ours.family, 0
    for name, value in vars(ours).items():
        key = family.renamed.get(name, name)
        if not hasattr(theirs, key) or (name == "sliding_window" and not agrees_on_window(family)):
            continue
        peer, compared = getattr(theirs, key), compared + 1
        if name == "rope_parameters":
            both = (value, peer) if family.local_rope_theta else ({"": value}, {"": peer})
            assert set(both[0]) == set(both[1])
            for kind, rope in both[1].items():
                agree_on_rope(both[0][kind], rope)
        elif name == "dtype":  # a part of a multimodal model's has none
            assert peer is None or str(peer) == f"torch.{value}"
        elif isinstance(value, tuple):
            assert list(value) == list(peer), name
        else:
            assert value == peer, f"{name}: {value!r} here, {peer!r} there"
    assert compared > 15


def agrees_on_window(family: Family) -> bool:
    """Not one that does not read it, nor one that forgets it where it does not count."""
    return "sliding_window" in family.keys and not family.optional_window


def agree_on_rope(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for key, value in theirs.items():
        if key != "type" and value is not None:  # "type": the older name of rope_type, kept
            assert ours.get(key, 1.0) == value, key  # 1.0: partial_rotary_factor, as if absent


def older(raw: dict[str, Any], longrope: str) -> dict[str, Any]:
    """A configuration in the dialect before transformers 5."""
    raw = copy.deepcopy(raw)
    raw["torch_dtype"] = raw.pop("dtype")
    part = raw.get("text_config", raw)
    part.pop("dtype", None)
    kinds = part.pop("layer_types", None)
    rope = part.pop("rope_parameters")
    if "full_attention" in rope:
        part["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        part["sliding_window_pattern"] = kinds.index("full_attention") + 1
        rope = rope["full_attention"]
    part["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    if kind == "longrope":
        part["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        part["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
        del rope["factor"]  # what max_position_embeddings is to it
        kind = longrope
    name = "rope_type" if "rope_local_base_freq" in part else "type"  # as Gemma 3's files say it
    part["rope_scaling"] = None if kind == "default" else {name: kind, **rope}
    return raw


def test_either_dialect(
    transformers: Any, make_pair: Callable[..., Any], family: str, tmp_path: Path
) -> None:
    """The same model is read from the older dialect, here and there; and several ends of text."""
    raw = json.loads((make_pair(family).folder / "config.json").read_text())
    raw["eos_token_id"] = raw.get("text_config", raw)["eos_token_id"] = [3, 5]
    ours = ModelConfig.from_dict(raw)
    assert ours.eos_token_ids == (3, 5)
    for content in (raw, older(raw, "longrope"), older(raw, "su")):
        assert ModelConfig.from_dict(content) == ours
        if (content.get("rope_scaling") or {}).get("type") == "su":
            continue  # transformers 5.23 knows the name and asks for a key that such files lack
        (tmp_path / "config.json").write_text(json.dumps(content))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        agree(ours, theirs.get_text_config())


REQUIRED: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 320,
    "intermediate_size": 96,
    "num_hidden_layers": 9,
    "num_attention_heads": 32,
}


RULES: dict[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "max_window_layers": 4,
    "sliding_window_pattern": 3,
    "no_rope_layer_interval": 3,
}


@pytest.mark.parametrize("more", [{}, RULES], ids=["none", "rules"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_keys(transformers: Any, model_type: str, more: dict[str, Any]) -> None:
    """A file with the sizes alone means what transformers takes it to mean; so do short forms."""
    raw = {"model_type": model_type, **REQUIRED, **more}
    ours = ModelConfig.from_dict(raw)
    theirs = transformers.AutoConfig.for_model(**raw)
    agree(ours, theirs)
    assert ModelConfig.from_dict(theirs.to_dict()) == ours


def test_a_multimodal_file_that_says_little(transformers: Any) -> None:
    """Gemma 3 4B's published text_config names five keys."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    for inner in (text, {k: v for k, v in text.items() if k != "model_type"}):
        raw = {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "torch_dtype": "bfloat16",
            "eos_token_id": [1, 106],
            "text_config": inner,
            "vision_config": {"hidden_size": 1152},
        }
        ours = ModelConfig.from_dict(raw)
        theirs = transformers.Gemma3Config(**raw).text_config
        assert ours.eos_token_ids == (1, 106)  # the outer file's; the inner says nothing
        assert ours.dtype == "bfloat16"
        theirs.eos_token_id, theirs.dtype = [1, 106], torch.bfloat16
        agree(ours, theirs)


@pytest.mark.parametrize("renamed", ["as transformers writes it", "the other way"])
def test_prefixes_of_a_multimodal_model(
    make_pair: Callable[..., Any],
    load: Callable[..., nn.Module],
    draw: Callable[..., Tensor],
    tmp_path: Path,
    renamed: str,
) -> None:
    """`language_model.model.X`, older, and `model.language_model.X`; the vision tower is left."""
    ours, _, _, folder = make_pair("gemma3-wrapped")
    shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    older = any(name.startswith("language_model.model.") for name in tensors)
    if renamed == "the other way":
        swap = {"language_model.model.": "model.language_model.", "vision": "model.vision"}
        swap |= {"multi": "model.multi", "language_model.lm_head": "lm_head"}
        if not older:
            swap = {new: old for old, new in swap.items()}
        for name in list(tensors):
            prefix = next(p for p in swap if name.startswith(p))
            tensors[swap[prefix] + name.removeprefix(prefix)] = tensors.pop(name)
        save_file(tensors, tmp_path / "copy/model.safetensors", {"format": "pt"})
    again = load(tmp_path / "copy")
    assert list(again.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(again.state_dict()[k], v) for k, v in ours.state_dict().items())


def test_our_folder_there(
    transformers: Any,
    make_pair: Callable[..., Any],
    draw: Callable[..., Tensor],
    within: Callable[..., None],
    family: str,
    tmp_path: Path,
) -> None:
    """What is written here transformers reads: the same configuration, weights and logits."""
    ours, theirs, truth, _ = make_pair(family)
    save_model(ours, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert type(again).__name__ == ours.config.family.architecture
    agree(ours.config, again.config)
    state = again.state_dict()
    assert all(torch.equal(state[name], v) for name, v in ours.state_dict().items())
    ids = draw()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
        within(ours(ids).logits, again(ids).logits, truth(ids).logits)
