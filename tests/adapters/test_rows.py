"""Rows that name their adapters: each is what it is alone, and the others' business is not its own.

Weights and inputs are small whole numbers and scalings powers of two, so that every product and sum
is exact in float32 whatever its order: equal means equal in every bit, gradients included.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters import (
    Adapter,
    BottleneckConfig,
    LoRAConfig,
    adapted_modules,
    add_adapter,
    delete_adapter,
    disable_adapters,
    merge_adapters,
    set_adapters,
    unload_adapters,
)
from lora_core.adapters.lora import LoRA
from lora_core.adapters.row_stacks import PairStacks
from lora_core.adapters.rows import SiteRows, adapter_rows
from lora_core.quant import NF4Linear, quantize_model
from lora_core.testing.bounds import exceeds, gamma

Make = Callable[[], nn.Module]
Same = Callable[[Tensor, Tensor], bool]
State = Callable[[nn.Module], dict[str, Any]]
NAMES = ["a", None, "b", "a", "c", "b", None, "c"]


class Conv1D(nn.Module):
    """What transformers' Conv1D is: a linear layer that stores (K, N)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.zeros(nx, nf)), None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 8), (3, 6)),
    "linear, one vector a row": (lambda: nn.Linear(6, 8), (6,)),
    "transposed": (lambda: Conv1D(8, 6), (3, 6)),
    "embedding": (lambda: nn.Embedding(9, 8, padding_idx=2), (3,)),
    "embedding, one id a row": (lambda: nn.Embedding(9, 8), ()),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3, padding=1), (4, 7)),
    "conv2d, strided": (lambda: nn.Conv2d(4, 8, (3, 1), stride=2), (4, 7, 5)),
    "conv2d in groups": (
        lambda: nn.Conv2d(4, 8, 3, groups=2, padding=1, padding_mode="circular"),
        (4, 5, 5),
    ),
}


def integers(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (*model.parameters(), *model.buffers()):
            if p.is_floating_point():
                p.copy_(torch.randint(-2, 3, p.shape, generator=generator))
    return model


def inputs(layer: nn.Module, shape: tuple[int, ...], rows: int = len(NAMES)) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, (rows, *shape))
    return torch.randint(-3, 4, (rows, *shape)).float()


