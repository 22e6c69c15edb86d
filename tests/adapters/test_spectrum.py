"""Spectra of updates against the dense matrix in float64, and what the numbers mean."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.adapters import (
    Adapter,
    BottleneckConfig,
    LoRAConfig,
    adapted_modules,
    add_adapter,
    merge_adapters,
    set_adapters,
    unmerge_adapters,
)
from lora_core.adapters.forms import form_of
from lora_core.adapters.spectrum import LayerSpectrum, adapter_spectrum
from lora_core.adapters.update import Update, difference, low_rank, update_of
from lora_core.quant import NF4Linear

U = 2.0**-53  # unit roundoff of float64


def values(matrix: Tensor) -> list[float]:
    return torch.linalg.svdvals(matrix.double()).tolist()


def near(ours, theirs, size: float, n: int) -> None:
    """Singular values differ by at most the norm of what rounding did to the matrix (Weyl)."""
    theirs = sorted(theirs, reverse=True)
    ours = list(ours) + [0.0] * (len(theirs) - len(ours))
    assert len(ours) == len(theirs) or max(ours[len(theirs) :], default=0.0) == 0.0
    bound = 64 * n * U * size
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=False)) <= bound


KINDS = {
    "plain": {"r": 4},
    "grouped": {"r": 8, "targets": ["grouped"]},
    "rslora": {"r": 4, "use_rslora": True, "alpha": 3},
    "parts": {"r": 3, "parts": {"fused": [3, 5, 7]}, "targets": ["fused", "mix"]},
    "pissa": {"r": 4, "init": "pissa", "targets": ["fused", "mix", "conv"]},
    "dora": {"r": 4, "use_dora": True, "targets": ["fused", "mix", "grouped"]},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_against_the_dense_update(every_form, shake, kind) -> None:
    options = {"targets": ["embed", "fused", "mix", "conv", "grouped"], **KINDS[kind]}
    add_adapter(every_form, LoRAConfig(**options))
    shake(every_form)
    report = adapter_spectrum(every_form)
    hosts = dict(adapted_modules(every_form))
    assert [layer.name for layer in report.layers] == list(hosts)
    assert report.left_out == ()
    for layer in report.layers:
        host = hosts[layer.name]
        base, adapter = host.base, host.adapters["default"]
        bias = None if getattr(base, "bias", None) is None else base.bias.detach().double()
        merged, _ = adapter.merged(base.weight.detach().double(), bias)
        matrix = form_of(base).matrix(merged - base.weight.detach().double())
        dense = torch.block_diag(*matrix.chunk(getattr(base, "groups", 1)))
        size = float(merged.norm())
        near(layer.singular_values, values(dense), size, sum(dense.shape))
        assert math.isclose(layer.norm, float(matrix.norm()), rel_tol=1e-12)
        assert math.isclose(layer.base_norm, float(base.weight.double().norm()), rel_tol=1e-12)
        assert layer.ratio == layer.norm / layer.base_norm
        assert layer.shape == tuple(matrix.shape)
        assert layer.kind == ("DoRA" if kind == "dora" else "LoRA")
    text = str(report)
    assert all(layer.name in text for layer in report.layers)
    assert json.loads(json.dumps(report.as_dict()))["layers"][0]["name"] == report.layers[0].name


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31), st.booleans()
)
def test_factors_of_any_shape(rows, columns, rank, seed, huge) -> None:
    """Ranks above the layer's size, single rows, magnitudes that float32 could not square."""
    generator = torch.Generator().manual_seed(seed)
    down, up = (
        torch.randn(rank, columns, generator=generator),
        torch.randn(rows, rank, generator=generator),
    )
    scaling = 1e30 if huge else 0.25
    update = low_rank(down, up, scaling)
    dense = up.double() @ down.double() * scaling
    near(update.singular_values(), values(dense), float(up.norm() * down.norm()) * scaling, 24)
    us, s, vh = update.svd()[0]
    residue = (us * s) @ vh - dense
    assert float(residue.norm()) <= 64 * 24 * U * float(up.norm() * down.norm()) * scaling
    near(
        s.tolist(), update.singular_values().tolist(), float(up.norm() * down.norm()) * scaling, 24
    )


def test_no_dense_update_is_formed() -> None:
    """A million by a million would take 8 TB."""
    update = low_rank(torch.randn(2, 1_000_000), torch.randn(1_000_000, 2), 1.0)
    assert update.singular_values()[0] > 0


def test_a_start_that_is_subtracted_is_nothing(every_form) -> None:
    """PiSSA begins at ΔW = 0, whose factors are large: rounding is not mistaken for an update."""
    add_adapter(every_form, LoRAConfig(r=4, init="pissa", targets=["fused", "mix"]))
    for layer in adapter_spectrum(every_form).layers:
        assert layer.singular_values == ()
        assert (layer.norm, layer.rank, layer.effective_rank, layer.stable_rank) == (0, 0, 0, 0)
    assert "0.000%" in str(adapter_spectrum(every_form))


