"""Folders of transformers' and of bitsandbytes', of shapes that differ: loaded, and written back.

Widths are whole blocks of 64: with others bitsandbytes' CPU kernels read wrong scales.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora_core.checkpoint import SafetensorsFolder, load_model, save_model
from lora_core.checkpoint.filling import Filler
from lora_core.checkpoint.layout import lay_out
from lora_core.quant import NF4Linear

pytestmark = pytest.mark.oracle

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# biases; fused projections; norms of q and k, tied
FAMILIES = {"Qwen2": "Qwen2Config", "Phi3": "Phi3Config", "Gemma3": "Gemma3TextConfig"}


@pytest.fixture(scope="module")
def transformers(oracle: Callable[[str], ModuleType]) -> ModuleType:
    found = oracle("transformers")
    found.utils.logging.disable_progress_bar()
    return found


def make(transformers: ModuleType, family: str) -> Any:
    """A random model, its biases and norms not at their start."""
    sizes = SIZES | ({} if family == "Phi3" else {"head_dim": 16})
    torch.manual_seed(2)
    config = getattr(transformers, FAMILIES[family])(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def near(got: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Both are float32 computations of the same: each within twice the other, and two roundings."""
    floor = 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    ours_off, theirs_off = ((t.double() - exact).abs().max() for t in (got, theirs))
    assert ours_off <= 2 * theirs_off + floor
    assert theirs_off <= 2 * ours_off + floor


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_4_bit_folders_written_here_are_read_there(
    family: str, transformers: ModuleType, oracle: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    oracle("bitsandbytes")
    make(transformers, family).save_pretrained(tmp_path / "a")
    ours = load_model(tmp_path / "a", quantize="nf4")
    save_model(ours, tmp_path / "b", source=tmp_path / "a", quantized=True)
    again = load_model(tmp_path / "b")
    assert all(
        torch.equal(left, right)
        for left, right in zip(ours.state_dict().values(), again.state_dict().values(), strict=True)
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    theirs.train()  # their evaluation repacks weights and computes in bfloat16 on some CPUs
    ids = torch.randint(3, 60, (2, 9))
    near(again(ids).logits, theirs(ids).logits, load_model(tmp_path / "b").double()(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_4_bit_folders_written_there_are_read_here(
    family: str, transformers: ModuleType, oracle: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    oracle("bitsandbytes")
    make(transformers, family).save_pretrained(tmp_path / "a")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path / "a", quantization_config=config)
    theirs.save_pretrained(tmp_path / "b")
    ours = load_model(tmp_path / "b")
    found = dict(theirs.named_modules())
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, NF4Linear)}
    assert len(layers) == 2 * (4 if family == "Phi3" else 7)
    for name, layer in layers.items():
        assert torch.equal(layer.codes.view(-1), found[name].weight.data.view(-1))
        assert torch.equal(layer.scales, found[name].weight.quant_state.absmax)
        assert (layer.bias is None) == (found[name].bias is None)
    for name, parameter in ours.named_parameters():
        if parameter.is_floating_point():
            assert torch.equal(parameter, theirs.get_parameter(name).float())


def wrapper(transformers: ModuleType, kind: str) -> Any:
    """A multimodal model with a vision tower of one layer."""
    text = SIZES | {"head_dim": 16}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(3)
    if kind == "Gemma3":
        config = transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(**text),
            vision_config=transformers.SiglipVisionConfig(**vision),
            mm_tokens_per_image=4,
            image_token_index=60,
            boi_token_index=61,
            eoi_token_index=62,
        )
    else:
        config = transformers.Mistral3Config(
            text_config=transformers.MistralConfig(**text),
            vision_config=transformers.PixtralVisionConfig(**vision, head_dim=8),
            image_token_index=60,
            tie_word_embeddings=kind == "Mistral3-tied",
        )
    name = f"{kind.partition('-')[0]}ForConditionalGeneration"
    return getattr(transformers, name)(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("older", [True, False], ids=["older-names", "newer-names"])
@pytest.mark.parametrize("kind", ["Gemma3", "Mistral3-tied", "Mistral3-untied"])
def test_the_text_part_of_multimodal_models(
    kind: str, older: bool, transformers: ModuleType, tmp_path: Path
) -> None:
    theirs = wrapper(transformers, kind)
    theirs.save_pretrained(tmp_path / "a", save_original_format=older)
    with safe_open(tmp_path / "a/model.safetensors", "pt") as file:
        assert any(name.startswith("language_model.model.") for name in file.keys()) == older  # noqa: SIM118
    with pytest.warns(UserWarning, match=r"left out \(multi_modal_projector, vision_tower\)"):
        ours = load_model(tmp_path / "a")
    ids = torch.randint(3, 60, (2, 9))
    truth = theirs.double()(ids).logits
    near(ours(ids).logits, theirs.float()(ids).logits, truth)
    save_model(ours, tmp_path / "b", source=tmp_path / "a")
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    near(text(ids).logits, theirs(ids).logits, truth)
    raw = json.loads((tmp_path / "b/config.json").read_text())
    assert raw["architectures"] == [
        f"{kind.partition('-')[0].replace('Mistral3', 'Mistral')}ForCausalLM"
    ]


@pytest.mark.parametrize("stacked", [False, True], ids=["one-by-one", "stacked"])
def test_experts_are_read_as_transformers_reads_them(
    stacked: bool, transformers: ModuleType, tmp_path: Path
) -> None:
    sizes = SIZES | {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4}
    config = transformers.Qwen3MoeConfig(**sizes, num_experts_per_tok=2)
    theirs = transformers.Qwen3MoeForCausalLM(config)
    theirs.save_pretrained(tmp_path, save_original_format=not stacked)
    with torch.device("meta"):
        empty = transformers.Qwen3MoeForCausalLM(config)
    with SafetensorsFolder(tmp_path) as folder:
        layout, _ = lay_out(empty, folder, {}, False)
        assert len(layout.dense["model.layers.1.mlp.experts.gate_up_proj"]) == (1 if stacked else 8)
        Filler(empty, folder, None, torch.float32, torch.device("cpu")).fill(layout)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, empty.get_parameter(name)), name
