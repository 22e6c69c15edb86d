"""Logits, loss and gradients of every family: padded, packed or plain, float32 and bfloat16.

The definition rounds where transformers does, so even its largest errors are alike. C rounds
elsewhere: of hundreds of largest errors some are three times as large and some a third, so it is
the root of the mean square that is compared. In bfloat16 that goes for the gradients of any
backend, each divided by its size and all taken together; logits are as near as transformers'.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

pytestmark = pytest.mark.oracle

DOCUMENTS = (3, 9, 1, 8)  # tokens of each in a packed row
KINDS = ("none", "left", "right", "packed")
# C's attention is another where rows are padded or packed
HOW = [(kind, "reference", "largest") for kind in KINDS]
HOW += [(kind, "auto", "rms") for kind in ("left", "packed")]


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


class Result(NamedTuple):
    logits: Tensor
    """at real tokens"""
    loss: Tensor
    token_losses: Tensor
    """of the graded tokens"""
    gradients: dict[str, Tensor]


class Batch(NamedTuple):
    ids: Tensor
    labels: Tensor
    mask: Tensor | None = None
    documents: Tensor | None = None


def batch_of(kind: str, ids: Tensor) -> Batch:
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    if kind == "packed":
        numbers = torch.tensor([9, 4, 7, 4]).repeat_interleave(torch.tensor(DOCUMENTS))
        documents = numbers.expand_as(ids)
        first = documents != pad(documents, (1, 0), value=-1)[:, :-1]
        return Batch(ids, labels.masked_fill(first, -100), None, documents)
    if kind == "none":
        return Batch(ids, labels)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 7) if kind == "left" else slice(-7, None)] = 0
    before = pad(mask, (1, 0))[:, :-1]
    # a first token after padding is predicted by a padded position: not graded
    return Batch(ids, labels.masked_fill((mask == 0) | (before == 0), -100), mask)


def forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """transformers' logits and loss; it runs the documents of a packed row one by one."""
    ids, labels, mask, documents = batch
    # positions over real tokens on both sides: transformers' forward counts padding as well
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    if documents is None:
        out = model(ids, attention_mask=mask, position_ids=positions, labels=labels)
        return out.logits, out.loss
    logits, total = [], torch.zeros((), dtype=model.dtype)
    for part, wanted in zip(*(t.split(DOCUMENTS, dim=1) for t in (ids, labels)), strict=True):
        graded = int((wanted[:, 1:] != -100).sum())
        out = model(part, labels=wanted) if graded else model(part)
        logits.append(out.logits)
        total = total + out.loss * graded if graded else total
    return torch.cat(logits, dim=1), total / (labels != -100).sum()


def result(model: nn.Module, batch: Batch, named: Any, ours: bool) -> Result:
    ids, labels, mask, documents = batch
    if ours:
        out = model(ids, mask, labels=labels, document_ids=documents)
        logits, loss, losses = out.logits, out.loss, out.token_losses[out.token_losses != 0]
    else:
        logits, loss = forward(model, batch)
        next_one = logits[:, :-1].to(loss.dtype)[labels[:, 1:] != -100]
        losses = cross_entropy(next_one, labels[:, 1:][labels[:, 1:] != -100], reduction="none")
    loss.backward()
    gradients = {name: p.grad for name, p in named(model).items()}
    real = logits.flatten(0, 1) if mask is None else logits[mask.bool()]
    return Result(real.detach(), loss.detach(), losses.detach(), gradients)


def together(*gradients: dict[str, Tensor]) -> list[Tensor]:
    """All in one vector, each divided by its size: one tensor's error is chance."""
    *_, truth = gradients
    return [torch.cat([g[n].flatten() / rms(truth[n]) for n in truth]) for g in gradients]


@pytest.fixture(scope="module")
def results(
    make_pair: Callable[..., Any], draw: Callable[..., Tensor], parameters_of: Callable[..., Any]
) -> Callable[..., tuple[Result, Result, Result]]:
    """Of our model, theirs and the exact one on the same batch, each computed once."""
    kept: dict[tuple[Any, ...], Any] = {}

    def once(key: tuple[Any, ...], ours: bool) -> Any:
        if (key, ours) not in kept:
            family, kind, dtype, *_ = key
            own, *peers, _ = make_pair(family, dtype)
            torch.manual_seed(2)
            batch = batch_of(kind, draw())
            models = [own] if ours else peers
            kept[key, ours] = [result(model, batch, parameters_of, ours) for model in models]
        return kept[key, ours]

    def compute(family: str, kind: str, dtype: torch.dtype = torch.float32) -> Any:
        key = family, kind, dtype
        return *once((*key, os.environ["LORA_KERNELS"]), True), *once(key, False)

    return compute