def test_the_two_ranks() -> None:
    def layer(*values: float) -> LayerSpectrum:
        return LayerSpectrum("a", "LoRA", (9, 9), 1.0, None, values, 0.0)

    assert layer(2, 2, 2).effective_rank == pytest.approx(3, rel=4 * 2**-52)
    assert layer(2, 2, 2).stable_rank == 3
    assert layer(5).effective_rank == layer(5).stable_rank == 1
    # p = (3/4, 1/4): exp(H) = 4 / 3^(3/4)
    assert layer(3, 1).effective_rank == pytest.approx(4 / 3**0.75, rel=8 * 2**-52)
    assert layer(3, 1).stable_rank == pytest.approx(10 / 9, rel=4 * 2**-52)
    assert layer(1, 1e-320).effective_rank == pytest.approx(1, rel=1e-15)
    assert layer(1.0).ratio is None
    beside_zeros = LayerSpectrum("a", "LoRA", (1, 1), 1.0, 0.0, (1.0,), 0.0)
    assert beside_zeros.ratio == math.inf
    assert beside_zeros.as_dict()["ratio"] is None
    assert LayerSpectrum("a", "LoRA", (1, 1), 0.0, 0.0, (), 0.0).ratio == 0


def test_a_four_bit_base() -> None:
    model = nn.Sequential(NF4Linear.from_linear(nn.Linear(128, 64)))
    add_adapter(model, LoRAConfig(r=2, targets=["0"]))
    layer = adapter_spectrum(model).layers[0]
    assert layer.base_norm == pytest.approx(float(model[0].base.dense_weight().double().norm()))
    assert layer.shape == (64, 128)


def test_biases_copies_and_rows(make_token_model, shake) -> None:
    model = make_token_model(False)
    config = LoRAConfig(
        r=2,
        targets=["mix"],
        lora_bias=True,
        modules_to_save=["head"],
        trainable_token_indices={"embed": [3, 5]},
    )
    add_adapter(model, config)
    shake(model)
    report = adapter_spectrum(model)
    found = {layer.name: layer for layer in report.layers}
    assert set(found) == {"embed", "mix", "head"}
    assert found["embed"].rank == 2
    assert found["embed"].kind == "TrainableTokens"
    assert found["mix"].bias_change > 0
    assert found["head"].bias_change > 0
    head = model.head.adapters["default"].copy.weight.double()
    head = head - model.head.base.weight.double()
    near(found["head"].singular_values, values(head), 10, 30)
    assert "biases change in 2 of these layers" in str(report)


class Scale(Adapter):
    """A kind of one's own: y * (1 + v)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.ones(size) / 2)

    def forward(self, x, y, base):
        return y * (1 + self.v)

    def merged(self, weight, bias):
        return weight * (1 + self.v.to(weight.dtype))[:, None], bias


class Nothing(Adapter):
    """A kind that merges, at a module without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.ones(1))

    def forward(self, x, y, base):
        return y

    def merged(self, weight, bias):
        return weight, bias


class Own:
    def build(self, name, module):
        if isinstance(module, nn.Linear):
            return Scale(module.out_features)
        return Nothing() if isinstance(module, nn.ReLU) else None


def test_a_kind_of_ones_own(mlp) -> None:
    add_adapter(mlp, Own(), "own")
    report = adapter_spectrum(mlp, "own")
    for layer in report.layers:
        assert layer.ratio == pytest.approx(0.5, rel=1e-12)
    assert report.left_out == (("mid.1", "ReLU has no weight of its own to compare"),)
    assert "left out: mid.1: ReLU has no weight" in str(report)


def test_it_changes_nothing(mlp, shake, state_of) -> None:
    add_adapter(mlp, LoRAConfig(r=2), "a")
    add_adapter(mlp, LoRAConfig(r=3, use_dora=True), "b")
    shake(mlp)
    set_adapters(mlp, [])
    before = state_of(mlp)
    one, other = adapter_spectrum(mlp, "a"), adapter_spectrum(mlp, "b")
    assert state_of(mlp) == before
    assert one != other
    set_adapters(mlp, "a")
    merge_adapters(mlp)
    assert adapter_spectrum(mlp, "a") == one
    unmerge_adapters(mlp)


def test_refusals(mlp, shake) -> None:
    with pytest.raises(ValueError, match="no adapter 'default' in the model"):
        adapter_spectrum(mlp)
    add_adapter(mlp, BottleneckConfig(4, feed_forward=["mid.0"]), "wide")
    with pytest.raises(
        ValueError, match="'wide' changes no weight: it has no linear update: a bott"
    ):
        adapter_spectrum(mlp, "wide")
    add_adapter(mlp, LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r"no adapter 'defualt' in the model; nearest names: 'def"):
        adapter_spectrum(mlp, "defualt")
    mlp.inp.adapters["default"].A.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the update of 'inp' holds NaN or infinity"):
        adapter_spectrum(mlp)
    mlp.inp.adapters["default"].A.data[0, 0] = 0
    merge_adapters(mlp, keep_base=False)
    with pytest.raises(ValueError, match="'inp' was merged with keep_base=False: its base is gone"):
        adapter_spectrum(mlp)


def test_a_merge_of_another_shape_is_left_out() -> None:
    class Wrong(Nothing):
        def merged(self, weight, bias):
            return weight[:1], bias

    with pytest.raises(ValueError, match=r"it makes a weight of shape \(1, 3\) of \(2, 3\)"):
        update_of(Wrong(), nn.Linear(3, 2))


def test_updates_by_hand() -> None:
    update = difference(None, torch.ones(3, 2, 2), torch.zeros(3, 2, 2))
    assert update.shape == (3, 4)
    assert update.norm() == pytest.approx(12**0.5)
    assert Update((1, 1), down=torch.ones(1, 1).double(), up=torch.ones(1, 1).double()).norm() == 1
