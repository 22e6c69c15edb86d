"""Where a pair starts: its distributions, and PiSSA, OLoRA and LoftQ."""

import copy
import gc
import itertools
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.adapters import (
    Adapted,
    LoRA,
    LoRAConfig,
    add_adapter,
    delete_adapter,
    dense_weight,
    merge_adapters,
    unload_adapters,
)
from lora_core.adapters.forms import ConvForm, EmbeddingForm
from lora_core.adapters.starts import loftq, olora, pissa
from lora_core.quant import NF4Linear
from lora_core.testing.bounds import allowance, exceeds, gamma

Hold = Callable[..., None]
State = Callable[[nn.Module], dict[str, object]]
EPS = torch.finfo(torch.float32).eps
sizes = st.integers(1, 24)


class Box(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(layer: nn.Module, **options: Any) -> Adapted:
    model = Box(layer)
    add_adapter(model, LoRAConfig(targets=["layer"], **options))
    host = model.layer
    assert isinstance(host, Adapted)
    return host


def filled(host: Adapted, scale: float = 0.3) -> Adapted:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in host.adapters.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=scale)
    return host


# --- distributions ------------------------------------------------------------------------------


def distance(sample: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov-Smirnov: how far the sample's distribution function is from another."""
    x = sample.detach().double().flatten().sort().values
    n = len(x)
    F, up = cdf(x), torch.arange(1, n + 1, dtype=torch.float64) / n
    return max(float((up - F).max()), float((F - up + 1 / n).max()))


def far(n: int) -> float:
    """A distance that n samples reach with probability 1e-9 (Dvoretzky-Kiefer-Wolfowitz)."""
    return math.sqrt(math.log(2 / 1e-9) / (2 * n))


def normal(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


@pytest.mark.parametrize(
    ("form", "k"), [(None, 400), (ConvForm(72, 16, 1, (3, 3)), 72), (ConvForm(36, 16, 2, (9,)), 36)]
)
def test_kaiming_is_uniform(form: ConvForm | None, k: int) -> None:
    pair = LoRA(k, 16, r=100, form=form)
    bound = 1 / math.sqrt(k)
    assert pair.A.abs().max() <= bound
    n = pair.A.numel()
    # all n below t · bound has the probability t^n
    assert pair.A.abs().max() >= bound * (1e-9 ** (1 / n))
    assert distance(pair.A, lambda x: (x / bound + 1) / 2) < far(n)
    assert distance(pair.A, lambda x: normal(x / bound * 3**0.5)) > far(n)  # the test can tell
    assert not pair.B.any()


def test_gaussian_has_the_deviation_1_over_r() -> None:
    pair = LoRA(400, 16, r=100, init="gaussian")
    assert distance(pair.A, lambda x: normal(x * 100)) < far(40000)
    assert distance(pair.A, lambda x: normal(x * 95)) > far(40000) / 2
    # a variance's estimate from n normals has the relative deviation sqrt(2 / n)
    assert abs((pair.A.double() * 100).square().mean() - 1) < 6 * math.sqrt(2 / 40000)
    assert not pair.B.any()


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_embeddings_start_at_normal_rows_of_b(init: str) -> None:
    pair = LoRA(50, 300, r=20, init=init, form=EmbeddingForm(50, 300))
    assert not pair.A.any()
    assert distance(pair.B, normal) < far(6000)


def test_scaling() -> None:
    assert LoRA(4, 4, r=16, alpha=32).scaling == 2.0
    assert LoRA(4, 4, r=16, alpha=32, use_rslora=True).scaling == 8.0


# --- PiSSA and OLoRA ----------------------------------------------------------------------------


@given(n=sizes, k=sizes, data=st.data(), s=st.sampled_from([0.25, 1.0, 3.0]))
def test_pissa_is_the_best_of_its_rank(n: int, k: int, data: Any, s: float) -> None:
    r = data.draw(st.integers(1, min(n, k)))
    W = torch.randn(n, k)
    down, up = pissa(W, r, s)
    values = torch.linalg.svdvals(W.double())
    least = float(values[r:].norm())  # Eckart and Young: no pair of rank r is nearer
    error = float((W.double() - s * up.double() @ down.double()).norm())
    rounding = 4 * max(n, k) * EPS * float(values.norm())
    assert least - rounding <= error <= least + rounding
    # both halves carry the roots of the singular values
    wanted = torch.diag(values[:r] / s)
    for gram in (down.double() @ down.double().T, up.double().T @ up.double()):
        assert ((gram - wanted).abs() <= 8 * max(n, k) * EPS * float(values[0]) / s).all()


def test_a_randomized_decomposition_finds_an_exact_rank() -> None:
    W = torch.randn(30, 4) @ torch.randn(4, 20)
    down, up = pissa(W, 4, 0.5, niter=2)
    assert (W - 0.5 * up @ down).norm() <= 200 * EPS * W.norm()
    W = torch.randn(40, 30)  # nowhere near a low rank: power iterations come nearer
    errors = [(W - up @ down).norm() for down, up in (pissa(W, 5, 1.0, n) for n in (0, 32))]
    least = float(torch.linalg.svdvals(W)[5:].norm())
    assert least * (1 - 1e-5) <= errors[1] <= 1.01 * least
    assert errors[1] < errors[0]


@given(n=sizes, k=sizes, data=st.data())
def test_olora_is_the_start_of_qr(n: int, k: int, data: Any) -> None:
    r = data.draw(st.integers(1, min(n, k)))
    W = torch.randn(n, k)
    down, up = olora(W, r)
    rounding = 8 * max(n, k) * EPS
    assert ((up.T.double() @ up.double() - torch.eye(r)).abs() <= rounding).all()
    assert torch.equal(down, down.triu())
    # Q's first columns span W's first r columns, which B A therefore holds whole
    rest = W.double() - up.double() @ down.double()
    assert (rest[:, :r].abs() <= rounding * float(W.double().norm())).all()
    whole, basis = olora(W, min(n, k))
    assert ((basis.double() @ whole.double() - W).norm()) <= rounding * W.double().norm()


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(12, 10), torch.randn(5, 12)),
    "4-bit": lambda: (NF4Linear.from_linear(nn.Linear(64, 10)), torch.randn(5, 64)),
    "conv": lambda: (nn.Conv2d(3, 6, 3, padding=1), torch.randn(2, 3, 4, 5)),
    "embedding": lambda: (nn.Embedding(9, 7), torch.randint(9, (2, 5))),
}
INITS = ["pissa", "pissa_niter_4", "olora"]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_the_start_changes_nothing_but_rounding(
    kind: str, init: str, dtype: torch.dtype, dora: bool, hold_to_dense: Hold
) -> None:
    layer, x = LAYERS[kind]()
    layer, x = layer.to(dtype), x.to(dtype) if x.is_floating_point() else x
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    y = layer(x)
    host = adapted(layer, init=init, r=3, alpha=2, use_dora=dora)
    pair = host.adapter("default")
    down, up = (f.detach().double().abs() for f in pair.factors())
    assert down.shape[0] == 6
    magnitude = copy.deepcopy(layer).double() if kind != "4-bit" else nn.Linear(64, 10).double()
    magnitude.bias = None
    size = pair.scaling * pair.form.weight(pair.form.delta(down, up))
    if dora:  # m / c is 1 to a rounding, and stands before the whole output
        size = size + 2 * dense_weight(layer).abs()
    magnitude.weight = nn.Parameter(size, requires_grad=False)
    wide = magnitude(x.double().abs() if x.is_floating_point() else x)
    bound = allowance(64 + 6 + 20, dtype, 8) * (wide + 2 * y.double().abs() + 1e-6)
    fault = exceeds(host(x), y.double(), bound)
    assert fault is None, fault
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    hold_to_dense(filled(host), x)  # outputs and gradients are those of W - s B0 A0 + s B A
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("init", INITS)
def test_what_is_taken_away_stays_float32_and_travels(init: str) -> None:
    torch.manual_seed(2)
    layer = nn.Linear(12, 10)
    host = filled(adapted(layer, init=init, r=3))
    x = torch.randn(4, 12)
    y = host(x)
    for twin in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        assert torch.equal(twin(x), y)
    other = adapted(copy.deepcopy(layer), init=init, r=3)
    other.adapter("default").A0.zero_()
    other.load_state_dict(host.state_dict())
    assert torch.equal(other(x), y)
    state = {f"layer.{k}": v for k, v in host.state_dict().items()}
    fresh = Box(adapted(copy.deepcopy(layer), init=init, r=3))
    assert torch.equal(torch.func.functional_call(fresh, state, (x,)), y)
    kept = host.adapter("default").A0.clone()
    host.to(torch.bfloat16).half()
    pair = host.adapter("default")
    assert pair.A0.dtype == pair.B0.dtype == torch.float32
    assert torch.equal(pair.A0, kept)


