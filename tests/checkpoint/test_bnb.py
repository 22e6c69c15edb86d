"""bitsandbytes' format: written here and read there, written there and read here, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.checkpoint import load_model, save_model
from lora_core.quant import NF4Linear


@pytest.fixture(scope="module", params=["nf4", "fp4"])
def written(
    request: pytest.FixtureRequest,
    llama_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A 4-bit folder that this library wrote."""
    out = tmp_path_factory.mktemp("bnb") / request.param
    save_model(load_model(llama_folder, quantize=request.param), out, llama_folder, quantized=True)
    return out


def layers(model: torch.nn.Module) -> dict[str, NF4Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}


def test_reading_back_gives_every_bit(written: Path, llama_folder: Path) -> None:
    again = load_model(written)
    model = load_model(llama_folder, quantize=written.name)
    ours, read = model.state_dict(), again.state_dict()
    assert ours.keys() == read.keys()
    assert all(torch.equal(ours[key], read[key]) for key in ours)
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == written.name
    assert config["load_in_4bit"] is True


@pytest.mark.oracle
def test_transformers_loads_it_with_the_same_bytes_and_logits(
    written: Path, oracle: Callable[[str], Any]
) -> None:
    oracle("bitsandbytes")
    theirs = oracle("transformers").AutoModelForCausalLM.from_pretrained(written)
    ours = load_model(written)
    found = dict(theirs.named_modules())
    for name, layer in layers(ours).items():
        assert torch.equal(found[name].weight.data.view(-1), layer.codes.view(-1))
    # their evaluation path repacks weights and computes in bfloat16 on some CPUs
    theirs.train()
    ids = torch.randint(3, 400, (2, 24))
    with torch.no_grad():
        got, want = ours(ids).logits, theirs(ids).logits
    exact = load_model(written).double()
    with torch.no_grad():
        truth = exact(ids).logits
    floor = 2 * torch.finfo(torch.float32).eps * truth.abs().max()
    # the float32 error of this library's own layers is the yardstick for theirs, and the reverse
    ours_off, theirs_off = ((t.double() - truth).abs().max() for t in (got, want))
    assert ours_off <= 2 * theirs_off + floor
    assert theirs_off <= 2 * ours_off + floor


@pytest.mark.oracle
@pytest.mark.parametrize("double_quant", [False, True])
def test_what_transformers_writes_is_read(
    double_quant: bool, llama_folder: Path, tmp_path: Path, oracle: Callable[[str], Any]
) -> None:
    oracle("bitsandbytes")
    transformers = oracle("transformers")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(llama_folder, quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    here = layers(load_model(llama_folder, quantize="nf4"))
    found = dict(theirs.named_modules())
    assert len(layers(ours)) == 21
    for name, layer in layers(ours).items():
        assert torch.equal(layer.codes.view(-1), found[name].weight.data.view(-1))
        assert torch.equal(layer.codes, here[name].codes)  # and what this library computes
        if not double_quant:
            assert torch.equal(layer.scales, found[name].weight.quant_state.absmax)


def spoil(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    return out


LAYER = "model.layers.0.mlp.up_proj"


def drop(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if k.startswith(f"{LAYER}.weight.{part}")]:
            del tensors[key]

    return change


def rewrite(**facts: object) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        (key,) = (k for k in tensors if k.startswith(f"{LAYER}.weight.quant_state"))
        state = json.loads(bytes(tensors[key].tolist())) | facts
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def state(text: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        (key,) = (k for k in tensors if k.startswith(f"{LAYER}.weight.quant_state"))
        tensors[key] = text

    return change


def cut(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = f"{LAYER}.weight{part}"
        tensors[key] = tensors[key][:-1].clone()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("absmax"), "incomplete: no absmax"),
        (drop("quant_state"), "incomplete: no quant_state"),
        (drop("nested_absmax"), "incomplete: no nested_absmax"),
        (rewrite(shape=[64, 128]), r"says it is \(64, 128\)"),
        (rewrite(shape=None), "unreadable quant_state"),
        (rewrite(blocksize=0), "unreadable quant_state.*block_size must be a power of two"),
        (rewrite(nested_blocksize=128), "nested_blocksize is 128"),
        (rewrite(nested_offset=None), "unreadable quant_state.*not 'NoneType'"),
        (rewrite(nested_offset="mean"), "unreadable quant_state.*'mean'"),
        (rewrite(nested_offset=float("nan")), "nested_offset is nan; the scales need a finite one"),
        (rewrite(blocksize=float("inf")), "unreadable quant_state.*infinity"),
        (state(torch.tensor(10**15)), r"unreadable quant_state.*torch.int64 \(\)"),
        (state(torch.zeros(4)), r"unreadable quant_state.*torch.float32 \(4,\)"),
        (state(torch.full((200_000,), ord("["), dtype=torch.uint8)), "unreadable quant_state"),
        (state(torch.zeros(4, dtype=torch.float8_e4m3fn)), "has dtype F8_E4M3, which no part of"),
        (cut(""), "codes should be 4096 of torch.uint8; got 4095"),
        (cut(".absmax"), "absmax should be 128"),
    ],
)
def test_a_spoilt_layer_is_named(
    change: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    written: Path,
    tmp_path: Path,
) -> None:
    folder = spoil(written, tmp_path / "spoilt", change)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert LAYER in str(caught.value)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.norm"])
def test_a_4_bit_weight_of_no_linear_layer_is_refused(
    name: str, written: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if k.startswith(f"{LAYER}.weight")]:
            tensors[key.replace(LAYER, name)] = tensors[key].clone()

    with pytest.raises(ValueError, match=f"holds a 4-bit {name}, which config.json has no place"):
        load_model(spoil(written, tmp_path / "spoilt", change))


def test_quantizing_again_and_other_codes_are_refused(
    written: Path, llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="already quantized"):
        load_model(written, quantize="nf4")
    with pytest.raises(ValueError, match="holds only nf4 and fp4"):
        save_model(load_model(llama_folder, quantize="int4"), tmp_path / "x", quantized=True)
    with pytest.raises(ValueError, match="no 4-bit layer"):
        save_model(load_model(llama_folder), tmp_path / "x", quantized=True)
    assert not (tmp_path / "x" / "config.json").exists()


def reconfigure(source: Path, out: Path, config: object) -> Path:
    spoil(source, out, lambda tensors: None)
    raw = json.loads((out / "config.json").read_text())
    raw.pop("quantization_config", None)
    raw |= {} if config is None else {"quantization_config": config}
    (out / "config.json").write_text(json.dumps(raw))
    return out


def test_config_and_weights_must_agree_on_4_bits(
    written: Path, llama_folder: Path, tmp_path: Path
) -> None:
    folder = reconfigure(written, tmp_path / "a", None)
    with pytest.raises(ValueError, match=r"holds .*absmax.*; it looks quantized, and config\.json"):
        load_model(folder)
    save_model(load_model(llama_folder), tmp_path / "dense")
    told = json.loads((written / "config.json").read_text())["quantization_config"]
    folder = reconfigure(tmp_path / "dense", tmp_path / "b", told)
    with pytest.raises(
        ValueError, match=r"in 4 bits \(quantization_config\), but none .* is: take"
    ):
        load_model(folder)


@pytest.mark.parametrize("told", ["bitsandbytes", ["bitsandbytes"], 4, {"load_in_4bit": True}])
def test_a_malformed_quantization_config_is_one_line(
    told: object, written: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"config\.json: quantization_config names"):
        load_model(reconfigure(written, tmp_path / "a", told))
