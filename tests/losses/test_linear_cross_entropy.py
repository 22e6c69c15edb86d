"""The loss from hidden states and a head of any kind, against the loss of whole logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.adapters import LoRAConfig, LoRALinear, add_adapter, disable_adapters
from lora_core.losses import (
    linear_cross_entropy,
    linear_token_cross_entropy,
    masked_cross_entropy,
    token_cross_entropy,
)
from lora_core.quant import NF4Linear
from lora_kernels import head_chunks

B, T, H, V = 2, 9, 64, 70
KINDS = (
    "weight",
    "linear",
    "bias",
    "lora",
    "lora on bias",
    "dropout",
    "dora",
    "two",
    "nf4",
    "hook",
)
CALLED = ("dropout", "dora", "two", "nf4", "hook")


def batch(seed: int = 0, graded: float = 0.6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (B, T), generator=generator)
    masked = torch.rand(B, T, generator=generator) >= graded
    return torch.randn(B, T, H, generator=generator), labels.masked_fill(masked, -100)


def make(kind: str, shake: Callable[..., nn.Module]) -> nn.Module:
    """A head of a kind, whose adapters have weights that matter."""
    linear = nn.Linear(H, V, bias="bias" in kind)
    if kind in ("linear", "bias"):
        return linear
    if kind == "hook":
        linear.register_forward_hook(lambda *_: None)
        return linear
    if kind == "nf4":
        return NF4Linear.from_linear(linear)
    if kind == "dora":
        model = nn.ModuleDict({"head": linear})
        add_adapter(model, LoRAConfig(r=4, targets=["head"], use_dora=True))
        return shake(model)["head"]
    host = LoRALinear(linear, r=4, dropout=0.5 if kind == "dropout" else 0.0)
    if kind == "two":
        model = nn.ModuleDict({"head": host})
        add_adapter(model, LoRAConfig(r=2, targets=["head"]), name="b")
        host = model["head"]
        host.active = ["default", "b"]
    return shake(host)


def operator_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Notes how often the operator judges rows."""
    calls: list[Any] = []
    run = head_chunks.grade_rows
    monkeypatch.setattr(head_chunks, "grade_rows", lambda *a: calls.append(a) or run(*a))
    return calls


def whole(hidden: Tensor, head: Any, labels: Tensor, **options: Any) -> Tensor:
    logits = hidden @ head.T if isinstance(head, Tensor) else head(hidden)
    return masked_cross_entropy(logits, labels, **options)


def trained(head: Any) -> list[Tensor]:
    if isinstance(head, Tensor):
        return [head]
    return [p for p in head.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
def test_every_head(
    kind: str, shake: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = operator_calls(monkeypatch)
    head: Any = torch.randn(V, H) if kind == "weight" else make(kind, shake)
    if kind == "weight":
        head.requires_grad_()
    elif kind == "dropout":
        head.eval()
        linear_cross_entropy(batch()[0], head, batch()[1])
        assert len(calls) == 1  # without dropout it is a matrix
        calls.clear()
        head.train()
    hidden, labels = batch()
    hidden.requires_grad_()
    for smoothing in (0.0, 0.2):
        loss, by_token = linear_token_cross_entropy(
            hidden, head, labels, normalizer=torch.tensor(7), label_smoothing=smoothing
        )
        assert bool(calls) == (kind not in CALLED)
        if kind == "dropout":
            continue  # another draw for each call
        wanted = whole(hidden, head, labels, normalizer=7, label_smoothing=smoothing)
        torch.testing.assert_close(loss, wanted, rtol=2e-6, atol=0)
        assert by_token.shape == (B, T)
        assert not by_token.requires_grad
        torch.testing.assert_close(by_token.sum() / 7, loss.detach())
        tensors = [hidden, *trained(head)]
        assert len(tensors) > 1 or kind == "nf4"
        for mine, truth in zip(
            torch.autograd.grad(loss, tensors), torch.autograd.grad(wanted, tensors), strict=True
        ):
            torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-6 * truth.abs().max())


@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([None, 6.0]))
def test_each_tokens_loss_is_that_of_whole_logits(
    seed: int, graded: float, softcap: float | None
) -> None:
    hidden, labels = batch(seed, graded)
    head = torch.randn(V, H)
    logits = hidden @ head.T * 0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss, by_token = linear_token_cross_entropy(hidden, head, labels, softcap=softcap, scale=0.5)
    torch.testing.assert_close(by_token, token_cross_entropy(logits, labels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, masked_cross_entropy(logits, labels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "lora", "nf4"])
def test_under_autocast(kind: str, shake: Callable[..., nn.Module]) -> None:
    """The product is in autocast's dtype, everything after it in float32."""
    head, (hidden, labels) = make(kind, shake), batch()
    hidden.requires_grad_()
    tensors = [hidden, *trained(head)]
    found = []
    for how in (linear_cross_entropy, whole):
        with torch.autocast("cpu", torch.bfloat16):
            loss = how(hidden, head, labels)
        assert loss.dtype is torch.float32
        found.append((loss, *torch.autograd.grad(loss, tensors)))
    exact = whole(hidden, head, labels)
    exact = (exact, *torch.autograd.grad(exact, tensors))
    for mine, theirs, truth in zip(*found, exact, strict=True):
        assert mine.dtype is torch.float32
        error, baseline = ((t - truth).abs().max() for t in (mine, theirs))
        assert error <= 2 * baseline + 2.0**-7 * truth.abs().max()


def test_the_heads_adapter_may_be_off(shake: Callable[..., nn.Module]) -> None:
    model = nn.ModuleDict({"head": nn.Linear(H, V)})
    add_adapter(model, LoRAConfig(r=4, targets=["head"]), name="a")
    add_adapter(model, LoRAConfig(r=4, targets=["head"]), name="b")
    shake(model)
    head, (hidden, labels) = model["head"], batch()
    with disable_adapters(model):
        without = linear_cross_entropy(hidden, head, labels)
        torch.testing.assert_close(without, whole(hidden, head.base, labels))
    assert not torch.allclose(without, linear_cross_entropy(hidden, head, labels))


def test_a_class_of_ones_own_is_called() -> None:
    class Doubled(LoRALinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    hidden, labels = batch()
    head = Doubled(nn.Linear(H, V), r=4)
    torch.testing.assert_close(
        linear_cross_entropy(hidden, head, labels), whole(hidden, head, labels)
    )
    head = nn.Linear(H, V)
    head.forward = lambda x: torch.nn.functional.linear(x, head.weight) * 3
    torch.testing.assert_close(
        linear_cross_entropy(hidden, head, labels), whole(hidden, head, labels)
    )


def test_losses_stand_where_the_label_is_predicted() -> None:
    hidden, labels = torch.randn(1, 4, H), torch.tensor([[5, 6, -100, 7]])
    _, by_token = linear_token_cross_entropy(hidden, torch.randn(V, H), labels)
    assert by_token.ne(0).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("kind", ["linear", "lora"])
def test_the_compiler_takes_it_whole(kind: str, shake: Callable[..., nn.Module]) -> None:
    head = make(kind, shake)
    torch._dynamo.reset()

    def step(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return linear_token_cross_entropy(hidden, head, labels, softcap=9.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for graded in (0.6, 0.0, 1.0):
        hidden, labels = batch(3, graded)
        hidden.requires_grad_()
        results = [(*f(hidden, labels),) for f in (compiled, step)]
        for mine, eager in zip(*results, strict=True):
            assert torch.equal(mine, eager)
        tensors = [hidden, *trained(head)]
        pairs = zip(*(torch.autograd.grad(loss, tensors) for loss, _ in results), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