def test_saved_it_is_a_plain_pair_of_twice_the_rank() -> None:
    layer = nn.Linear(12, 10)
    host = filled(adapted(layer, init="pissa", r=3, alpha=6))
    pair = host.adapter("default")
    tensors = {k: t.detach().clone() for k, t in pair.tensors().items()}
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        "lora_A.weight": (6, 12),
        "lora_B.weight": (10, 6),
    }
    plain = LoRA(12, 10, r=6, alpha=12)
    plain.load(tensors)
    assert torch.equal(plain.delta_weight(), pair.delta_weight())
    other = adapted(copy.deepcopy(layer), init="olora", r=3, alpha=6).adapter("default")
    other.load(tensors)
    for a, b in ((other.A, pair.A), (other.B, pair.B), (other.A0, pair.A0), (other.B0, pair.B0)):
        assert torch.equal(a, b)


def test_unmerged_and_merged_start_is_the_base() -> None:
    layer = nn.Linear(40, 30)
    host = adapted(layer, init="pissa", r=8)
    merge_adapters(host)
    pair = host.adapter("default")
    size = pair.scaling * pair.B.abs() @ pair.A.abs()
    bound = gamma(2 * 16 + 4) * (2 * size + layer.weight.abs())
    assert ((host.merged.module.weight - layer.weight).abs() <= bound).all()


