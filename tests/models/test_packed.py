"""Packed rows give the logits, losses and gradients that their documents give alone."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters import (
    BottleneckConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    add_adapter,
)
from lora_core.checkpoint import load_model
from lora_core.data import collate, collate_packed
from lora_core.models import CausalLM
from lora_core.testing.bounds import exceeds, gamma
from lora_core.train.compile import compiled_layers
from lora_core.train.recompute import recomputed_layers
from lora_kernels import Documents, packed_attention

Make = Callable[..., CausalLM]
Shake = Callable[..., nn.Module]
EXACT = 2.0**-53

KINDS: dict[str, Any] = {
    "full": None,
    "lora": LoRAConfig(r=3, alpha=6),
    "dora": LoRAConfig(r=3, use_dora=True),
    "houlsby": BottleneckConfig(reduction=8, placement="houlsby"),
    "parallel": BottleneckConfig(reduction=8, placement="parallel"),
    "prefix": PrefixTuningConfig(3, projection=False, std=1.0),
    "prefix network": PrefixTuningConfig(3, hidden=5),
}


def samples(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of these lengths, about half of their tokens graded."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(97, (length,), generator=generator)
        graded = torch.rand(length, generator=generator) < 0.5
        rows.append({"input_ids": ids.tolist(), "labels": torch.where(graded, ids, -100).tolist()})
    return rows


def packed(rows: list[list[int]], length: int | None = None) -> tuple[list[Any], dict[str, Tensor]]:
    """Samples of packed rows, flat, and their batch."""
    flat = samples([n for row in rows for n in row])
    rest = iter(flat)
    return flat, collate_packed([[next(rest) for _ in row] for row in rows], length)


def alone(model: nn.Module, rows: list[Any]) -> tuple[Tensor, Tensor]:
    """Logits of all rows one after another, and the sum of their losses."""
    logits, losses = [], []
    for row in rows:
        out = model(
            **{k: v for k, v in collate([row]).items() if k != "attention_mask"}, normalizer=1
        )
        logits.append(out.logits[0])
        losses.append(out.loss)
    return torch.cat(logits), torch.stack(losses).sum()


def together(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same of a packed batch."""
    out = model(**batch, normalizer=1)
    return out.logits[batch["document_ids"] >= 0], out.loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def close(got: Tensor, wanted: Tensor, n: int = 4000) -> None:
    """Equal to n float64 roundings of the largest value: another order of the same sums."""
    assert got.dtype == wanted.dtype == torch.float64
    bound = torch.full_like(wanted, gamma(n, EXACT) * max(wanted.abs().max().item(), 1e-3))
    wrong = exceeds(got, wanted, bound)
    assert wrong is None, wrong


def adapted(model: CausalLM, kind: str, shake: Shake) -> nn.Module:
    """The model in float64 and in training mode, with an adapter whose numbers matter."""
    if KINDS[kind] is not None:
        add_adapter(model, KINDS[kind])
        shake(model, 0.1)
    model.double()
    for parameter in model.parameters():  # adapters stay float32 through .double()
        parameter.data = parameter.data.double()
    return model.train()


ROWS = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=2)


@pytest.mark.parametrize("kind", KINDS)
@given(rows=ROWS, padding=st.integers(0, 3), recompute=st.booleans())
def test_logits_and_gradients_with_every_adapter(
    make_model: Make,
    shake: Shake,
    kind: str,
    rows: list[list[int]],
    padding: int,
    recompute: bool,
) -> None:
    model = adapted(make_model(), kind, shake)
    flat, batch = packed(rows, max(map(sum, rows)) + padding)
    wanted, loss = alone(model, flat)
    truth = gradients(model, loss)
    with recomputed_layers(model, recompute):
        got, own = together(model, batch)
        found = gradients(model, own)
    close(got, wanted)
    close(own, loss)
    assert found.keys() == truth.keys()
    scale = max(float(g.abs().max()) for g in truth.values())
    for name, gradient in found.items():
        bound = torch.full_like(gradient, gamma(4000, EXACT) * max(scale, 1e-3))
        assert exceeds(gradient, truth[name], bound) is None, name


@given(rows=ROWS)
def test_a_transformers_folder_in_float32(
    llama_folder: Path, assert_close: Callable[..., None], rows: list[list[int]]
) -> None:
    models = [load_model(llama_folder) for _ in range(3)]
    models[2].double()
    flat, batch = packed(rows)
    results = [together(models[0], batch), alone(models[1], flat), alone(models[2], flat)]
    assert_close(*(logits.detach() for logits, _ in results))
    found = [gradients(m, loss) for m, (_, loss) in zip(models, results, strict=True)]
    # as one vector: a small part of a gradient has the roundings of the large sums it comes from
    assert_close(*(torch.cat([g[name].flatten() for name in found[2]]) for g in found))


