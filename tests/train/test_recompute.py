"""Activation checkpointing and resume on real architectures: transformers' and this library's."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.models import CausalLM, ModelConfig
from lora_core.train import TrainConfig, train
from lora_core.train.recompute import recomputed_layers, repeated_layers

SIZES = {
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_dropout": 0.1,
}


def build(kind: str, oracle: Callable[[str], ModuleType]) -> nn.Module:
    torch.manual_seed(0)
    if kind == "transformers":
        transformers = oracle("transformers")
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model = CausalLM(ModelConfig(**SIZES))
    model.init_weights()
    return model


def config(**kwargs: Any) -> TrainConfig:
    return TrainConfig(epochs=2, batch_size=3, accumulate=2, lr=1e-2, progress=False, **kwargs)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["lora_core", "transformers"])
@pytest.mark.usefixtures("no_plot")
def test_same_numbers_with_and_without_stopped_or_not(
    kind: str,
    oracle: Callable[[str], ModuleType],
    make_rows: Callable[..., Any],
    without_times: Callable[..., Any],
    tmp_path: Path,
) -> None:
    rows, models = make_rows(), [build(kind, oracle) for _ in range(4)]
    plain = train(models[0], rows, config())
    recomputed = train(models[1], rows, config(activation_checkpointing=True))

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 4:
            raise KeyboardInterrupt

    train(models[2], rows, config(out=tmp_path), on_step=stop)
    resumed = train(models[3], rows, config(out=tmp_path, resume=True))
    assert without_times(plain.history) == without_times(recomputed.history)
    assert without_times(plain.history) == without_times(resumed.history)
    for other in (models[1], models[3]):
        pairs = zip(models[0].parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["GPT2", "Falcon"])
def test_caches_that_layers_get_in_other_ways(
    family: str, oracle: Callable[[str], ModuleType]
) -> None:
    """GPT-2's layers take it by position, Falcon's under another name."""
    transformers = oracle("transformers")
    sizes = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    made = getattr(transformers, family + "Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(made).train()
    ids, mask = torch.arange(8)[None], torch.ones(1, 8)
    mask[0, :2] = 0  # without padding the operator's own causal path overlooks further keys

    def gradients(on: bool) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        with recomputed_layers(model, on):
            model(ids, attention_mask=mask, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def test_layers_are_the_longest_list_of_one_class() -> None:
    model = nn.Module()
    model.heads = nn.ModuleList([nn.Linear(1, 1)])
    model.mixed = nn.ModuleList([nn.Linear(1, 1), nn.Tanh(), nn.Tanh()])
    model.layers = nn.ModuleList([nn.Tanh(), nn.Tanh()])
    assert repeated_layers(model) == list(model.layers)


def test_layers_are_restored_after_an_error() -> None:
    model = nn.Sequential(nn.ModuleList([nn.Tanh()]))
    with pytest.raises(ZeroDivisionError), recomputed_layers(model):
        # raises only where the layer was replaced
        _ = 1 // ("forward" not in vars(model[0][0]))
    assert "forward" not in vars(model[0][0])


def test_a_forward_patched_on_the_instance_is_used_and_put_back() -> None:
    model = nn.Sequential(nn.ModuleList([nn.Tanh()]))
    layer = model[0][0]
    layer.forward = patched = lambda x: 2 * x
    x = torch.ones(1, requires_grad=True)
    with recomputed_layers(model):
        assert layer(x) == 2
    assert layer.forward is patched


def test_less_is_saved_for_backward(make_rows: Callable[..., Any]) -> None:
    model = CausalLM(ModelConfig(**SIZES | {"num_hidden_layers": 6}))
    ids = torch.randint(0, 17, (2, 32))

    def saved(on: bool) -> int:
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with (
            recomputed_layers(model, on),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            model(ids).logits.sum()
        return total

    assert saved(True) < saved(False) / 3


@pytest.mark.parametrize("batch", ["plain", "padded", "packed"])
def test_every_method_gives_the_same_bits(method: Any, batch: str) -> None:
    """Losses and gradients, dropout and rows of several documents included."""
    model = method.model(layers=2, attention_dropout=0.1)
    ids = torch.randint(0, 17, (2, 8))
    call = {"input_ids": ids, "labels": ids, "keep_logits": False}
    if batch == "padded":
        call["attention_mask"] = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    if batch == "packed":
        if method.name in ("prompt", "p-tuning"):
            pytest.skip("a prompt before packed rows is refused")
        call["document_ids"] = torch.tensor([[0] * 3 + [1] * 5, [0] * 8])

    def run(on: bool) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        with recomputed_layers(model, on):
            loss = model(**call).loss
            loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    plain, recomputed = run(False), run(True)
    assert len(plain) == len(recomputed) > 1
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("method", ["lora", "qlora", "prefix"], indirect=True)
def test_layers_run_twice_and_dropout_is_drawn_once(method: Any) -> None:
    """That the switch does something, and that a fault in it would show."""
    model, ids, calls = method.model(layers=3), torch.arange(12).view(2, 6), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with recomputed_layers(model):
        before = torch.get_rng_state()
        loss = model(ids, labels=ids).loss
        after = torch.get_rng_state()
        loss.backward()
    assert len(calls) == 6
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(before, after) == (method.name == "prefix")