# --- LoftQ --------------------------------------------------------------------------------------


@given(n=sizes, k=sizes, data=st.data(), steps=st.integers(1, 4), s=st.sampled_from([0.5, 2.0]))
def test_loftq_never_fits_worse(n: int, k: int, data: Any, steps: int, s: float) -> None:
    r = data.draw(st.integers(1, min(n, k)))
    W = torch.randn(n, k)

    def error(layer: NF4Linear, down: Tensor, up: Tensor) -> float:
        return float((W - layer.dense_weight() - s * up @ down).norm())

    plain = float((W - NF4Linear.from_tensor(W).dense_weight()).norm())
    errors = [error(*loftq(W, None, r, s, t)) for t in range(1, steps + 1)]
    rounding = 1 + 8 * max(n, k) * EPS
    assert errors[0] <= plain * rounding + 8 * max(n, k) * EPS * float(W.norm())
    assert all(b <= a * rounding for a, b in itertools.pairwise(errors))


def test_more_rounds_help_and_the_scaling_is_honoured() -> None:
    W = torch.randn(128, 128)
    fits = {}
    for s in (0.5, 4.0):
        errors = []
        for steps in (1, 5):
            layer, down, up = loftq(W, None, 16, s, steps)
            fits[s] = layer.dense_weight() + s * up @ down
            errors.append(float((W - fits[s]).norm()))
        plain = float((W - NF4Linear.from_tensor(W).dense_weight()).norm())
        assert errors[1] < errors[0] < 0.95 * plain
    assert (fits[0.5] - fits[4.0]).norm() <= 1e-4 * W.norm()


