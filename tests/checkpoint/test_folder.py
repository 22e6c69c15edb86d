"""Model folders: what is written is read back; quantized on load; whatever is wrong is one line."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_core.checkpoint import load_model, load_state, save_model
from lora_core.models import CausalLM, ModelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(ModelConfig(**SIZES)).eval()


def same(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a
    )


@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 30_000, 1])
def test_round_trip(model: CausalLM, tmp_path: Path, max_shard_size: int) -> None:
    save_model(model, tmp_path / "a/b", max_shard_size=max_shard_size)
    files = sorted(file.name for file in (tmp_path / "a/b").iterdir())
    loaded = load_model(tmp_path / "a/b")
    assert same(model, loaded)
    assert not loaded.training
    assert loaded.config == dataclasses.replace(model.config, dtype="float32")
    assert dict(load_state(tmp_path / "a/b")).keys() == dict(model.named_parameters()).keys()
    if max_shard_size == 1:
        assert len(files) == 2 + len(list(model.parameters()))  # a tensor a file
    if max_shard_size == 5_000_000_000:
        assert files == ["config.json", "model.safetensors"]


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    tied=st.booleans(),
    bias=st.booleans(),
    shard=st.integers(1, 200_000),
)
def test_round_trip_of_any_kind(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, tied: bool, bias: bool, shard: int
) -> None:
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(**SIZES, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    model = CausalLM(config).to(dtype)
    save_model(model, folder, max_shard_size=shard)
    loaded = load_model(folder)
    assert same(model, loaded)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_files_are_what_safetensors_reads(model: CausalLM, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = model.bfloat16()
    save_model(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(state[name], p) for name, p in model.named_parameters())


def test_dtype_of_the_files_of_the_config_and_on_request(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path, dtype="bfloat16")
    assert load_model(tmp_path).model.norm.weight.dtype == torch.bfloat16
    wide = load_model(tmp_path, dtype="float32")
    assert same(wide.bfloat16(), load_model(tmp_path))
    assert load_model(tmp_path, dtype=torch.float16).config.dtype == "float16"
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"dtype": None}))
    assert load_model(tmp_path).config.dtype == "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(raw | {"dtype": "float32"}))
    assert load_model(tmp_path).config.dtype == "float32"


def test_weights_are_not_shared_with_the_file(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as stream:  # the same file, other bytes
        stream.write(bytes(path.stat().st_size))
    assert same(loaded, model)


def test_tokenizer_files_and_foreign_keys_come_along(
    model: CausalLM, tokenizer_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    save_model(model, source, source=tokenizer_folder)
    raw = json.loads((source / "config.json").read_text())
    raw |= {"house": "kept", "torch_dtype": "float16", "quantization_config": {}}
    raw |= {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}}
    (source / "config.json").write_text(json.dumps(raw))
    save_model(model, tmp_path / "copy", source=source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tokenizer_folder / name).read_bytes()
    copied = json.loads((tmp_path / "copy/config.json").read_text())
    assert copied["house"] == "kept"
    assert copied["dtype"] == "float32"
    assert not copied.keys() & {"torch_dtype", "quantization_config", "auto_map"}


def test_saving_over_a_model_leaves_no_stale_shard(model: CausalLM, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}")
    save_model(model, tmp_path, max_shard_size=20_000)
    save_model(model, tmp_path, source=tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
    ]
    save_model(model, tmp_path, max_shard_size=20_000)
    assert same(load_model(tmp_path), model)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_crash_leaves_the_old_model_the_new_one_or_none(tmp_path: Path) -> None:
    script = Path(__file__).with_name("crash_points.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch("o+-+n+", done.stdout), done.stdout


# --- quantized on load ---


@pytest.mark.parametrize("code", ["nf4", "fp4", "int4"])
def test_quantized_on_load_is_quantized_afterwards(
    model: CausalLM, tmp_path: Path, code: str
) -> None:
    from lora_core.quant import NF4Linear

    save_model(model, tmp_path, max_shard_size=50_000)
    loaded = load_model(tmp_path, quantize=code)
    for name, module in load_model(tmp_path).named_modules():
        found = loaded.get_submodule(name)
        if isinstance(module, nn.Linear) and name != "lm_head":
            expected = NF4Linear.from_linear(module, code=code)
            assert isinstance(found, NF4Linear)
            assert same(found, expected)
    assert type(loaded.lm_head) is nn.Linear
    assert loaded(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_a_quantized_model_is_saved_dense(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path / "a")
    quantized = load_model(tmp_path / "a", quantize="nf4", dtype="bfloat16")
    save_model(quantized, tmp_path / "b", dtype="float32")
    dense = load_model(tmp_path / "b")
    layer = quantized.model.layers[1].mlp.up_proj
    assert torch.equal(dense.model.layers[1].mlp.up_proj.weight, layer.dense_weight())
    save_model(quantized, tmp_path / "c")
    assert load_model(tmp_path / "c").model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_infinity_in_a_weight_is_named(model: CausalLM, tmp_path: Path) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("inf")
    save_model(model, tmp_path)
    load_model(tmp_path)
    with pytest.raises(ValueError, match=r"cannot quantize model\.layers\.1\.mlp\.up_proj"):
        load_model(tmp_path, quantize="nf4")


# --- what is wrong ---


def refused(folder: Path, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def rewrite(
    folder: Path, change: Callable[[dict[str, Any]], None], file: str = "model.safetensors"
) -> None:
    """Load a file's tensors, change the dictionary, write it back."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / file)
    change(state)
    save_file(state, folder / file)


