"""4-bit matrices side by side: bytes, state, what use leaves alone, whole models."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.models import CausalLM, ModelConfig
from lora_core.models.experts import Experts, NF4Experts
from lora_core.quant import (
    NF4Stack,
    NF4Tensor,
    dequantize_model,
    quantize_4bit,
    quantize_model,
)

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "model_type": "qwen3_moe",
}


@pytest.fixture
def model() -> CausalLM:
    made = CausalLM(ModelConfig(**SIZES))
    made.init_weights(0.1)
    return made.eval()


def tensors(weight: NF4Tensor) -> list[Tensor]:
    every = (weight.packed, weight.scales, weight.scale_absmax, weight.scale_offset)
    return [t for t in every if t is not None]


@pytest.mark.parametrize(
    "options", [{}, {"double_quant": False}, {"code": "int4", "block_size": 128}]
)
@pytest.mark.parametrize("shape", [(6, 128), (5, 24), (3, 7)])
def test_each_matrix_has_the_bytes_that_it_has_alone(
    shape: tuple[int, int], options: dict[str, Any]
) -> None:
    weights = [quantize_4bit(torch.randn(shape), **options) for _ in range(3)]
    stack = NF4Stack(weights)
    for number, weight in enumerate(weights):
        for ours, theirs in zip(tensors(stack[number]), tensors(weight), strict=True):
            assert torch.equal(ours, theirs)
        dense = weight.dequantize()
        assert torch.equal(stack.layer(number).dense_weight(), dense)
        assert torch.equal(stack.dense()[number], dense)
    again = NF4Stack([quantize_4bit(torch.randn(shape), **options) for _ in range(3)])
    again.load_state_dict(stack.state_dict())
    assert torch.equal(again.dense(), stack.dense())


def test_no_use_changes_it() -> None:
    stack = NF4Stack([quantize_4bit(torch.randn(4, 64)) for _ in range(2)])
    before = copy.deepcopy(stack.state_dict())
    stack.half().to(torch.bfloat16).train().double().eval()
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())
    assert all(t.dtype == before[n].dtype for n, t in stack.state_dict().items())


def test_messages() -> None:
    with pytest.raises(ValueError, match="matrices of one shape and format; got 2"):
        NF4Stack([quantize_4bit(torch.randn(4, 64)), quantize_4bit(torch.randn(8, 64))])
    with pytest.raises(ValueError, match="one shape and format; got 0"):
        NF4Stack([])
    stack = NF4Stack([quantize_4bit(torch.randn(4, 64))])
    state = stack.state_dict() | {"scales": torch.zeros(1, 4)}
    with pytest.raises(RuntimeError, match=r"scales must be torch\.uint8; the state has"):
        stack.load_state_dict(state)


def test_quantize_model_takes_experts_and_leaves_the_router(model: CausalLM) -> None:
    dense = copy.deepcopy(model)
    report = quantize_model(model)
    assert "model.layers.1.mlp.experts" in report.modules
    assert report.kept["model.layers.1.mlp.gate"].startswith("the router")
    assert type(model.get_submodule("model.layers.1.mlp.gate")).__name__ == "Router"
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        experts, packed = dense.get_submodule(name), model.get_submodule(name)
        assert isinstance(experts, Experts)
        assert isinstance(packed, NF4Experts)
        for matrix, weight in experts.matrices().items():
            ours, alone = packed.matrix_layer(matrix).quantized, quantize_4bit(weight)
            assert all(map(torch.equal, tensors(ours), tensors(alone)))


def test_4_bit_experts_equal_their_dense_ones(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and the gradient for the embeddings: the definition expands and multiplies."""
    monkeypatch.setenv("LORA_KERNELS", "reference")
    quantize_model(model)
    dense = copy.deepcopy(model)
    names = dequantize_model(dense)
    assert "model.layers.0.mlp.experts" in names
    ids = torch.randint(97, (2, 13))
    results = []
    for each in (model, dense):
        x = each.model.embed_tokens.weight.detach()[ids].requires_grad_()
        logits = each(inputs_embeds=x).logits
        results.append((logits, torch.autograd.grad(logits.sin().sum(), x)[0]))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_experts_can_be_skipped_and_named(model: CausalLM) -> None:
    report = quantize_model(model, skip=["experts"])
    assert report.kept["model.layers.0.mlp.experts"] == "skipped"
    assert isinstance(model.get_submodule("model.layers.0.mlp.experts"), Experts)


def test_bad_values_are_found_before_anything_changes(model: CausalLM) -> None:
    with torch.no_grad():
        experts = model.get_submodule("model.layers.1.mlp.experts")
        experts.get_parameter("down_proj")[2, 1, 3] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        quantize_model(model)
    assert not any(isinstance(m, NF4Stack) for m in model.modules())
    assert sum(type(m) is nn.Linear for m in model.modules()) == 9


def test_bytes(model: CausalLM) -> None:
    """4 bits and a scale of 8 for 64 elements, and what all matrices have once each."""
    quantize_model(model)
    state = model.get_submodule("model.layers.0.mlp.experts").state_dict()
    elements = 4 * 3 * 24 * 64
    assert sum(t.nbytes for t in state.values()) == elements // 2 + elements // 64 + 12 * (4 + 4)