def test_loftq_in_a_model(hold_to_dense: Hold) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False)).eval()
    original = copy.deepcopy(model)
    add_adapter(model, LoRAConfig(init="loftq", r=8, alpha=4, loftq_steps=3))
    for i in (0, 2):
        host = model[i]
        assert isinstance(host.base, NF4Linear)
        assert not host.training
        assert not host.base.training
        pair = host.adapter("default")
        assert pair.A0 is None
        W = original[i].weight
        error = (W - host.base.dense_weight() - host.delta_weight()).norm()
        assert error < (W - NF4Linear.from_linear(original[i]).dense_weight()).norm()
        assert not any(p.requires_grad for p in host.base.parameters())
        assert (host.bias is None) == (i == 2)
        assert pair.trained_on.startswith("nf4")
    hold_to_dense(filled(model[0]), torch.randn(3, 64))
    old = weakref.ref(model[0].base)
    merge_adapters(model, keep_base=False)
    gc.collect()
    assert old() is None  # the pair does not keep the 4-bit base alive


def test_what_is_left_of_loftq_is_the_quantized_base() -> None:
    for remove in (lambda m: delete_adapter(m, "default"), unload_adapters):
        model = nn.Sequential(nn.Linear(64, 8))
        add_adapter(model, LoRAConfig(init="loftq", r=2))
        base = model[0].base
        remove(model)
        assert model[0] is base
        assert isinstance(base, NF4Linear)


def test_loftq_and_dora_measure_the_quantized_base() -> None:
    host = adapted(nn.Linear(64, 8), init="loftq", r=2, use_dora=True)
    pair = host.adapter("default")
    V = host.base.dense_weight() + pair.form.delta(pair.A, pair.B) * pair.scaling
    assert ((pair.magnitude - V.norm(dim=1)).abs() <= 1e-5 * V.norm(dim=1)).all()
    x = torch.randn(3, 64)
    assert (host(x) - x @ V.T - host.base.bias).abs().max() <= 1e-4


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Linear(4, 3), {"init": "pissa", "r": 4}, "init='pissa': r = 4 is above the size of 'l"),
        (nn.Linear(4, 3), {"init": "olora", "alpha": 0}, "init='olora' needs alpha above 0; at 'l"),
        (nn.Linear(4, 3), {"init": "pissa", "alpha": -2}, "needs alpha above 0; at 'layer' it is"),
        (nn.Conv1d(4, 4, 1, groups=2), {"init": "pissa"}, "cannot be used for 'layer', a convolut"),
        (nn.Conv1d(4, 4, 1), {"init": "loftq"}, "'layer' is Conv1d: load the model without quanti"),
        (nn.Embedding(4, 4), {"init": "loftq"}, "'layer' is Embedding: load the model without"),
        (
            NF4Linear.from_linear(nn.Linear(64, 4)),
            {"init": "loftq"},
            "init='loftq' needs a dense linear layer in one part, .* 'layer' is NF4Linear",
        ),
        (
            nn.Linear(4, 4),
            {"init": "loftq", "parts": {"layer": [2, 2]}},
            "linear layer in one part",
        ),
        (nn.Linear(4, 4), {"init": "pissa", "parts": {"layer": [3, 1]}}, "of 'layer', 1"),
    ],
)
def test_layers_that_a_start_refuses(
    layer: nn.Module, options: dict[str, Any], message: str, state_of: State
) -> None:
    model = Box(layer)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        add_adapter(model, LoRAConfig(targets=["layer"], **{"r": 2, **options}))
    assert state_of(model) == before


def test_loftq_under_another_adapter_is_refused(state_of: State) -> None:
    model = Box(nn.Linear(64, 4))
    add_adapter(model, LoRAConfig(targets=["layer"], r=2), "first")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"quantizes the base, on which the adapters \['first'\]"):
        add_adapter(model, LoRAConfig(targets=["layer"], r=2, init="loftq"), "second")
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "pisa"}, "init must be one of 'kaiming', 'gaussian', 'pissa', 'pissa_niter_<n>'"),
        ({"init": "pissa_niter_"}, "got 'pissa_niter_'"),
        ({"init": "pissa_niter_<n>"}, "got 'pissa_niter_<n>'"),
        ({"init": None}, "got None"),
        ({"loftq_steps": 0}, "loftq_steps must be a whole number of at least 1, got 0"),
        ({"loftq_steps": True}, "loftq_steps must be a whole number"),
    ],
)
def test_unknown_starts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**options)
