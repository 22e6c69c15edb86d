"""Mixtures of experts: the definition token by token, routing, balance, the compiler."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lora_core.checkpoint import load_model, save_model
from lora_core.models import CausalLM, ModelConfig
from lora_core.models.experts import ExpertMLP
from lora_core.models.routing import balance_loss, route
from lora_core.quant import quantize_model

MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
}


@pytest.fixture
def model(make_model: Callable[..., CausalLM]) -> CausalLM:
    return make_model(**MOE)


def by_hand(mlp: ExpertMLP, x: Tensor) -> Tensor:
    """Each token by itself, each expert's matrices by themselves."""
    out = torch.zeros_like(x)
    for place in torch.cartesian_prod(*map(torch.arange, x.shape[:-1])).tolist():
        row = x[tuple(place)]
        chances = (mlp.gate.weight @ row).softmax(-1)
        best = chances.topk(mlp.top_k)
        share = best.values / best.values.sum() if mlp.normalized else best.values
        for weight, expert in zip(share, best.indices, strict=True):
            gate, up = (mlp.experts.gate_up_proj[expert] @ row).chunk(2)
            inner = F.silu(gate) * up
            out[tuple(place)] += weight * (mlp.experts.down_proj[expert] @ inner)
    return out


@given(
    experts=st.integers(1, 6), data=st.data(), normalized=st.booleans(), seed=st.integers(0, 999)
)
def test_the_layer_is_its_definition(
    experts: int, data: st.DataObject, normalized: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    count = data.draw(st.integers(1, experts))
    sizes = MOE | {"num_experts": experts, "num_experts_per_tok": count}
    plain = dict.fromkeys(("vocab_size", "num_hidden_layers", "num_attention_heads"), 1)
    config = ModelConfig(
        **plain, hidden_size=8, intermediate_size=9, norm_topk_prob=normalized, **sizes
    )
    mlp = ExpertMLP(config)
    mlp.experts.init_weights(0.5)
    x = torch.randn(2, data.draw(st.integers(0, 3)), 8)
    ours = x.clone().requires_grad_()
    found = mlp(ours)
    truth = by_hand(copy.deepcopy(mlp).double(), x.double())
    assert found.shape == x.shape
    assert torch.allclose(found.double(), truth, atol=1e-5)
    if x.numel():
        own = x.clone().requires_grad_()
        parameters = list(mlp.parameters())
        wanted = torch.autograd.grad(by_hand(mlp, own).sin().sum(), (own, *parameters))
        given_ = torch.autograd.grad(found.sin().sum(), (ours, *parameters))
        for a, b in zip(given_, wanted, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_which_layers_have_experts(make_model: Callable[..., CausalLM]) -> None:
    sizes = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": (3,)}
    names = [name for name, _ in make_model(**MOE, **sizes).named_parameters()]
    assert [i for i in range(6) if f"model.layers.{i}.mlp.gate.weight" in names] == [1, 5]
    assert f"model.layers.{3}.mlp.gate_proj.weight" in names


def test_weights_are_chosen_in_float32_and_rounded_once() -> None:
    logits = torch.randn(50, 9)
    index, weights = route(logits.bfloat16(), 3, True)
    exact = logits.bfloat16().double().softmax(-1).gather(1, index)
    assert weights.dtype == torch.bfloat16
    wanted = (exact / exact.sum(-1, keepdim=True)).to(torch.float32).bfloat16()
    assert torch.equal(weights, wanted)


def test_even_use_costs_k_and_uneven_use_more() -> None:
    even = torch.eye(4).repeat(3, 1) * 1e-3
    assert balance_loss([even, even], 2, None) == pytest.approx(2, rel=0.2)
    assert balance_loss([torch.tensor([[9.0, 8, 0, 0]] * 5)], 2, None) > 3.9
    padded = torch.cat([even, torch.tensor([[9.0, 8, 0, 0]] * 4)])
    mask = torch.tensor([1] * 12 + [0] * 4).view(4, 4)
    assert balance_loss([padded], 2, mask) == pytest.approx(float(balance_loss([even], 2, None)))


def test_the_balance_loss_of_micro_batches_adds_up_to_one(model: CausalLM) -> None:
    """With `normalizer`, what a micro-batch adds is its share of the graded tokens."""
    ids = torch.randint(97, (2, 9))
    alone = model(ids, labels=ids, output_router_logits=True)
    plain = model(ids, labels=ids)
    added = float(model.config.router_aux_loss_coef * alone.aux_loss.detach())
    assert (alone.loss - plain.loss).item() == pytest.approx(added, rel=1e-2)
    half = model(ids, labels=ids, output_router_logits=True, normalizer=32.0)
    assert torch.allclose(half.loss, alone.loss / 2)


def test_it_is_refused_without_experts(make_model: Callable[..., CausalLM]) -> None:
    with pytest.raises(ValueError, match="output_router_logits: this llama has no experts"):
        make_model()(torch.ones(1, 2, dtype=torch.int64), output_router_logits=True)


def test_recomputing_layers_changes_no_gradient(model: CausalLM) -> None:
    ids = torch.randint(97, (2, 9))
    found = []
    for again in (False, True):
        model.train().zero_grad()
        model.gradient_checkpointing = again
        model(ids, labels=ids, output_router_logits=True).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("four_bit", [False, True])
def test_compiled_without_a_break(model: CausalLM, four_bit: bool) -> None:
    """Other tokens go to other experts, and nothing is compiled again."""
    if four_bit:
        quantize_model(model)
    mlp = model.get_submodule("model.layers.0.mlp")
    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for number in range(2):
        x = torch.randn(2, 7, 32, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            y = compiled(x)
        found = torch.autograd.grad(y.sin().sum(), x)[0]
        assert torch.allclose(y, mlp(x), atol=1e-6)
        assert torch.allclose(found, torch.autograd.grad(mlp(x).sin().sum(), x)[0], atol=1e-5)


def test_packed_rows_and_a_batch_give_the_same(model: CausalLM) -> None:
    a, b = torch.randint(97, (1, 6)), torch.randint(97, (1, 4))
    documents = torch.tensor([[0] * 6 + [1] * 4])
    packed = model(torch.cat([a, b], 1), document_ids=documents).logits
    alone = torch.cat([model(a).logits, model(b).logits], 1)
    assert torch.allclose(packed, alone, atol=1e-5)


def test_autocast_computes_in_its_dtype(model: CausalLM) -> None:
    x = torch.randn(2, 5, 32)
    mlp = model.get_submodule("model.layers.0.mlp")
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), mlp(x), atol=0.05)


def test_saved_in_4_bits_it_says_who_reads_it(model: CausalLM, tmp_path: Path) -> None:
    quantize_model(model)
    with pytest.warns(UserWarning, match="transformers 5 does not; for it save with quantized=Fa"):
        save_model(model, tmp_path, quantized=True)
    again = load_model(tmp_path)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    save_model(model, tmp_path)  # dense: nothing to say


def test_a_configuration_is_written_and_read_again() -> None:
    config = ModelConfig.from_dict(
        {
            "model_type": "qwen3_moe",
            "vocab_size": 9,
            "hidden_size": 8,
            "intermediate_size": 9,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_local_experts": 5,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 7,
        }
    )
    assert (config.num_experts, config.mlp_only_layers) == (5, (1,))
    assert config.kinds == ("sliding_attention",) * 3
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 is more than num_experts 6"),
        ({"moe_intermediate_size": None}, "num_experts needs moe_intermediate_size"),
        ({"num_experts": 0}, "num_experts must be at least 1; got 0"),
        ({"model_type": "qwen3"}, "num_experts is no key of qwen3's configuration"),
    ],
)
def test_messages(
    make_model: Callable[..., CausalLM], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**MOE | changes)
