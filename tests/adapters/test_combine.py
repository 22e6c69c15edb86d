"""Weighted combinations: the exact sum against dense sums, lower ranks against the best one."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.adapters import (
    BottleneckConfig,
    LoRAConfig,
    active_names,
    adapted_modules,
    add_adapter,
    delete_adapter,
    merge_adapters,
    set_adapters,
)
from lora_core.adapters.combine import combine_adapters
from lora_core.adapters.lora import LoRA
from lora_core.adapters.ties import dare, sketched, ties, trim
from lora_core.adapters.update import Update
from lora_core.checkpoint import load_adapter, save_adapter
from lora_core.testing.bounds import exceeds, gamma

Delta = Callable[[LoRA], Tensor]
State = Callable[[nn.Module], dict[str, Any]]
Make = Callable[[], nn.Module]

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 8),
    "embedding": lambda: nn.Embedding(9, 8),
    "conv2d": lambda: nn.Conv2d(4, 8, (3, 1)),
    "conv2d in groups": lambda: nn.Conv2d(4, 8, 3, groups=2),
}
CONFIGS = {
    "a": LoRAConfig(r=4, alpha=8, targets=["0"]),
    "b": LoRAConfig(r=2, alpha=6, targets=["0"]),
    "c": LoRAConfig(r=4, alpha=5, use_rslora=True, targets=["0"]),
}


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, host in adapted_modules(model):
            for p in host.adapters.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
    return model


def made(kind: str) -> nn.Module:
    model = nn.Sequential(LAYERS[kind]())
    for name, config in CONFIGS.items():
        add_adapter(model, config, name)
    return filled(model)


def pair(model: nn.Module, name: str, site: str = "0") -> LoRA:
    found = dict(adapted_modules(model))[site].adapter(name)
    assert isinstance(found, LoRA)
    return found


def size(adapter: LoRA) -> Tensor:
    """|B| |A| |s|, what roundings are relative to."""
    down, up = (factor.detach().double().abs() for factor in adapter.factors())
    g = adapter.form.groups
    blocks = [b @ a for a, b in zip(down.chunk(g), up.chunk(g), strict=True)]
    return abs(adapter.scaling) * torch.cat(blocks)


@pytest.fixture(scope="session")
def check_exact(delta: Delta) -> Callable[..., None]:
    def check(model: nn.Module, names: list[str], weights: list[float], site: str = "0") -> None:
        """The new pair is the weighted sum; B is rounded to float32 once."""
        new = pair(model, "combined", site)
        wanted, allowed = torch.zeros_like(delta(new)), torch.zeros_like(delta(new))
        for name, weight in zip(names, weights, strict=True):
            if name in dict(adapted_modules(model))[site].adapters:
                wanted += weight * delta(pair(model, name, site))
                allowed += abs(weight) * size(pair(model, name, site))
        assert exceeds(delta(new), wanted, gamma(2) * allowed) is None

    return check


@pytest.mark.parametrize("kind", LAYERS)
@given(weights=st.lists(st.floats(-4, 4).filter(lambda w: abs(w) > 1e-6), min_size=3, max_size=3))
def test_the_exact_combination_is_the_weighted_sum(
    check_exact: Callable[..., None], kind: str, weights: list[float]
) -> None:
    model = made(kind)
    report = combine_adapters(model, list("abc"), weights)
    check_exact(model, list("abc"), weights)
    new = pair(model, "combined")
    assert (new.r, new.scaling) == (10, 1.0)
    (layer,) = report.layers
    assert (layer.name, layer.rank) == ("0", 10)
    assert layer.error <= 1e-6


def test_fused_parts_starts_that_are_subtracted_and_patterns_count_as_they_are_applied(
    check_exact: Callable[..., None],
) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    add_adapter(model, LoRAConfig(r=2, alpha=3, targets=["0"], parts={"0": [3, 5]}), "a")
    add_adapter(model, LoRAConfig(r=2, alpha=5, targets=["0", "1"], init="pissa"), "b")
    patterns = {"rank_pattern": {"1": 3}, "alpha_pattern": {"1": 7}, "use_rslora": True}
    add_adapter(model, LoRAConfig(r=1, alpha=5, targets=["0", "1"], **patterns), "c")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    report = combine_adapters(model, list("abc"), [1.0, -0.5, 2.0])
    for site in "01":
        check_exact(model, list("abc"), [1.0, -0.5, 2.0], site)
    assert [layer.rank for layer in report.layers] == [4 + 4 + 1, 4 + 3]
    x = torch.randn(3, 6)
    with torch.no_grad():
        set_adapters(model, "combined")
        together = model[0](x).double()
        plain = (x @ model[0].base.weight.t() + model[0].base.bias).double()
        wanted = plain.clone()
        for name, weight in (("a", 1.0), ("b", -0.5), ("c", 2.0)):
            set_adapters(model, name)
            wanted += weight * (model[0](x).double() - plain)
    torch.testing.assert_close(together, wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())


def test_adding_and_subtracting_an_adapter_gives_the_other_back(delta: Delta) -> None:
    model = made("linear")
    combine_adapters(model, ["a", "b"], [1, 1], name="both")
    combine_adapters(model, ["both", "b"], [1, -1], name="again")
    bound = gamma(8) * (size(pair(model, "a")) + 2 * size(pair(model, "b")))
    assert exceeds(delta(pair(model, "again")), delta(pair(model, "a")), bound) is None
    report = combine_adapters(model, ["both", "a", "b"], [1, -1, -1], name="nothing")
    assert report.layers[0].error < 1e-6  # relative to the terms, where the sum is 0


def test_no_cross_terms(delta: Delta) -> None:
    """B₁A₂ is what a sum of the factors would add."""
    model = nn.Sequential(nn.Linear(4, 4))
    for name in "ab":
        add_adapter(model, LoRAConfig(r=1, alpha=1, targets=["0"]), name)
    with torch.no_grad():
        for i, name in enumerate("ab"):
            pair(model, name).A.copy_(torch.eye(4)[i : i + 1])
            pair(model, name).B.copy_(torch.eye(4)[:, 2 + i : 3 + i])
    for method in ("exact", "svd"):
        options = {} if method == "exact" else {"rank": 2}
        combine_adapters(model, ["a", "b"], [1, 1], method, **options)
        wanted = torch.zeros(4, 4)
        wanted[2, 0] = wanted[3, 1] = 1
        torch.testing.assert_close(delta(pair(model, "combined")), wanted.double())
        delete_adapter(model, "combined")


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rank", [2, 4, None])
def test_svd_is_the_best_of_its_rank(delta: Delta, kind: str, rank: int | None) -> None:
    model = made(kind)
    report = combine_adapters(model, list("abc"), [1, 0.5, -2], "svd", rank=rank)
    new, r = pair(model, "combined"), rank or 4
    assert new.r == r
    whole = sum(w * delta(pair(model, n)) for n, w in zip("abc", (1, 0.5, -2), strict=True))
    g = new.form.groups
    missed = [torch.linalg.svdvals(block)[r // g :] for block in whole.chunk(g)]
    best = math.sqrt(sum(float(values.square().sum()) for values in missed))
    error = float((delta(new) - whole).norm())
    rounding = gamma(4) * float(size(new).norm())
    assert best - rounding <= error <= best + rounding
    assert report.layers[0].error == pytest.approx(error / float(whole.norm()), abs=1e-9)


# --- TIES and DARE -------------------------------------------------------------------------------


def test_ties_element_by_element(delta: Delta) -> None:
    model = made("linear")
    names, weights, density = list("abc"), (1.0, 0.5, -1.0), 0.4
    trimmed = []
    for name, weight in zip(names, weights, strict=True):
        values = delta(pair(model, name)).tolist()
        magnitudes = sorted((abs(v) for row in values for v in row), reverse=True)
        least = magnitudes[math.ceil(density * len(magnitudes)) - 1]
        trimmed.append([[weight * v if abs(v) >= least else 0.0 for v in row] for row in values])
    wanted = torch.zeros(8, 6, dtype=torch.float64)
    for i, j in itertools.product(range(8), range(6)):
        column = [matrix[i][j] for matrix in trimmed]
        sign = math.copysign(1, sum(column)) if sum(column) else 0
        agreeing = [v for v in column if v * sign > 0]
        wanted[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    report = combine_adapters(model, names, weights, "ties", rank=6, density=density)
    got = delta(pair(model, "combined"))
    assert exceeds(got, wanted, gamma(16) * float(wanted.norm()) * torch.ones_like(wanted)) is None
    whole = sum(w * delta(pair(model, n)) for n, w in zip(names, weights, strict=True))
    off = float((wanted - whole).norm() / whole.norm())
    assert report.layers[0].error == pytest.approx(off, rel=1e-5)


def test_ties_of_one_adapter_with_all_elements_is_the_adapter() -> None:
    model = made("conv2d in groups")
    report = combine_adapters(model, ["a"], [1], "ties", density=1.0)
    assert report.layers[0].error < 1e-6


def test_trimming_keeps_exactly_so_many() -> None:
    matrix = torch.tensor([[3.0, -3, 3, 1], [0, -5, 2, 3]])
    for density in (0.1, 0.5, 0.51, 1.0):
        kept = trim(matrix, density)
        assert int((kept != 0).sum()) == min(math.ceil(density * 8), 7)  # one is 0 itself
        assert float(kept.abs().sum()) == float(
            matrix.abs().flatten().topk(math.ceil(density * 8))[0].sum()
        )
        assert torch.equal(kept[kept != 0], matrix[kept != 0])


def test_signs_that_cancel_give_nothing() -> None:
    one = torch.tensor([1.0, 2.0, 0.0, -1.0])
    two = torch.tensor([-1.0, 1.0, 0.0, -3.0])
    assert ties([one, two]).tolist() == [0.0, 1.5, 0.0, -2.0]


def test_dare_drops_and_rescales() -> None:
    x = torch.arange(1.0, 10001.0).view(100, 100)
    y = dare(x, 0.25, torch.Generator().manual_seed(1))
    kept = y != 0
    assert torch.equal(y[kept], 4 * x[kept])
    assert abs(float(kept.float().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 10000)
    assert not torch.equal(kept, dare(x, 0.25, torch.Generator().manual_seed(2)) != 0)


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_dare_is_repeatable_and_dense_dare_drops_nothing(delta: Delta, method: str) -> None:
    model = made("linear")
    found = []
    for seed in (3, 3, 4):
        options = {"rank": 6, "density": 0.5, "seed": seed}
        combine_adapters(model, ["a", "b"], [1, -1], method, **options)
        found.append(delta(pair(model, "combined")))
        delete_adapter(model, "combined")
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    other = "exact" if method == "dare" else "ties"
    options = {} if other == "exact" else {"rank": 6, "density": 1.0}
    combine_adapters(model, ["a", "b"], [1, -1], other, "other", **options)
    combine_adapters(model, ["a", "b"], [1, -1], method, rank=6, density=1.0)
    wanted = delta(pair(model, "other"))
    bound = gamma(16) * float(wanted.norm()) * torch.ones_like(wanted)
    assert exceeds(delta(pair(model, "combined")), wanted, bound) is None


def test_a_large_matrix_is_sketched_to_within_a_percent_of_the_best() -> None:
    matrix = torch.randn(560, 600).double() * torch.linspace(2, 0.1, 600).double()
    best = math.sqrt(float(torch.linalg.svdvals(matrix)[8:].square().sum()))
    product = sketched(Update((560, 600), matrix=matrix), 8)
    assert product.matrix is None
    u, s, vh = product.svd()[0]
    error = float((matrix - (u[:, :8] * s[:8]) @ vh[:8]).norm())
    assert best <= error <= 1.01 * best
    small = Update((8, 6), matrix=torch.randn(8, 6).double())
    assert sketched(small, 2) is small


# --- biases, files, the model around it ----------------------------------------------------------


def test_biases_are_combined_linearly(make_mlp: Make, tmp_path: Path) -> None:
    model = make_mlp()
    add_adapter(model, LoRAConfig(r=2, targets=["inp"], bias="all"), "a")
    add_adapter(model, LoRAConfig(r=2, alpha=3, targets=["0", "inp"], lora_bias=True), "b")
    add_adapter(model, LoRAConfig(r=1, targets=["head"], bias="lora_only"), "c")
    filled(model)
    weights = [0.5, -2.0, 1.0]
    combine_adapters(model, list("abc"), weights)
    hosts = dict(adapted_modules(model))
    for site, dims in (("inp", 12), ("mid.0", 24), ("head", 24)):
        x = torch.randn(4, dims)
        with torch.no_grad():
            plain = hosts[site].base(x).double()
            wanted, total = plain.clone(), plain.abs()
            for name, weight in zip("abc", weights, strict=True):
                set_adapters(model, name)
                wanted += weight * (hosts[site](x).double() - plain)
                total += abs(weight) * hosts[site](x).abs().double()
            set_adapters(model, "combined")
            got = hosts[site](x).double()
        # a dozen roundings of sums of at most 24 products of normals
        assert float((got - wanted).abs().max()) <= gamma(80) * 40 * float(total.max())
    save_adapter(model, tmp_path, "combined")
    other = make_mlp()
    other.load_state_dict(
        {
            k.replace(".base.", "."): v
            for k, v in model.state_dict().items()
            if ".adapters." not in k
        }
    )
    load_adapter(other, tmp_path)
    x = torch.randn(4, 12)
    assert torch.equal(other(x), model(x))


def test_biases_beside_an_embedding(make_token_model: Callable[[bool], nn.Module]) -> None:
    model = make_token_model(False)
    add_adapter(model, LoRAConfig(r=2, targets=["mix"], lora_bias=True), "a")
    add_adapter(model, LoRAConfig(r=2, targets=["embed"]), "b")
    filled(model)
    combine_adapters(model, ["a", "b"], [2, 1])
    new, old = pair(model, "combined", "mix"), pair(model, "a", "mix").bias_change()
    change = new.bias_change()
    assert change is not None
    assert old is not None
    assert exceeds(change, 2 * old, gamma(2) * (2 * old.abs() + new.bias0.abs())) is None


def test_the_new_adapter_is_neither_active_nor_trained_and_nothing_else_changes() -> None:
    model = made("linear")
    set_adapters(model, ["a", "c"], trainable=True)
    x = torch.randn(2, 6)
    y = model(x)
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    combine_adapters(model, ["a", "b"], [1, 1])
    assert active_names(model) == ["a", "c"]
    assert torch.equal(model(x), y)
    now = {n: p.requires_grad for n, p in model.named_parameters()}
    assert [(n, now[n]) for n, _ in flags] == flags
    assert not any(p.requires_grad for p in pair(model, "combined").parameters())
    set_adapters(model, "combined", trainable=True)
    assert all(p.requires_grad for p in pair(model, "combined").parameters())
    assert pair(model, "combined").trained_on == "float32"


def test_the_report_prints() -> None:
    report = combine_adapters(made("linear"), ["a", "b"], [1, 1])
    assert str(report).splitlines()[0].startswith("'combined' (exact): 1 layers, at most 0.000")
    assert str(report).splitlines()[1].startswith("  0: rank 6, 0.000")
    assert report.as_dict()["layers"][0]["rank"] == 6


CASES: list[tuple[dict[str, Any], str]] = [
    ({"names": "a"}, "needs a list of different adapters, got 'a'"),
    ({"names": []}, "needs a list of different adapters"),
    ({"names": ["a", "a"]}, "needs a list of different adapters"),
    ({"names": ["a", "B"]}, "no adapter 'B' in the model; na"),
    ({"weights": [1]}, "2 adapters need a weight each, got 1 weights"),
    ({"weights": [1, float("nan")]}, "the weight of 'b' must be a finite number, got nan"),
    ({"weights": [1, "2"]}, "the weight of 'b' must be a finite number, got '2'"),
    ({"weights": [0, 0]}, "all weights are 0"),
    ({"name": "c"}, "the adapter name 'c' is taken"),
    ({"name": "x.y"}, "'x.y' cannot name an adapter"),
    (
        {"method": "cat"},
        "method must be one of 'exact', 'svd', 'ties', 'dare', 'dare_ties', got 'c",
    ),
    ({"method": "linear"}, "'exact' is the linear combination"),
    ({"rank": 2}, "'exact' has the sum of the ranks"),
    ({"method": "svd", "rank": 0}, "rank must be a whole number of at least 1, got 0"),
    ({"method": "ties"}, "'ties' needs a density"),
    ({"method": "ties", "density": 0.0}, r"density must lie in \(0, 1\], got 0.0"),
    ({"method": "svd", "density": 0.5}, "'svd' keeps all elements: it takes no density"),
    ({"method": "ties", "density": 0.5, "seed": 1}, "'ties' draws nothing at random"),
    ({"names": ["a", "dora"]}, "'dora' cannot be combined: at '0' it is a DoRA, and only LoRA's"),
    ({"names": ["a", "neck"]}, "'neck' cannot be combined: at '0' it is a BottleneckAdapter"),
    ({"names": ["a", "nan"]}, "an adapter at '0' holds NaN or infinity"),
]


@pytest.mark.parametrize(("changes", "message"), CASES)
def test_what_cannot_be_combined_is_one_line_and_changes_nothing(
    changes: dict[str, Any], message: str, state_of: State
) -> None:
    model = made("linear")
    add_adapter(model, LoRAConfig(r=2, use_dora=True, targets=["0"]), "dora")
    add_adapter(model, BottleneckConfig(reduction=2, feed_forward=["0"]), "neck")
    add_adapter(model, LoRAConfig(r=2, targets=["0"]), "nan")
    with torch.no_grad():
        pair(model, "nan").B.fill_(float("nan"))
    set_adapters(model, "b")
    before = state_of(model)
    options = {"names": ["a", "b"], "weights": [1, 1], **changes}
    with pytest.raises(ValueError, match=message) as caught:
        combine_adapters(model, **options)
    assert "\n" not in str(caught.value)
    after = state_of(model)
    assert str(after) == str(before)  # as text: NaN is not equal to itself


def test_a_merged_model_is_refused() -> None:
    model = made("linear")
    set_adapters(model, "a")
    merge_adapters(model)
    with pytest.raises(ValueError, match="is merged: call unmerge_adapters first"):
        combine_adapters(model, ["a", "b"], [1, 1])