def trained(model: nn.Module) -> dict[str, Tensor]:
    for _, host in adapted_modules(model):
        host.adapters.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def results(model: nn.Module, outputs: Tensor, given: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Outputs, and gradients of a loss that every element has a weight of its own in."""
    parameters = trained(model)
    weights = torch.arange(outputs.numel()).view(outputs.shape) % 5 - 2.0
    wanted = [given, *parameters.values()] if given.requires_grad else [*parameters.values()]
    grads = torch.autograd.grad((outputs * weights).sum(), wanted, allow_unused=True)
    keys = (["x"] if given.requires_grad else []) + list(parameters)
    return outputs.detach(), dict(zip(keys, grads, strict=True))


def one_by_one(model: nn.Module, x: Tensor, names: list[str | None]) -> Tensor:
    outputs = []
    for row, name in enumerate(names):
        set_adapters(model, [] if name is None else name)
        outputs.append(model(x[row : row + 1]))
    return torch.cat(outputs)


def check_rows(model: nn.Module, x: Tensor, names: list[str | None]) -> None:
    """Outputs and gradients of a mixed batch against those of its rows."""
    trained(model)
    if x.is_floating_point():
        x.requires_grad_(True)
    with adapter_rows(model, names):
        together, gradients = results(model, model(x), x)
        with torch.no_grad():
            evaluated = model(x)
    assert all(host.mixture is None for _, host in adapted_modules(model))
    alone, wanted = results(model, one_by_one(model, x, names), x)
    assert torch.equal(together, alone)
    assert torch.equal(evaluated, alone)
    assert alone.abs().max() < 2**22  # so the numbers are exact, as promised above
    for key, gradient in gradients.items():
        assert (gradient is None) == (wanted[key] is None), key
        assert gradient is None or torch.equal(gradient, wanted[key]), key


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_are_what_they_are_alone(kind: str) -> None:
    layer, shape = LAYERS[kind][0](), LAYERS[kind][1]
    model = nn.Sequential(layer)
    biases = {"bias": "lora_only", "lora_bias": not isinstance(layer, nn.Embedding)}
    add_adapter(model, LoRAConfig(r=4, alpha=8, targets=["0"]), "a")
    add_adapter(model, LoRAConfig(r=2, alpha=8, targets=["0"], **biases), "b")
    add_adapter(model, LoRAConfig(r=4, alpha=1, use_rslora=True, targets=["0"]), "c")
    integers(model)
    assert all(adapter.mixes == "grouped" for adapter in model[0].adapters.values())
    check_rows(model, inputs(layer, shape), NAMES)


def test_fused_parts_and_starts_that_are_subtracted() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    add_adapter(model, LoRAConfig(r=2, alpha=4, targets=["0"], parts={"0": [3, 5]}), "a")
    add_adapter(model, LoRAConfig(r=2, alpha=2, targets=["0"], init="pissa"), "b")
    add_adapter(model, LoRAConfig(r=1, alpha=2, targets=["0"], init="olora"), "c")
    check_rows(integers(model), inputs(model[0], (3, 6)), NAMES)


@given(names=st.lists(st.sampled_from([None, "a", "b", "c", "d", "e"]), min_size=1, max_size=7))
def test_any_rows_of_any_kinds_at_any_sites(names: list[str | None]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    add_adapter(model, LoRAConfig(r=2, alpha=2, targets=["0", "2"]), "a")
    add_adapter(model, LoRAConfig(r=1, alpha=2, targets=["2", "4"]), "b")
    bottleneck = BottleneckConfig(reduction=2, activation="relu", feed_forward=["2"])
    add_adapter(model, bottleneck, "c")
    add_adapter(model, LoRAConfig(r=4, alpha=2, targets=["2"], bias="all"), "d")
    two = {"placement": "parallel", "feed_forward": ["2"], "feed_forward_input": ["0"]}
    add_adapter(model, BottleneckConfig(reduction=2, activation="relu", **two), "e")
    check_rows(integers(model), inputs(model[0], (2, 4), len(names)), names)


def test_dora_runs_on_its_own_rows(mlp: nn.Module, same_bits: Same) -> None:
    add_adapter(mlp, LoRAConfig(r=2), "a")
    add_adapter(mlp, LoRAConfig(r=2, use_dora=True), "d")
    integers(mlp)
    x = torch.randint(-1, 2, (4, 12)).float()
    with adapter_rows(mlp, ["d", "a", None, "d"]):
        y = mlp.inp(x)
    for row, name in enumerate(["d", "a", None, "d"]):
        set_adapters(mlp, [] if name is None else name)
        assert same_bits(y[row : row + 1], mlp.inp(x[row : row + 1]))


class Tuples(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return 2 * x, "kept"


class Negated(Adapter):
    def forward(self, x: Any, y: Any, base: nn.Module) -> Any:
        return (-y[0], *y[1:])


class NegatedConfig:
    def build(self, name: str, module: nn.Module) -> Adapter | None:
        adapter = Negated()
        adapter.p = nn.Parameter(torch.zeros(1))
        return adapter


def test_a_kind_of_ones_own_and_outputs_that_are_tuples() -> None:
    model = nn.Sequential(Tuples())
    add_adapter(model, NegatedConfig(), "own")
    x = torch.randn(3, 2)
    with adapter_rows(model, [None, "own", None]):
        y, kept = model(x)
    assert kept == "kept"
    assert torch.equal(y, torch.stack([2 * x[0], -2 * x[1], 2 * x[2]]))


class Doubled(LoRA):
    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return 2 * y


class DoubledConfig:
    def build(self, name: str, module: nn.Module) -> Adapter | None:
        return Doubled(2, 2, r=1) if isinstance(module, nn.Linear) else None


def test_a_kind_derived_from_lora_keeps_its_own_forward() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    x = torch.randn(2, 2)
    plain = model(x)
    add_adapter(model, DoubledConfig(), "own")
    with adapter_rows(model, ["own", None]):
        assert torch.equal(model(x), torch.stack([2 * plain[0], plain[1]]))


def test_rows_without_an_adapter_are_the_bases_bit_for_bit(
    mlp: nn.Module, same_bits: Same, shake: Callable[..., None]
) -> None:
    x = torch.randn(6, 12)
    x[1, 0], x[4, 0] = float("inf"), -0.0
    with torch.no_grad():
        mlp.head.weight.zero_()  # -0 in the output, where x is negative
    plain = mlp(x)
    add_adapter(mlp, LoRAConfig(r=2, targets=["inp"]), "a")
    add_adapter(mlp, LoRAConfig(r=3, targets=["0", "head"]), "new")
    shake(mlp)
    with torch.no_grad():
        for _, host in adapted_modules(mlp):
            if "new" in host.adapters:
                host.adapter("new").B.zero_()  # type: ignore[union-attr, operator]
            if "a" in host.adapters:
                host.adapter("a").B.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with adapter_rows(mlp, ["a", None, "new", "a", None, "new"]):
        y = mlp(x)
    for row in (1, 2, 4, 5):
        assert same_bits(y[row], plain[row])
    assert bool(y[0].isnan().all())


def test_all_rows_under_one_adapter_are_the_adapters_output(
    mlp: nn.Module, same_bits: Same, shake: Callable[..., None]
) -> None:
    x = torch.randn(5, 12)
    for name in "ab":
        add_adapter(mlp, LoRAConfig(r=3), name)
    shake(mlp)
    set_adapters(mlp, "a")
    y = mlp(x)
    set_adapters(mlp, "b")
    with adapter_rows(mlp, ["a"] * 5):
        assert same_bits(mlp(x), y)


def test_each_row_is_within_rounding_of_its_formula() -> None:
    layer, rows = nn.Linear(65, 33), [None, *"abcdef", "a"]
    model = nn.Sequential(layer)
    for r, name in enumerate("abcdef", start=1):
        add_adapter(model, LoRAConfig(r=r, alpha=3, targets=["0"]), name)
    x = torch.randn(8, 7, 65)
    host = model[0]
    with torch.no_grad():
        for adapter in host.adapters.values():
            adapter.B.normal_()
    with adapter_rows(model, rows):
        y = model(x)
    for row, name in enumerate(rows):
        product = x[row].double() @ layer.weight.double().t()
        size = x[row].double().abs() @ layer.weight.double().abs().t()
        wanted = product + layer.bias.double()
        size = size + layer.bias.double().abs()
        if name is not None:
            pair = host.adapter(name)
            down, up = pair.A.double(), pair.scaling * pair.B.double()
            wanted = wanted + x[row].double() @ down.t() @ up.t()
            size = size + x[row].double().abs() @ down.abs().t() @ up.abs().t()
        # a sum of K, one of r behind it, s·B and s themselves rounded, and the sum of both
        assert exceeds(y[row], wanted, gamma(65 + 6 + 4) * size) is None


def test_dropout_is_each_rows_own() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    for name, rate in (("some", 0.5), ("none", 0.0), ("most", 0.75)):
        add_adapter(model, LoRAConfig(r=64, alpha=64, dropout=rate, targets=["0"]), name)
    with torch.no_grad():
        model[0].base.weight.zero_()
        for adapter in model[0].adapters.values():
            adapter.A.copy_(torch.eye(64))
            adapter.B.copy_(torch.eye(64))
    x = torch.rand(4, 50, 64) + 1
    with adapter_rows(model, ["some", "none", "most", "some"]):
        y = model.train()(x)
        assert torch.equal(model.eval()(x), x)
    for row, rate in ((0, 0.5), (2, 0.75), (3, 0.5)):
        kept = y[row] != 0
        assert torch.equal(y[row][kept], (x[row] / (1 - rate))[kept])
        # 3200 draws: five deviations
        assert abs(kept.float().mean().item() - (1 - rate)) < 5 * (rate * (1 - rate) / 3200) ** 0.5
    assert torch.equal(y[1], x[1])
    assert not torch.equal(y[0] != 0, y[3] != 0)
    with adapter_rows(model, ["some"] * 4):
        share = (model.train()(x) != 0).float().mean().item()
    assert abs(share - 0.5) < 5 * (0.25 / 12800) ** 0.5


# --- what is made once ---------------------------------------------------------------------------


@pytest.fixture
def two(mlp: nn.Module, shake: Callable[..., None]) -> nn.Module:
    """An MLP with the adapters "a" and "b"."""
    for r, name in ((2, "a"), (3, "b")):
        add_adapter(mlp, LoRAConfig(r=r), name)
    shake(mlp)
    return mlp


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of the stacks that are made from now on."""
    found: list[torch.dtype] = []
    original = PairStacks._made

    def counted(self: PairStacks, dtype: torch.dtype) -> Any:
        found.append(dtype)
        return original(self, dtype)

    monkeypatch.setattr(PairStacks, "_made", counted)
    return found


ROWS = ["a", None, "b", "a"]


def test_between_two_batches_an_adapter_may_change_in_any_way(two: nn.Module) -> None:
    """Also past autograd's version counter, which an edit of `.data` does not move."""
    x, b = torch.randn(4, 12), two.inp.adapter("b")
    edits: list[Callable[[], object]] = [
        lambda: b.B.data.mul_(3),
        lambda: setattr(b.A, "data", b.A.data.flip(0)),
        lambda: b.load_state_dict({k: v * 2 for k, v in b.state_dict().items()}),
    ]
    for edit in edits:
        with torch.no_grad(), adapter_rows(two, ROWS):
            before = two(x)
        edit()
        with torch.no_grad(), adapter_rows(two, ROWS):
            after = two(x)
        fresh = copy.deepcopy(two)
        with torch.no_grad(), adapter_rows(fresh, ROWS):
            assert torch.equal(after, fresh(x))
        assert not torch.equal(after[2], before[2])
        assert torch.equal(after[:2], before[:2])


def test_without_gradients_stacks_are_made_once_and_again_when_something_changed(
    two: nn.Module, made: list[torch.dtype]
) -> None:
    x, pair = torch.randn(4, 12), two.inp.adapter("a")

    def fresh() -> Tensor:
        with adapter_rows(two, ROWS):
            return two(x)

    with torch.no_grad(), adapter_rows(two, ROWS):
        first = two(x)
        assert torch.equal(two(x), first)
        assert len(made) == 2  # one a site
        changes: list[Callable[[], object]] = [
            lambda: pair.A.mul_(2),
            lambda: setattr(pair, "scaling", pair.scaling * 2),
            lambda: setattr(pair, "B", nn.Parameter(pair.B * 3)),
        ]
        last = first
        for change in changes:
            change()
            made.clear()
            assert not torch.equal(two(x), last)
            assert len(made) == 1
            last = two(x)
            assert len(made) == 1
            assert torch.equal(last, fresh())
        made.clear()
        with torch.autocast("cpu", torch.bfloat16):
            two(x)
            two(x)
        assert made == [torch.bfloat16] * 2


def test_parameters_that_are_replaced_for_a_call_are_seen(two: nn.Module) -> None:
    x = torch.randn(4, 12)
    other = {name: p * 2 for name, p in two.named_parameters() if ".adapters." in name}
    with torch.no_grad(), adapter_rows(two, ROWS):
        before = two(x)
        there = torch.func.functional_call(two, other, (x,))
        assert torch.equal(two(x), before)
        for name, p in two.named_parameters():
            if name in other:
                p.copy_(other[name])
        assert torch.equal(two(x), there)


def test_stacks_that_evaluation_made_serve_training(two: nn.Module) -> None:
    x = torch.randn(4, 12, requires_grad=True)
    set_adapters(two, ["a", "b"], trainable=False)
    with torch.inference_mode(), adapter_rows(two, ROWS):
        two(x)
    with adapter_rows(two, ROWS):
        with torch.inference_mode():
            two(x)
        two(x).sum().backward()
    assert x.grad is not None


def test_sites_share_their_indices(two: nn.Module) -> None:
    with adapter_rows(two, ROWS):
        first, second = (host.mixture for _, host in adapted_modules(two))
        assert isinstance(first, SiteRows)
        assert isinstance(second, SiteRows)
        assert first.slots is second.slots
        assert first.chosen is second.chosen
        assert first.pairs is not None
        assert second.pairs is not None
        assert first.pairs.slots is second.pairs.slots


# --- 4-bit bases ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("training", [False, True])
def test_a_4bit_base(
    backend: str, training: bool, two: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KERNELS", backend)
    calls = []
    original = NF4Linear.linear_with_update

    def counted(self: NF4Linear, x: Tensor, *args: Any) -> Tensor:
        calls.append(args[-1])
        return original(self, x, *args)

    monkeypatch.setattr(NF4Linear, "linear_with_update", counted)
    model = nn.Sequential(nn.Linear(64, 48))
    quantize_model(model)
    for r, name in ((2, "a"), (3, "b")):
        add_adapter(model, LoRAConfig(r=r, targets=["0"]), name)
    parameters = [*trained(model).values()]
    with torch.no_grad():
        for p in parameters:
            p.normal_()
    x = torch.randn(4, 3, 64, dtype=torch.bfloat16)
    # the truth: the same rows by themselves in float64, by plain products
    weight, host = model[0].base.dense_weight().double(), model[0]
    bias = model[0].base.bias.double()
    with torch.set_grad_enabled(training), adapter_rows(model, ROWS):
        y = model(x)
        y = model(x)
    assert len(calls) == (2 if backend == "triton" else 0)
    if backend == "triton":
        assert calls[0] is calls[1]  # the form for each token is made once
    wanted, size = [], []
    for row, name in enumerate(ROWS):
        up = down = torch.zeros(1, 1, dtype=torch.float64)
        if name is not None:
            pair = host.adapter(name)
            down, up = pair.A.double(), pair.scaling * pair.B.double()
        else:
            down, up = torch.zeros(1, 64).double(), torch.zeros(48, 1).double()
        z = x[row].double()
        wanted.append(z @ weight.t() + bias + z @ down.t() @ up.t())
        size.append(
            z.abs() @ weight.abs().t() + bias.abs() + z.abs() @ down.abs().t() @ up.abs().t()
        )
    # roundings to bfloat16: W, bias, A, s·B, h, the update, y, and the sum
    bound = ((1 + gamma(64 + 8)) * (1 + gamma(8, 2.0**-8)) - 1) * torch.stack(size)
    assert exceeds(y, torch.stack(wanted), bound) is None
    if training:
        y.float().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in parameters)


def test_a_hook_on_a_4bit_base_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", "triton")
    model = nn.Sequential(nn.Linear(64, 32))
    quantize_model(model)
    add_adapter(model, LoRAConfig(r=2, targets=["0"]), "a")
    seen: list[int] = []
    with adapter_rows(model, ["a", None]):
        model(torch.zeros(2, 64, dtype=torch.bfloat16))
        model[0].base.register_forward_hook(lambda *_: seen.append(1))
        model(torch.zeros(2, 64, dtype=torch.bfloat16))
    assert seen == [1]


# --- entering and leaving -------------------------------------------------------------------------


def test_an_exception_leaves_nothing_behind(two: nn.Module, state_of: State) -> None:
    before = state_of(two)

    def fail() -> None:
        with adapter_rows(two, ROWS), disable_adapters(two):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert state_of(two) == before
    assert all(host.mixture is None for _, host in adapted_modules(two))


def test_contexts_nest_and_disabling_gives_the_base(two: nn.Module) -> None:
    x = torch.randn(2, 12)
    with disable_adapters(two):
        plain = two(x)
        with adapter_rows(two, ["a", "b"]):
            assert torch.equal(two(x), plain)
    with adapter_rows(two, ["a", "b"]):
        outer = two(x)
        with adapter_rows(two, ["b", "a"]):
            inner = two(x)
        assert torch.equal(two(x), outer)
        set_adapters(two, "b")  # what is active does not count here
        assert torch.equal(two(x), outer)
        with disable_adapters(two):
            assert torch.equal(two(x), plain)
        assert torch.equal(two(x), outer)
    assert not torch.equal(inner, outer)


def test_rows_that_all_name_the_base_need_no_adapter() -> None:
    model, x = nn.Sequential(nn.Linear(2, 2)), torch.randn(3, 2)
    with adapter_rows(model, [None, None]):  # no site, so no row is counted either
        assert torch.equal(model(x), model[0](x))


def test_what_cannot_be_done_is_said_and_changes_nothing(two: nn.Module, state_of: State) -> None:
    add_adapter(two, LoRAConfig(r=2, targets=["inp"], modules_to_save=["head"]), "copy")
    before = state_of(two)
    cases: list[tuple[Any, type[Exception], str]] = [
        ("ab", TypeError, "adapter_rows needs a list with an adapter's name, or None, for each"),
        (3, TypeError, "adapter_rows needs a list"),
        ([], ValueError, "needs a name, or None, for each row of the batch; got none"),
        (["a", 3], TypeError, "row 1 must name an adapter, or be None; got 3"),
        (["a", "A"], ValueError, "row 1 names 'A', but no adapter .* nearest names: 'a'|names he"),
        (["copy", "a"], ValueError, "rows of a batch cannot name 'copy': it has a FullCopy at 'he"),
    ]
    for names, kind, message in cases:
        with pytest.raises(kind, match=message) as caught, adapter_rows(two, names):
            pass
        assert "\n" not in str(caught.value)
        assert state_of(two) == before
    with pytest.raises(ValueError, match="names adapters for 2 rows, but the input of 'inp' has s"):
        _run(two, ["a", "b"], torch.randn(3, 12))
    assert state_of(two) == before
    merge_adapters(two, ["copy"])
    with pytest.raises(ValueError, match="adapter_rows while 'inp' is merged: call unmerge_adapte"):
        _run(two, ["a", "b"], torch.randn(2, 12))


def test_hosts_cannot_change_inside(two: nn.Module, state_of: State) -> None:
    before = state_of(two)
    with adapter_rows(two, ["a", None]):
        for change, what in (
            (lambda: add_adapter(two, LoRAConfig(r=2), "c"), "adding an adapter"),
            (lambda: delete_adapter(two, "a"), "deleting an adapter"),
            (lambda: merge_adapters(two), "merging"),
            (lambda: unload_adapters(two), "taking adapters out"),
        ):
            with pytest.raises(ValueError, match=f"{what} inside adapter_rows: leave that context"):
                change()
    assert state_of(two) == before


def _run(model: nn.Module, names: list[str | None], x: Tensor) -> Tensor:
    with adapter_rows(model, names):
        return model(x)


def test_a_module_whose_input_has_another_leading_dimension_is_named() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x.flatten(0, 1)).view(x.shape)

    model = Flat()
    add_adapter(model, LoRAConfig(r=1), "a")
    with pytest.raises(ValueError, match=r"2 rows, but the input of 'lin' has shape \(6, 4\): its"):
        _run(model, ["a", None], torch.randn(2, 3, 4))


