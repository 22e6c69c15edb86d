"""One step: accumulation, clipping, what is refused."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_core.data import collate
from lora_core.device import dtype_policy
from lora_core.losses import masked_cross_entropy
from lora_core.train import CausalLoss, NonFiniteError, train_step


def run_step(
    model: nn.Module, batches: Sequence[Any], *, dtype: str = "float32", **kwargs: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One step at learning rate 0; the record, and the gradients as the optimizer saw them."""
    parameters = dict(model.named_parameters())
    gradients: dict[str, torch.Tensor] = {}

    class Keep(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            gradients.update({k: p.grad.clone() for k, p in parameters.items()})

    policy = dtype_policy(dtype, "cpu")
    record = train_step(
        model,
        parameters,
        batches,
        Keep(parameters.values(), lr=0.0),
        torch.amp.GradScaler("cpu", enabled=policy.scales_loss),
        policy,
        **{"loss": CausalLoss(), "clip": None, **kwargs},
    )
    return record, gradients


@given(st.integers(0, 10**6))
def test_however_the_rows_are_cut_the_gradient_is_the_same(
    tiny: Callable[..., nn.Module], make_rows: Callable[..., Any], seed: int
) -> None:
    model, rows = tiny(dropout=0.0).double(), make_rows(8, seed)
    whole = collate(rows)
    logits = model(whole["input_ids"]).logits
    loss = masked_cross_entropy(logits, whole["labels"])
    truth = torch.autograd.grad(loss, list(model.parameters()))
    for size in (1, 2, 4, 8):
        batches = [collate(rows[i : i + size]) for i in range(0, 8, size)]
        record, gradients = run_step(model, batches)
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-12)
        assert record["graded"] == int((whole["labels"][:, 1:] != -100).sum())
        assert record["tokens"] == int(whole["attention_mask"].sum())
        for mine, theirs in zip(gradients.values(), truth, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in truth))
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-10)


def test_a_mean_of_means_would_be_another_gradient(
    tiny: Callable[..., nn.Module], make_rows: Callable[..., Any]
) -> None:
    model, rows = tiny(dropout=0.0), make_rows(8)
    batches = [collate([row]) for row in rows]
    right, _ = run_step(model, batches)

    def mean_of_means(model: nn.Module, batch: Any, normalizer: float) -> torch.Tensor:
        logits = model(batch["input_ids"]).logits
        return masked_cross_entropy(logits, batch["labels"]) / len(batches)

    wrong, _ = run_step(model, batches, loss=mean_of_means)
    assert abs(right["loss"] - wrong["loss"]) > 1e-3


@pytest.mark.parametrize("clip", [1e-2, 1e9])
def test_clipping(
    tiny: Callable[..., nn.Module], make_rows: Callable[..., Any], clip: float
) -> None:
    model, batch = tiny(dropout=0.0), collate(make_rows(4))
    record, plain = run_step(model, [batch])
    clipped_record, clipped = run_step(model, [batch], clip=clip)
    assert clipped_record["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-6)
    factor = min(1.0, clip / (record["grad_norm"] + 1e-6))
    for name, gradient in plain.items():
        torch.testing.assert_close(clipped[name], gradient * factor, rtol=1e-5, atol=0)


def test_no_graded_token_moves_nothing(
    tiny: Callable[..., nn.Module], make_rows: Callable[..., Any]
) -> None:
    batch = collate(make_rows(3))
    batch["labels"].fill_(-100)
    record, gradients = run_step(tiny(), [batch])
    assert (record["loss"], record["graded"], record["grad_norm"]) == (0.0, 0, 0.0)
    assert not any(gradient.any() for gradient in gradients.values())


def test_loss_by_source(tiny: Callable[..., nn.Module], make_rows: Callable[..., Any]) -> None:
    model, rows = tiny(dropout=0.0), make_rows(6)
    batches = [collate(rows[:4]) | {"source": list("xyxy")}, collate(rows[4:]) | {"source": "yz"}]
    record, _ = run_step(model, batches)
    for source, chosen in {"x": [0, 2], "y": [1, 3, 4], "z": [5]}.items():
        alone, _ = run_step(model, [collate([rows[i] for i in chosen])])
        assert record[f"loss/{source}"] == pytest.approx(alone["loss"], rel=1e-6)


def test_a_parameter_that_is_not_reached_is_named(
    tiny: Callable[..., nn.Module], make_rows: Callable[..., Any]
) -> None:
    model = tiny()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"2 of 11 trained parameters got no gradient: unused.weight, unused.bias"
    ):
        run_step(model, [collate(make_rows(2))])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(
    tiny: Callable[..., nn.Module], make_rows: Callable[..., Any], value: float
) -> None:
    model, batches = tiny(), [collate(make_rows(2)), collate(make_rows(3))]
    calls = []

    def loss(model: nn.Module, batch: Any, normalizer: float) -> torch.Tensor:
        calls.append(batch)
        good, _ = CausalLoss()(model, batch, normalizer)
        return good * (value if len(calls) == 2 else 1.0)

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError, match=f"the loss is {value}") as caught:
        run_step(model, batches, loss=loss)
    assert caught.value.batches == [batches[1]]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_gradient_that_is_not_finite_stops(
    tiny: Callable[..., nn.Module], make_rows: Callable[..., Any]
) -> None:
    def loss(model: nn.Module, batch: Any, normalizer: float) -> torch.Tensor:
        good, _ = CausalLoss()(model, batch, normalizer)
        zero = (model.head.bias - model.head.bias).sum()
        return good + zero.sqrt()  # 0, with gradient 0 / 0

    with pytest.raises(NonFiniteError, match="the gradient's norm is nan"):
        run_step(tiny(), [collate(make_rows(2))], loss=loss)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_computation_keeps_wide_gradients(
    tiny: Callable[..., nn.Module], make_rows: Callable[..., Any], dtype: str
) -> None:
    model, batch = tiny(dropout=0.0), collate(make_rows(4))
    wide, truth = run_step(model, [batch])
    seen = []
    hook = model.layers[0][0].register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    narrow, gradients = run_step(model, [batch], dtype=dtype)
    hook.remove()
    assert seen == [getattr(torch, dtype)]
    # four products in a row, each rounded to 8 (bfloat16) or 11 bits
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert narrow["loss"] == pytest.approx(wide["loss"], rel=8 * eps)
    for name, gradient in gradients.items():
        assert gradient.dtype is torch.float32
        assert (gradient - truth[name]).norm() <= 16 * eps * truth[name].norm()


def test_loss_scaling_skips_an_overflow_and_halves(
    tiny: Callable[..., nn.Module], make_rows: Callable[..., Any]
) -> None:
    model, batch = tiny(dropout=0.0), collate(make_rows(4))
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    policy = dtype_policy("float16", "cpu")
    before = copy.deepcopy(model.state_dict())
    record = train_step(model, parameters, [batch], optimizer, scaler, policy, loss=CausalLoss())
    assert record["grad_norm"] is None
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    while record["grad_norm"] is None:
        record = train_step(
            model, parameters, [batch], optimizer, scaler, policy, loss=CausalLoss()
        )
    assert not torch.equal(before["head.weight"], model.head.weight)