def test_documents_in_rows_of_their_own_are_bit_equal(make_model: Make) -> None:
    rows = samples([7, 4, 6])
    results = []
    for batch in (collate(rows), collate_packed([[row] for row in rows])):
        model = make_model().train()
        loss = model(**batch, normalizer=5).loss
        results.append((loss, gradients(model, loss)))
    (padded, one), (laid, two) = results
    # the first token of a row is never predicted, so its label is of no matter
    assert torch.equal(padded, laid)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_joint_would_be_seen(make_model: Make) -> None:
    model = make_model()
    _, batch = packed([[4, 5]])
    right = model(**batch).logits
    for broken in (
        {"document_ids": torch.zeros_like(batch["document_ids"])},  # documents see each other
        {"position_ids": torch.arange(9)[None]},  # positions run on
    ):
        wrong = model(**{**batch, **broken}).logits
        if "position_ids" in broken:  # rotary positions are relative: nothing moves but roundings
            assert (wrong - right).abs().max() < 1e-4
        else:
            assert (wrong - right)[:, 4:].abs().amax(2).min() > 1e-4


@pytest.mark.parametrize("config", [PromptTuningConfig(3), PTuningConfig(3)])
def test_what_only_a_rows_first_document_would_see_is_refused(
    make_model: Make, config: Any
) -> None:
    model = make_model()
    add_adapter(model, config)
    _, batch = packed([[3, 2]])
    with pytest.raises(ValueError, match=r"\(packed rows\) do not go with a prompt"):
        model(**batch)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it
def test_compiled_layers_take_packed_rows(make_model: Make, shake: Shake) -> None:
    model = adapted(make_model(num_hidden_layers=1), "lora", shake)
    for rows in ([[4, 3], [6]], [[2, 2, 5], [1, 3]]):
        _, batch = packed(rows, 9)
        wanted, loss = together(model, batch)
        truth = gradients(model, loss)
        with compiled_layers(model, backend="aot_eager"):
            got, own = together(model, batch)
            found = gradients(model, own)
        close(got, wanted)
        for name in truth:
            close(found[name], truth[name])


# --- the GPU's way, with a stand-in for its kernel ---


def varlen_attn(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, _: Tensor, most: int, __: int, **how: Any
) -> Tensor:
    assert how["window_size"] == (-1, 0)
    out = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        parts = (x[start:end].transpose(0, 1) for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True))
    return torch.cat(out, 1).transpose(0, 1)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
@pytest.mark.parametrize("recompute", [False, True])
def test_variable_lengths_under_autocast(
    make_model: Make, shake: Shake, monkeypatch: Any, kind: str, recompute: bool
) -> None:
    model = make_model().train()
    add_adapter(model, KINDS[kind])
    shake(model, 0.1)
    _, batch = packed([[4, 3], [6]], 8)
    calls = []

    def counted(*args: Any, **how: Any) -> Tensor:
        calls.append(args)
        return varlen_attn(*args, **how)

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16), recomputed_layers(model, recompute):
            logits, loss = together(model, batch)
            return logits.detach(), gradients(model, loss)

    wanted, truth = run()
    monkeypatch.setattr(packed_attention, "_fused", lambda ids: True)
    monkeypatch.setattr(
        packed_attention, "varlen", lambda: packed_attention.Varlen(counted, True, True)
    )
    got, found = run()
    assert got.dtype == wanted.dtype
    # a prefix has the dense mask, so nothing changes but which way was taken
    assert len(calls) == (0 if kind == "prefix" else 4 if recompute else 2)
    assert all(call[3] is batch["document_bounds"] for call in calls)
    eps = torch.finfo(torch.bfloat16).eps
    assert (got - wanted).abs().max() <= 8 * eps * wanted.abs().max()
    scale = max(g.abs().max() for g in truth.values())
    for name, gradient in found.items():
        assert (gradient - truth[name]).abs().max() <= 8 * eps * scale, name


def test_bounds_are_counted_where_they_are_not_given(make_model: Make, monkeypatch: Any) -> None:
    model, seen = make_model(), []
    forward = type(model.model.layers[0]).forward

    def spy(self: Any, x: Tensor, rotary: Any, mask: Any, *more: Any) -> Tensor:
        seen.append(mask)
        return forward(self, x, rotary, mask, *more)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", spy)
    monkeypatch.setattr(packed_attention, "_fused", lambda ids: True)
    monkeypatch.setattr(
        packed_attention, "varlen", lambda: packed_attention.Varlen(varlen_attn, True, True)
    )
    _, batch = packed([[4, 3], [6]], 8)
    for given_ in (batch, {k: v for k, v in batch.items() if k != "document_bounds"}):
        model.bfloat16()(**given_)
    assert all(isinstance(mask, Documents) for mask in seen)
    assert torch.equal(seen[0].bounds, seen[-1].bounds)
    assert "document_bounds" in inspect.signature(model.forward).parameters