def test_the_batch_may_be_a_keyword(two: nn.Module) -> None:
    x = torch.randn(4, 12)
    with adapter_rows(two, ROWS):
        assert torch.equal(two.inp(input=x), two.inp(x))


def test_deleting_an_adapter_between_contexts(two: nn.Module) -> None:
    x = torch.randn(4, 12)
    with adapter_rows(two, ["a", None, None, "a"]):
        y = two(x)
    delete_adapter(two, "b")
    with adapter_rows(two, ["a", None, None, "a"]):
        assert torch.equal(two(x), y)


def test_recomputed_layers_give_the_same_gradients_inside_the_context(two: nn.Module) -> None:
    from torch.utils.checkpoint import CheckpointError, checkpoint

    set_adapters(two, ["a", "b"], trainable=True)
    parameters = [p for p in two.parameters() if p.requires_grad]
    x = torch.randn(4, 12, requires_grad=True)
    with adapter_rows(two, ROWS):
        wanted = torch.autograd.grad(two(x).sum(), parameters)
        for reentrant in (False, True):
            y = checkpoint(two, x, use_reentrant=reentrant)
            y.sum().backward()
            assert all(torch.equal(p.grad, g) for p, g in zip(parameters, wanted, strict=True))
            two.zero_grad()
        y = checkpoint(two, x, use_reentrant=False)
    with pytest.raises(CheckpointError):  # without the context another model would be recomputed
        y.sum().backward()


def test_autocast_is_followed(two: nn.Module) -> None:
    x = torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        with adapter_rows(two, ROWS):
            y = two.inp(x)
        assert y.dtype == torch.bfloat16
        plain = F.linear(x, two.inp.base.weight, two.inp.base.bias)
    assert torch.equal(y[1], plain[1])
