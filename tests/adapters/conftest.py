"""Models to adapt and comparisons that the adapter tests share."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters import Adapted, LoRA, adapted_modules, dense_weight
from lora_core.adapters.dora import DoRA
from lora_core.testing.bounds import allowance, exceeds


class Mlp(nn.Module):
    """Two hidden layers under names that patterns can tell apart, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 24)
        self.mid = nn.Sequential(nn.Linear(24, 24, bias=False), nn.ReLU(), nn.LayerNorm(24))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(torch.relu(self.inp(x))))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class TokenModel(nn.Module):
    """An embedding and a head, tied or not, with a linear layer between."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.config = type("Config", (), {})()
        self.config.vocab_size, self.config.tie_word_embeddings = 11, tied
        self.vocab_size = 11
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids))))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.fixture
def mlp() -> Mlp:
    return Mlp()


@pytest.fixture
def make_mlp() -> Callable[[], nn.Module]:
    return Mlp


@pytest.fixture
def make_token_model() -> Callable[[bool], nn.Module]:
    return TokenModel


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Tensor, Tensor], bool]:
    """Equal in dtype, shape and every bit, the signs of zeros and NaN included."""
    ints = {8: torch.int64, 4: torch.int32, 2: torch.int16}

    def same(a: Tensor, b: Tensor) -> bool:
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        kind = ints[a.element_size()]
        return torch.equal(a.detach().contiguous().view(kind), b.detach().contiguous().view(kind))

    return same


@pytest.fixture(scope="session")
def delta() -> Callable[[LoRA], Tensor]:
    """s·B A of a pair as a matrix (N, K) in float64, by loops over groups."""

    def product(pair: LoRA) -> Tensor:
        down, up = (factor.detach().double() for factor in pair.factors())
        g = pair.form.groups
        blocks = [b @ a for a, b in zip(down.chunk(g), up.chunk(g), strict=True)]
        return pair.scaling * torch.cat(blocks)

    return product


@pytest.fixture(scope="session")
def state_of() -> Callable[[nn.Module], dict[str, object]]:
    """Everything that an error must leave alone: modules, tensors, flags, active adapters."""

    def snapshot(model: nn.Module) -> dict[str, object]:
        hosts = {
            name: (list(host.active), list(host.adapters), host.enabled, host.merged)
            for name, host in adapted_modules(model)
        }
        return {
            "modules": [(name, id(module)) for name, module in model.named_modules()],
            "parameters": [
                (name, id(p), p.requires_grad, p.detach().clone().tolist())
                for name, p in model.named_parameters(remove_duplicate=False)
            ],
            "hosts": hosts,
        }

    return snapshot


Terms = dict[str, Tensor]
ROUNDINGS = 14  # to 16 bits in a row, at most: two products, their factors, DoRA's gains, sums


class Dense:
    """One adapted layer as its formula, dense and in float64: y = layer(x; W', b').

        W' = W + s (B A - B0 A0), by groups or parts;   DoRA: its rows times m / |row|
        b' = b + (bias - bias0) + s up_bias

    The formula is a polynomial in every term, so with absolute values in it the same function
    gives the sum of the magnitudes that rounding errors are relative to, and its gradients those
    of the gradients.
    """

    truth_norms: Tensor

    def __init__(self, host: Adapted, name: str = "default") -> None:
        pair = host.adapters[name]
        assert isinstance(pair, LoRA)
        self.base, self.pair = host.base, pair
        self.groups = getattr(self.base, "groups", 1)
        self.turned = isinstance(self.base, nn.Embedding) or type(self.base).__name__ == "Conv1D"
        self.s = pair.alpha / (pair.r**0.5 if pair.use_rslora else pair.r)

    def terms(self, x: Tensor) -> Terms:
        found: Terms = dict(self.pair.named_parameters())
        found |= {k: b for k, b in self.pair.named_buffers() if k != "lengths"}
        if x.is_floating_point():
            found["x"] = x
        bias = getattr(self.base, "bias", None)
        weight = self._matrix(dense_weight(self.base))
        found |= {"W": weight} if bias is None else {"W": weight, "b": bias}
        return {k: t.detach().double() for k, t in found.items()}

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.turned else weight.flatten(1)  # (N, K)

    def product(self, up: Tensor, down: Tensor) -> Tensor:
        """(N, K), every block of rows with its own A."""
        parts = self.pair.parts
        rows = up.split(list(parts)) if parts else up.chunk(self.groups)
        downs = down.chunk(len(parts) or self.groups)
        return torch.cat([b @ a for b, a in zip(rows, downs, strict=True)])

    def __call__(self, x: Tensor, t: Terms, sizes: bool = False) -> Tensor:
        """y; with `sizes` the terms are magnitudes, and so is the result."""
        sign, s = (1, abs(self.s)) if sizes else (-1, self.s)
        V = t["W"] + s * self.product(t["B"], t["A"])
        if "A0" in t:
            V = V + sign * s * self.product(t["B0"], t["A0"])
        b = t.get("b")
        if "magnitude" in t:
            gain = t["magnitude"] / (self._row_sizes(V) if sizes else V.detach().norm(dim=1))
            if sizes:  # y (m/c - 1) and y beside it
                gain = gain + 2
                b = None if b is None else b * gain
            V = gain[:, None] * V
        for key, factor in (("bias", 1.0), ("bias0", sign), ("up_bias", s)):
            if key in t:
                b = factor * t[key] if b is None else b + factor * t[key]
        return self._layer(t.get("x", x), V, b)

    def _row_sizes(self, V: Tensor) -> Tensor:
        """c over the condition of its identity, 1 + (sizes / c)²."""
        truth = self.truth_norms
        return truth / (1 + (V.detach().norm(dim=1) / truth) ** 2)

    def _layer(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        base: Any = self.base
        if isinstance(base, nn.Embedding):
            return F.embedding(x, matrix.T)
        if not isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return F.linear(x, matrix, bias)
        return copy.copy(base)._conv_forward(x, matrix.view_as(base.weight), bias)

    def run(
        self, x: Tensor, dy: Tensor, dtype: torch.dtype, sizes: bool = False
    ) -> tuple[Tensor, Terms]:
        """Output and gradients of sum(dy y) for every term, or their magnitudes."""
        terms = self.terms(x)
        if isinstance(self.pair, DoRA):
            V = terms["W"] + self.s * self.product(terms["B"], terms["A"])
            if "A0" in terms:
                V = V - self.s * self.product(terms["B0"], terms["A0"])
            self.truth_norms = V.norm(dim=1)
        if sizes:  # a term or a product of two may round by as much as the smallest normal number
            tiny = torch.finfo(dtype).tiny ** 0.5
            tiny = min(tiny, 2**-20) if dtype != torch.float16 else 2**-14
            terms = {k: t.abs() + tiny for k, t in terms.items()}
            dy = dy.abs() + tiny
        leaves = {k: t.requires_grad_() for k, t in terms.items()}
        y = self(x, leaves, sizes)
        grads = torch.autograd.grad(y, list(leaves.values()), dy.double(), allow_unused=True)
        found = dict(zip(leaves, grads, strict=True))
        if isinstance(self.base, nn.Embedding) and self.base.padding_idx is not None:
            found["A"][:, self.base.padding_idx] = 0.0  # the padding token's row is not trained
        return y.detach(), found

    def hold(self, host: Adapted, x: Tensor) -> None:
        """Output, gradients and merged output of the host within the bounds of rounding."""
        leaf = x.clone().requires_grad_() if x.is_floating_point() else x
        for p in host.adapters.parameters():
            p.grad = None
        y = host(leaf)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
        y.backward(dy)
        truth, wanted = self.run(x, dy.double(), y.dtype)
        size, sizes = self.run(x, dy.double(), y.dtype, sizes=True)
        rows, columns = self.terms(x)["W"].shape
        depth = columns + rows + 2 * len(self.pair.A) + y.numel() // rows + 20
        # the adapter itself is float32 beside a base in float64 too
        dtype = torch.float32 if y.dtype == torch.float64 else y.dtype
        allowed = allowance(depth, dtype, ROUNDINGS)
        got = {k: p.grad for k, p in self.pair.named_parameters()}
        if x.is_floating_point():
            got["x"] = leaf.grad
        assert set(got) <= set(wanted)
        for key, grad in got.items():
            assert grad is not None, f"no gradient reaches {key}"
            fault = exceeds(grad, wanted[key], allowed * sizes[key])
            assert fault is None, f"the gradient of {key} {fault}"
        for p in host.base.parameters():
            assert p.grad is None
        fault = exceeds(y, truth, allowed * size)
        assert fault is None, f"the output {fault}"
        if self.pair.unmergeable is None:
            host.merge()
            fault = exceeds(host(x), truth, allowed * size)
            assert fault is None, f"the merged output {fault}"
            host.unmerge()
            assert torch.equal(host(x), y)


@pytest.fixture(scope="session")
def hold_to_dense() -> Callable[..., None]:
    """Hold a host's output, gradients and merged output to the dense formula in float64."""

    def hold(host: Adapted, x: Tensor, name: str = "default") -> None:
        Dense(host, name).hold(host.eval(), x)

    return hold