def reconfigure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


UP = "model.layers.0.mlp.up_proj.weight"
TENSORS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda s: s.pop(UP), f"lacks tensor {UP}, which config.json calls for"),
    "many missing": (
        lambda s: [s.pop(n) for n in list(s) if "mlp" in n],
        r"lacks 6 tensors \(.*, …\)",
    ),
    "no head": (lambda s: s.pop("lm_head.weight"), "a tied head needs tie_word_embeddings"),
    "unexpected": (lambda s: s.update(extra=torch.zeros(1)), "holds tensor extra, which"),
    "shape": (
        lambda s: s.update({UP: torch.zeros(96, 63)}),
        rf"model.safetensors: tensor {UP} has shape \(96, 63\); config.json calls for \(96, 64\)",
    ),
    "transposed": (lambda s: s.update({UP: torch.zeros(64, 96)}), r"has shape \(64, 96\)"),
    "integers": (
        lambda s: s.update({UP: torch.zeros(96, 64, dtype=torch.int64)}),
        rf"tensor {UP} has dtype I64; weights must be one of",
    ),
    "8-bit floats": (
        lambda s: s.update({UP: torch.zeros(96, 64, dtype=torch.float8_e4m3fn)}),
        rf"tensor {UP} has dtype F8_E4M3; weights",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(model: CausalLM, tmp_path: Path, case: str) -> None:
    save_model(model, tmp_path)
    change, message = TENSORS[case]
    rewrite(tmp_path, change)
    refused(tmp_path, ValueError, message)


def test_old_rotary_frequencies_are_let_pass(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    rewrite(
        tmp_path,
        lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    )
    assert same(load_model(tmp_path), model)


def test_tied_checkpoint_that_ships_a_head(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    reconfigure(tmp_path, tie_word_embeddings=True)
    refused(tmp_path, ValueError, "ties the head.*lm_head.weight differs from model.embed_tokens")
    rewrite(
        tmp_path, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()})
    )
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header's JSON and keep the data."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    parsed = json.loads(content[8 : 8 + length])
    change(parsed)
    text = json.dumps(parsed).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "begins elsewhere": (
        lambda h: h[UP].update(data_offsets=[n + 4 for n in h[UP]["data_offsets"]]),
        "begins at .*, should at",
    ),
    "overlap": (lambda h: h.update(b=dict(h[UP])), "begins at .*, should at"),
    "size": (
        lambda h: h[UP].update(shape=[96, 65]),
        rf"{UP} of shape \(96, 65\).* takes 24960 bytes",
    ),
    "negative": (lambda h: h[UP].update(shape=[-96, -64]), f"entry of tensor {UP} is malformed"),
    "no dtype": (lambda h: h[UP].pop("dtype"), f"entry of tensor {UP} is malformed"),
    "offsets": (lambda h: h[UP].update(data_offsets=[1]), f"entry of tensor {UP} is malformed"),
    "no object": (lambda h: h.update({UP: 5}), f"entry of tensor {UP} is malformed"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_crafted_headers(model: CausalLM, tmp_path: Path, case: str) -> None:
    save_model(model, tmp_path)
    header(tmp_path, HEADERS[case][0])
    refused(tmp_path, ValueError, HEADERS[case][1])


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda b: b[:-1], r"truncated or has trailing bytes: \d+ bytes of data"),
    "truncated in the header": (lambda b: b[:100], "is truncated: 100 bytes, of which the header"),
    "empty": (lambda b: b"", "is truncated: 0 bytes"),
    "longer": (lambda b: b + b"x", "truncated or has trailing bytes"),
    "pointer": (
        lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "model.safetensors is a Git LFS pointer, not the weights: run `git lfs pull`",
    ),
    "zip": (
        lambda b: b"PK\x03\x04\xff\xff\xff\x7f" + b,
        "no safetensors file: its header would be",
    ),
    "header not JSON": (lambda b: b[:8] + b"[" + b[9:], "header of .* is not valid JSON"),
    "header not text": (lambda b: b[:8] + b"\xff" + b[9:], "header of .* is not valid JSON"),
    "header no object": (
        lambda b: (4).to_bytes(8, "little") + b"[1] ",
        "header of .* must hold a JSON object; got list",
    ),
    "name twice": (
        lambda b: (16).to_bytes(8, "little") + b'{"a": 1, "a": 2}',
        "is not valid JSON: the key a is there twice",
    ),
    "deep": (
        lambda b: (100_000).to_bytes(8, "little") + b"[" * 100_000,
        "header of .* is not valid JSON",
    ),
}


