"""config.json: both dialects, defaults, and one line for everything that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_core.models import ModelConfig
from lora_core.models.build import read_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def raw(sizes: dict[str, Any]) -> dict[str, Any]:
    return sizes | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def test_absent_keys_take_the_defaults(raw: dict[str, Any]) -> None:
    for key in ("num_key_value_heads", "bos_token_id", "eos_token_id"):
        del raw[key]
    config = ModelConfig.from_dict(raw)
    assert config.heads == (4, 4, 8)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert config.rms_norm_eps == 1e-6
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.dtype is None
    assert not config.tie_word_embeddings


def test_old_and_new_dialect_are_one(raw: dict[str, Any]) -> None:
    new = raw | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "dtype": "bfloat16"}
    old = raw | {"rope_theta": 5e5, "rope_scaling": dict(LLAMA3), "torch_dtype": "bfloat16"}
    older = old | {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_type"}}
    older["rope_scaling"]["type"] = "llama3"
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(old) == ModelConfig.from_dict(older)
    assert ModelConfig.from_dict(raw | {"rope_scaling": None}).rope_parameters["rope_theta"] == 1e4


def test_llama3_context_defaults_to_max_position_embeddings(raw: dict[str, Any]) -> None:
    scaling = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    config = ModelConfig.from_dict(raw | {"rope_scaling": scaling, "max_position_embeddings": 99})
    assert config.rope_parameters["original_max_position_embeddings"] == 99


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (7, (7,)), ([7, 9], (7, 9))])
def test_eos_is_none_one_or_several(raw: dict[str, Any], value: Any, ids: tuple[int, ...]) -> None:
    config = ModelConfig.from_dict(raw | {"eos_token_id": value})
    assert config.eos_token_ids == ids
    assert config.to_dict()["eos_token_id"] == value


def test_family_by_architecture_alone(raw: dict[str, Any]) -> None:
    del raw["model_type"]
    assert ModelConfig.from_dict(raw).model_type == "llama"


def test_to_dict_reads_back(raw: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(
        raw | {"eos_token_id": [3, 4], "rope_scaling": dict(LLAMA3), "dtype": "float16"}
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_readers_of_the_older_dialect_find_the_scaling(raw: dict[str, Any]) -> None:
    written = ModelConfig.from_dict(raw | {"rope_scaling": dict(LLAMA3), "rope_theta": 5e5})
    old = written.to_dict()
    del old["rope_parameters"]
    assert old["rope_scaling"] == LLAMA3
    assert ModelConfig.from_dict(old) == written
    assert "rope_scaling" not in ModelConfig.from_dict(raw).to_dict()


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"architectures": ["FalconForCausalLM"]}, ValueError, "'Falcon.*known: .*LlamaForCausalLM"),
    ({"architectures": "LlamaForCausalLM"}, ValueError, "architecture 'LlamaForCausalLM'"),
    ({"model_type": "falcon"}, ValueError, "model_type 'falcon'.*known: .*llama"),
    ({"vocab_size": None}, ValueError, "key vocab_size is missing"),
    ({"hidden_size": "32"}, TypeError, "hidden_size must be of type int; got '32'"),
    ({"hidden_size": 32.0}, TypeError, "hidden_size must be of type int; got 32.0"),
    ({"num_hidden_layers": True}, TypeError, "num_hidden_layers must be of type int; got True"),
    ({"num_hidden_layers": 0}, ValueError, "num_hidden_layers must be at least 1; got 0"),
    ({"num_attention_heads": 0}, ValueError, "num_attention_heads must be at least 1; got 0"),
    ({"num_key_value_heads": 3}, ValueError, "4 is no multiple of num_key_value_heads 3"),
    ({"hidden_size": 30}, ValueError, "30 is no multiple of num_attention_heads 4: give head_dim"),
    ({"head_dim": 7}, ValueError, "head_dim must be even.*got 7"),
    ({"rms_norm_eps": 0.0}, ValueError, "rms_norm_eps must be positive; got 0.0"),
    ({"rms_norm_eps": float("nan")}, ValueError, "rms_norm_eps must be positive; got nan"),
    ({"attention_dropout": 1.0}, ValueError, r"attention_dropout must lie in \[0, 1\); got 1.0"),
    ({"initializer_range": -1.0}, ValueError, "initializer_range must not be negative; got -1.0"),
    ({"hidden_act": "swish"}, ValueError, "hidden_act 'swish'.*known: gelu"),
    ({"dtype": "float8"}, ValueError, "dtype 'float8'.*known: bfloat16, float16, float32"),
    ({"dtype": 16}, TypeError, r"dtype must be of type str \| None; got 16"),
    ({"tie_word_embeddings": 1}, TypeError, "tie_word_embeddings must be of type bool; got 1"),
    ({"eos_token_id": ["2"]}, TypeError, "eos_token_id must hold int alone"),
    ({"num_hidden_layers": 10**6}, ValueError, "num_hidden_layers must be at most 10000"),
    ({"hidden_size": 2**40}, ValueError, "hidden_size must be at most 2147483647"),
    ({"text_config": 3, "model_type": "gemma3", "architectures": None}, TypeError, "text_config"),
    ({"model_type": "qwen2"}, ValueError, "LlamaForCausalLM.*'llama', and model_type is 'qwen2'"),
    ({"rope_parameters": 5}, TypeError, "rope_parameters must be an object; got 5"),
    ({"rope_scaling": {"type": "su"}}, ValueError, "rope_type 'su'.*known: default, .*llama3"),
    ({"rope_scaling": {"type": ["a"]}}, ValueError, r"rope_type \"\['a'\]\""),
    ({"rope_theta": -1.0}, ValueError, "'rope_theta'. must be a positive number.*got -1.0"),
    ({"rope_theta": "1e4"}, ValueError, "'rope_theta'. must be a positive number.*got '1e4'"),
    ({"rope_scaling": {"type": "llama3"}}, ValueError, "'factor'. must be a positive.*got None"),
    ({"rope_scaling": {"partial_rotary_factor": 0.5}}, ValueError, "partial_rotary_factor 0.5"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[str(case[0]) for case in BAD])
def test_what_is_wrong_is_named(
    raw: dict[str, Any], tmp_path: Path, change: dict[str, Any], kind: type, message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(kind, match=message) as caught:
        ModelConfig.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value)


def test_neither_model_type_nor_architectures(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="key model_type is missing"):
        ModelConfig.from_dict(sizes)


def test_contradicting_rope_type_is_checked_in_the_constructor(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="rope_type 'linear'"):
        ModelConfig(**sizes, rope_parameters={"rope_type": "linear"})


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        ModelConfig.from_folder(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{not json")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object; got list"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("names", [[], None])
def test_no_architecture_is_named(
    raw: dict[str, Any], names: list[str] | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw | {"architectures": names}))
    assert read_config(tmp_path) == ModelConfig.from_dict(raw)