@pytest.mark.column("logits")
@pytest.mark.parametrize(("kind", "backend", "by"), HOW)
def test_logits_and_loss(
    monkeypatch: pytest.MonkeyPatch,
    results: Callable[..., Any],
    within: Callable[..., None],
    family: str,
    kind: str,
    backend: str,
    by: str,
) -> None:
    monkeypatch.setenv("LORA_KERNELS", backend)
    ours, theirs, truth = results(family, kind)
    within(ours.logits, theirs.logits, truth.logits, by)
    within(ours.loss, theirs.loss, truth.loss, by)
    assert torch.equal(ours.logits.argmax(-1), theirs.logits.argmax(-1))


@pytest.mark.column("gradients")
@pytest.mark.parametrize(("kind", "backend", "by"), HOW)
def test_gradients(
    monkeypatch: pytest.MonkeyPatch,
    results: Callable[..., Any],
    within: Callable[..., None],
    family: str,
    kind: str,
    backend: str,
    by: str,
) -> None:
    """Of every parameter, by the same names."""
    monkeypatch.setenv("LORA_KERNELS", backend)
    ours, theirs, truth = (r.gradients for r in results(family, kind))
    assert list(ours) == list(theirs)
    if kind == "packed":  # its sums are in another order than those of documents one by one
        within(*together(ours, theirs, truth), "rms")
        return
    for name in ours:
        within(ours[name], theirs[name], truth[name], by)


@pytest.mark.column("logits")
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_logits_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
    results: Callable[..., Any],
    within: Callable[..., None],
    family: str,
    backend: str,
) -> None:
    monkeypatch.setenv("LORA_KERNELS", backend)
    ours, theirs, truth = results(family, "left", torch.bfloat16)
    within(ours.logits, theirs.logits, truth.logits, "rms")
    within(ours.logits, theirs.logits, truth.logits)
    within(ours.token_losses, theirs.token_losses, truth.token_losses, "rms")
    assert torch.allclose(ours.loss, ours.token_losses.mean())


@pytest.mark.column("logits")
def test_where_bfloat16_is_rounded(
    monkeypatch: pytest.MonkeyPatch,
    make_pair: Callable[..., Any],
    draw: Callable[..., Tensor],
    family: str,
) -> None:
    """To the bit: what Gemma multiplies embeddings by, and each family's norm."""
    monkeypatch.setenv("LORA_KERNELS", "reference")
    ours, theirs, *_ = make_pair(family, torch.bfloat16)
    x, peer = (model.get_input_embeddings()(draw()) for model in (ours, theirs))
    assert torch.equal(x, peer)
    assert torch.equal(ours.model.norm(x), theirs.base_model.get_decoder().norm(x))


@pytest.mark.parametrize("tokens", [16, 17])
@pytest.mark.parametrize("phi", ["phi35", "phi4-mini"])
def test_both_sides_of_the_original_context(
    make_pair: Callable[..., Any],
    draw: Callable[..., Tensor],
    within: Callable[..., None],
    phi: str,
    tokens: int,
) -> None:
    """longrope's other frequencies begin behind the 16 tokens, not with them."""
    *models, _ = make_pair(phi)
    ids = draw(1, tokens)
    with torch.no_grad():
        within(*(m(ids).logits for m in models))


@pytest.mark.column("gradients")
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gradients_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
    results: Callable[..., Any],
    within: Callable[..., None],
    family: str,
    backend: str,
) -> None:
    monkeypatch.setenv("LORA_KERNELS", backend)
    ours, theirs, truth = (r.gradients for r in results(family, "left", torch.bfloat16))
    within(*together(ours, theirs, truth), "rms")


@pytest.mark.column("logits")
def test_hidden_states(
    make_pair: Callable[..., Any],
    draw: Callable[..., Tensor],
    within: Callable[..., None],
    family: str,
) -> None:
    """The embeddings, every layer's output and the normed last one."""
    *models, _ = make_pair(family)
    ids = draw(1)
    with torch.no_grad():
        states = [m(ids, output_hidden_states=True).hidden_states for m in models]
    assert len(states[0]) == len(states[1]) == models[0].config.num_hidden_layers + 1
    for state in zip(*states, strict=True):
        within(*state)