@pytest.mark.parametrize("case", BYTES)
def test_crafted_bytes(model: CausalLM, tmp_path: Path, case: str) -> None:
    save_model(model, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(BYTES[case][0](path.read_bytes()))
    refused(tmp_path, ValueError, BYTES[case][1])


def reindex(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def shard_of(folder: Path, name: str) -> str:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return str(index["weight_map"][name])


INDEXES: dict[str, tuple[Callable[[dict[str, str]], Any], type[Exception], str]] = {
    "parent": (lambda m: m.update({UP: "../x.safetensors"}), ValueError, "outside the folder"),
    "absolute": (lambda m: m.update({UP: "/x.safetensors"}), ValueError, "outside the folder"),
    "backslash": (lambda m: m.update({UP: "..\\x.safetensors"}), ValueError, "outside the folder"),
    "subfolder": (lambda m: m.update({UP: "a/x.safetensors"}), ValueError, "outside the folder"),
    "pickle": (lambda m: m.update({UP: "x.bin"}), ValueError, "'x.bin', which is no safetensors"),
    "number": (lambda m: m.update({UP: 5}), ValueError, "to 5, which is no safetensors file"),
    "absent file": (
        lambda m: m.update({UP: "x.safetensors"}),
        FileNotFoundError,
        "x.safetensors is missing: model.safetensors.index.json names it",
    ),
    "absent tensor": (
        lambda m: m.update(ghost=m[UP]),
        ValueError,
        "says tensor ghost is in .*, but it is not there",
    ),
    "another file": (
        lambda m: m.update({UP: m["lm_head.weight"]}),
        ValueError,
        f"says tensor {UP} is in .*, but it is not there",
    ),
    "not listed": (lambda m: m.pop(UP), ValueError, f"holds tensor {UP}, which .* does not list"),
    "empty": (lambda m: m.clear(), ValueError, "has no weight_map"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_crafted_indexes(model: CausalLM, tmp_path: Path, case: str) -> None:
    save_model(model, tmp_path, max_shard_size=60_000)
    reindex(tmp_path, INDEXES[case][0])
    refused(tmp_path, *INDEXES[case][1:])


def test_missing_shard(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path, max_shard_size=60_000)
    (tmp_path / shard_of(tmp_path, UP)).unlink()
    refused(tmp_path, FileNotFoundError, rf"{shard_of(tmp_path, UP)} is missing")


def test_tensor_in_two_shards(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path, max_shard_size=60_000)
    rewrite(
        tmp_path,
        lambda s: s.update({UP: torch.zeros(96, 64)}),
        shard_of(tmp_path, "lm_head.weight"),
    )
    refused(tmp_path, ValueError, f"tensor {UP} is in both model-.*safetensors and model-")


def test_index_that_is_no_json(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path, max_shard_size=60_000)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    refused(tmp_path, ValueError, r"index\.json is not valid JSON")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_is_refused_with_the_reason(model: CausalLM, tmp_path: Path, name: str) -> None:
    save_model(model, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    refused(tmp_path, ValueError, rf"pickle \({name}\), which can run code.*: refused")


def test_pickle_beside_safetensors_is_not_looked_at(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04 not read")
    assert same(load_model(tmp_path), model)


def test_folders_without_weights(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    path = tmp_path / "model.safetensors"
    path.rename(tmp_path / "weights.safetensors")
    refused(tmp_path, FileNotFoundError, "neither model.safetensors nor .*, only other files")
    (tmp_path / "weights.safetensors").rename(tmp_path / "adapter_model.safetensors")
    refused(tmp_path, FileNotFoundError, "holds an adapter, not a model")
    (tmp_path / "adapter_model.safetensors").unlink()
    refused(tmp_path, FileNotFoundError, r"has no model\.safetensors: no weights")
    refused(tmp_path / "absent", FileNotFoundError, r"has no config\.json")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        next(load_state(tmp_path / "absent"))


@pytest.mark.parametrize("told", [{"quant_method": "gptq"}, {"quant_method": "bitsandbytes"}, "x"])
def test_other_quantized_folders_are_refused(model: CausalLM, tmp_path: Path, told: object) -> None:
    save_model(model, tmp_path)
    reconfigure(tmp_path, quantization_config=told)
    refused(tmp_path, ValueError, "known is bitsandbytes in 4 bits")


def test_options(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    with pytest.raises(
        ValueError, match="quantize must be one of nf4, fp4, int4, or None; got 'nf8'"
    ):
        load_model(tmp_path, quantize="nf8")
    for dtype in ("int8", torch.int8):
        with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16"):
            load_model(tmp_path, dtype=dtype)
        with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16"):
            save_model(model, tmp_path, dtype=dtype)
    with pytest.raises(ValueError, match="max_shard_size must be at least 1; got 0"):
        save_model(model, tmp_path, max_shard_size=0)
    with pytest.raises(TypeError, match="this library's models; got Linear"):
        save_model(nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="nothing to copy a tokenizer from"):
        save_model(model, tmp_path / "b", source=tmp_path / "absent")
    with pytest.raises(FileExistsError, match=r"model\.safetensors is a file; name a folder"):
        save_model(model, tmp_path / "model.safetensors")
    assert not (tmp_path / "b").exists()


def test_models_that_config_json_does_not_describe(model: CausalLM, tmp_path: Path) -> None:
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 97, bias=False)
    with pytest.raises(ValueError, match=rf"{UP} should be .* \(96, 64\); got shape \(97, 64\)"):
        save_model(model, tmp_path / "b")
    model.model.layers[0].mlp.up_proj = nn.Sequential(nn.Linear(64, 96))
    with pytest.raises(ValueError, match=r"up_proj\.0\): merge and unload adapters before saving"):
        save_model(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_head_of_its_own_is_not_lost_under_a_tied_configuration(tmp_path: Path) -> None:
    config = ModelConfig(**SIZES, tie_word_embeddings=True)
    model = CausalLM(config)
    head = model.lm_head.weight.detach()
    model.lm_head.weight = nn.Parameter(2 * head)
    with pytest.raises(ValueError, match=r"weight of its own.*set it to False.*tie_weights\(\)"):
        save_model(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    model.config = dataclasses.replace(config, tie_word_embeddings=False)
    save_model(model, tmp_path / "b")
    assert same(load_model(tmp_path / "b"), model)
    model.config, model.lm_head.weight = config, nn.Parameter(head.clone())
    save_model(model, tmp_path / "c")  # a copy says nothing new
    assert torch.equal(load_model(tmp_path / "c").lm_head.weight, head)


def test_a_failed_save_leaves_the_old_model(
    model: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model, tmp_path)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_core.checkpoint.saving.write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(CausalLM(model.config), tmp_path)
    monkeypatch.undo()
    assert same(load_model(tmp_path), model)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
