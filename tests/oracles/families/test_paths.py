"""Every family by the library's other ways: loss without logits, recomputed, compiled, planned."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.plan import plan

pytestmark = pytest.mark.oracle


def gradients(model: nn.Module, ids: Tensor, **options: Any) -> list[Tensor]:
    """The loss, and every parameter's gradient."""
    model.zero_grad()
    loss = model(ids, labels=ids, **options).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_loss_without_logits(
    make_pair: Callable[..., Any],
    draw: Callable[..., Tensor],
    within: Callable[..., None],
    family: str,
) -> None:
    """Scaled and capped as with them."""
    model, ids = make_pair(family).ours, draw()
    truth = gradients(copy.deepcopy(model).double(), ids)
    spared, usual = gradients(model, ids, keep_logits=False), gradients(model, ids)
    for part in zip(spared, usual, truth, strict=True):
        within(*part, "rms")


def test_recomputed_layers(
    make_pair: Callable[..., Any], draw: Callable[..., Tensor], family: str
) -> None:
    model, ids = make_pair(family).ours, draw()
    kept = gradients(model, ids)
    model.gradient_checkpointing = True
    assert all(map(torch.equal, gradients(model, ids), kept))


def test_embeddings_given(
    make_pair: Callable[..., Any],
    within: Callable[..., None],
    family: str,
) -> None:
    """They are not scaled again, but for Granite's multiplier."""
    *models, _ = make_pair(family)
    x = torch.randn(2, 9, models[0].config.hidden_size)
    with torch.no_grad():
        within(*(m(inputs_embeds=x.to(m.lm_head.weight.dtype)).logits for m in models))


@pytest.mark.parametrize("odd", ["gemma3-wrapped", "phi4-mini", "smollm3-window"])
def test_compiled_whole(
    make_pair: Callable[..., Any], draw: Callable[..., Tensor], odd: str
) -> None:
    """In one graph: nothing in a forward depends on values."""
    model, ids = make_pair(odd).ours, draw()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("odd", ["gemma2", "phi4-mini", "smollm3-window", "olmo2", "granite"])
def test_plan(
    make_pair: Callable[..., Any], parameters_of: Callable[..., dict[str, nn.Parameter]], odd: str
) -> None:
    """A plan counts the parameters that there are."""
    ours, theirs, *_ = make_pair(odd)
    made = plan(ours.config, "lora", tokens=16, device="cpu")
    assert made.parameters == sum(p.numel() for p in parameters_of(theirs).values())
    assert 0 < made.trainable < made.parameters
