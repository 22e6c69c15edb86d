"""Counts of parameters and bytes that can be looked up or done by hand."""

import pytest
import torch

from lora_core.adapters import LoRAConfig
from lora_core.models import CausalLM, ModelConfig
from lora_core.plan import known_models, plan
from lora_core.plan.empty import empty_model
from lora_core.quant import quantize_model
from lora_core.train import TrainConfig

# as their makers' checkpoints hold them
PUBLISHED = {
    "1B": 1_235_814_400,
    "7B": 6_738_415_616,
    "8B": 8_030_261_248,
    "13B": 13_015_864_320,
    "65B": 65_285_660_672,
    "70B": 68_976_648_192,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_built_in_sizes_have_the_published_parameters(name: str) -> None:
    _, config = known_models()[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in CausalLM(config).parameters()) == PUBLISHED[name]


def test_every_built_in_size_is_checked() -> None:
    assert known_models().keys() == PUBLISHED.keys()


def test_8b_at_rank_16_by_hand() -> None:
    config = known_models()["8B"][1]
    told = plan(config, "qlora", train=TrainConfig(batch_size=1), tokens=64)
    square, narrow = 16 * (4096 + 4096), 16 * (4096 + 1024)
    wide = 16 * (4096 + 14336)
    trained = 32 * (2 * square + 2 * narrow + 3 * wide)
    assert told.parameters == PUBLISHED["8B"]
    assert told.trainable == trained == 41_943_040
    assert told.parts["adapter"] == told.parts["gradients"] == 4 * trained
    assert told.parts["optimizer"] == pytest.approx(8 * trained, rel=1e-5)
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    # a code of 4 bits, a scale byte per 64 weights, 4 bytes per 256 scales, an offset a layer
    packed = linear // 2 + linear // 64 + 4 * linear // (64 * 256) + 4 * 7 * 32
    assert told.parts["4-bit weights"] == packed
    dense = 2 * 128256 * 4096 + (2 * 32 + 1) * 4096
    assert told.parts["weights"] == pytest.approx(2 * dense, rel=1e-4)  # and tables of constants


def test_full_training_by_hand() -> None:
    config = known_models()["8B"][1]
    told = plan(config, "full", train=TrainConfig(batch_size=1), tokens=64)
    assert told.trainable == told.parameters
    assert told.parts["weights"] == pytest.approx(4 * told.parameters, rel=1e-6)
    assert told.parts["gradients"] == 4 * told.parameters
    assert told.parts["optimizer"] == pytest.approx(8 * told.parameters, rel=1e-6)
    assert told.parts["adapter"] == told.parts["4-bit weights"] == 0


def small(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_an_empty_model_is_the_quantized_one(tied: bool, biased: bool) -> None:
    config = small(tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased)
    real = CausalLM(config).to(torch.bfloat16)
    quantize_model(real)
    real.requires_grad_(False)
    empty = empty_model(config, "qlora", LoRAConfig(r=4, targets=["q_proj"]), torch.bfloat16)
    held = {name.replace(".base.", "."): t for name, t in empty.state_dict().items()}
    for name, tensor in real.state_dict().items():
        assert held[name].shape == tensor.shape, name
        assert held[name].dtype == tensor.dtype, name
    assert all(t.is_meta for t in empty.parameters())


def test_layers_are_extended_exactly() -> None:
    # five layers from two and three, against five
    settings = {"train": TrainConfig(batch_size=2), "tokens": 32, "device": "cpu"}
    for method in ("full", "lora", "qlora"):
        extended = plan(small(), method, LoRAConfig(r=4), **settings)  # type: ignore[arg-type]
        # a pattern that holds a digit makes the plan take all layers
        pattern = r".*[a-z0-9]+_proj"
        direct = plan(small(), method, LoRAConfig(r=4, targets=pattern), **settings)  # type: ignore[arg-type]
        assert extended.parts == direct.parts
        assert extended.phases == direct.phases
        assert extended.trainable == direct.trainable


def test_an_adapter_on_one_layer_is_counted_once() -> None:
    config = small()
    one = plan(config, "lora", LoRAConfig(r=4, targets=["layers.3.self_attn.q_proj"]), tokens=16)
    assert one.trainable == 4 * (64 + 64)
    some = LoRAConfig(r=4, targets=["q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 8})
    assert plan(config, "lora", some, tokens=16).trainable == (4 * 4 + 8) * (64 + 64)
