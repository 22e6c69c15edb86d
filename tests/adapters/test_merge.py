"""Merging: exact going in, exact coming out, all layers or none."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.adapters import (
    Adapter,
    LoRA,
    LoRAConfig,
    LoRALinear,
    adapted_modules,
    add_adapter,
    delete_adapter,
    dense_weight,
    disable_adapters,
    merge_adapters,
    set_adapters,
    unload_adapters,
    unmerge_adapters,
)
from lora_core.adapters.merge import DenseLinear
from lora_core.quant import NF4Linear, quantize_model

Same = Callable[[Tensor, Tensor], bool]
Shake = Callable[..., None]
U = torch.finfo(torch.float32).eps / 2


def layer_of(base: nn.Module, r: int, alpha: float, seed: int, scale: float) -> LoRALinear:
    layer = LoRALinear(base, r=r, alpha=alpha)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (layer.A, layer.B):
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return layer


def magnitude(layer: LoRALinear, x: Tensor) -> Tensor:
    """|x||W|^T + |b| + |s||x||A|^T|B|^T in float64."""
    x = x.double().abs()
    W, A, B = (t.detach().double().abs() for t in (dense_weight(layer.base), layer.A, layer.B))
    size = x @ W.T + abs(layer.scaling) * (x @ A.T) @ B.T
    return size if layer.base.bias is None else size + layer.base.bias.double().abs()


@given(
    k=st.integers(1, 70),
    n=st.integers(1, 40),
    r=st.integers(1, 9),
    alpha=st.sampled_from([1.0, 16.0, -3.0]),
    scale=st.sampled_from([1e-3, 0.1, 3.0]),
    four_bit=st.booleans(),
    seed=st.integers(0, 99),
)
def test_merged_equals_unmerged_within_the_derived_bound(
    k: int, n: int, r: int, alpha: float, scale: float, four_bit: bool, seed: int
) -> None:
    """|dy| <= c eps (|x||W|^T + |b| + |s||x||A|^T|B|^T), c = m / (1 - m u), m = K + r + 3.

    Every term goes through at most m roundings on either way (tests of `lora_core.testing` count
    them), so each way errs by gamma(m) = m u / (1 - m u) of the sum of absolute terms.
    """
    torch.manual_seed(seed)
    linear = nn.Linear(k, n)
    layer = layer_of(NF4Linear.from_linear(linear) if four_bit else linear, r, alpha, seed, scale)
    x = torch.randn(4, k)
    apart = layer(x)
    layer.merge()
    m = k + r + 3
    c = m / (1 - m * U)
    assert ((layer(x).double() - apart.double()).abs() <= c * 2 * U * magnitude(layer, x)).all()


@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-3, 0.03]),
    four_bit=st.booleans(),
)
def test_16_bit_merges_are_the_float32_result_rounded_once(
    dtype: torch.dtype, seed: int, scale: float, four_bit: bool, same_bits: Same
) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(64, 9).to(dtype)
    narrow = layer_of(NF4Linear.from_linear(linear) if four_bit else linear, 4, 16, seed, scale)
    wide_base = nn.Linear(64, 9)
    wide_base.weight.data.copy_(dense_weight(narrow.base))
    wide = layer_of(wide_base, 4, 16, seed, scale)
    narrow.merge(dtype=dtype)
    wide.merge()
    exact = wide.merged.module.weight
    assert same_bits(narrow.merged.module.weight, exact.to(dtype))
    # and the float32 result is itself right
    delta = wide.scaling * wide.B.double() @ wide.A.double()
    size = wide_base.weight.double().abs() + wide.scaling * wide.B.double().abs() @ (
        wide.A.double().abs()
    )
    assert (exact.double() - (wide_base.weight.double() + delta)).abs().le(7 * U * size).all()


@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    four_bit=st.booleans(),
    seed=st.integers(0, 99),
)
def test_unmerging_restores_every_bit(
    dtype: torch.dtype, four_bit: bool, seed: int, same_bits: Same
) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(64, 9).to(dtype)
    layer = layer_of(NF4Linear.from_linear(linear) if four_bit else linear, 4, 16, seed, 0.3)
    before = {key: (id(t), t.clone()) for key, t in layer.state_dict(keep_vars=True).items()}
    x = torch.randn(3, 64, dtype=dtype)
    y = layer(x)
    for _ in range(3):
        layer.merge()
        after = layer.state_dict(keep_vars=True)
        assert list(after) == list(before)  # merging does not show in the state
        assert not same_bits(layer(x), layer.base(x))
        layer.unmerge()
    for key, tensor in layer.state_dict(keep_vars=True).items():
        assert id(tensor) == before[key][0]
        assert torch.equal(tensor, before[key][1])
    assert same_bits(layer(x), y)


def test_train_and_eval_never_merge(mlp: nn.Module, shake: Shake) -> None:
    add_adapter(mlp, LoRAConfig(r=2))
    shake(mlp)
    for _ in range(2):
        mlp.eval()
        mlp.train()
    assert all(host.merged is None for _, host in adapted_modules(mlp))
    merge_adapters(mlp)
    mlp.train().eval()
    assert all(host.merged is not None for _, host in adapted_modules(mlp))


def test_several_adapters_add_up_merged_and_not(
    make_mlp: Callable[[], nn.Module], shake: Shake
) -> None:
    base = make_mlp()
    model = copy.deepcopy(base)
    add_adapter(model, LoRAConfig(r=2), "a")
    add_adapter(model, LoRAConfig(r=3, targets=["inp", "mid.0"]), "b")
    shake(model)
    set_adapters(model, ["b", "a"])
    x = torch.randn(4, 12)
    y = model(x)
    # the same by hand: one dense weight with both updates, in float64
    dense = copy.deepcopy(base).double()
    for name, host in adapted_modules(model):
        linear = dense.get_submodule(name)
        for adapter in host.adapters.values():
            linear.weight.data += adapter.scaling * adapter.B.double() @ adapter.A.double()
    error = (y.double() - dense(x.double())).abs().max()
    own = (dense.float()(x).double() - dense.double()(x.double())).abs().max()
    assert error <= 8 * own + 8 * U * y.abs().max()
    for names in (["a"], ["b"], None):
        merge_adapters(model, names)
        assert (model(x) - y).abs().max() <= 16 * own + 16 * U * y.abs().max()
        unmerge_adapters(model)
        assert torch.equal(model(x), y)


def test_a_merged_model_is_disabled_to_the_base(
    make_mlp: Callable[[], nn.Module], shake: Shake, same_bits: Same
) -> None:
    model = make_mlp()
    x = torch.randn(4, 12)
    plain = model(x)
    add_adapter(model, LoRAConfig(r=2))
    shake(model)
    merge_adapters(model)
    with disable_adapters(model):
        assert same_bits(model(x), plain)
    assert not torch.equal(model(x), plain)


def test_the_merged_weight_follows_moves(mlp: nn.Module, shake: Shake) -> None:
    add_adapter(mlp, LoRAConfig(r=2))
    shake(mlp)
    merge_adapters(mlp)
    mlp.double()
    assert mlp(torch.randn(2, 12).double()).dtype == torch.float64
    assert mlp.inp.merged.module.weight.dtype == torch.float64
    assert mlp.inp.A.dtype == torch.float32


def test_merging_refuses_what_would_change_the_output(mlp: nn.Module) -> None:
    with pytest.raises(ValueError, match="no adapter is active: there is nothing to merge"):
        merge_adapters(mlp)
    with pytest.raises(ValueError, match="nothing is merged"):
        unmerge_adapters(mlp)
    add_adapter(mlp, LoRAConfig(r=2), "first")
    add_adapter(mlp, LoRAConfig(r=2), "second")
    with pytest.raises(ValueError, match="no adapter 'frist' in the model; nearest names: 'first'"):
        merge_adapters(mlp, ["frist"])
    with pytest.raises(ValueError, match="'first' is not active at 'inp'"):
        merge_adapters(mlp, ["first"])
    merge_adapters(mlp)
    with pytest.raises(ValueError, match="'inp' is merged already: call unmerge_adapters first"):
        merge_adapters(mlp)
    with pytest.raises(ValueError, match="'inp' is merged: call unmerge_adapters first"):
        set_adapters(mlp, "first")
    with pytest.raises(ValueError, match="'inp' is merged: call unmerge_adapters first"):
        delete_adapter(mlp, "first")
    with pytest.raises(ValueError, match="'inp' is merged: call unmerge_adapters first"):
        add_adapter(mlp, LoRAConfig(), "third")
    with pytest.raises(RuntimeError, match="'inp' is merged: call unmerge_adapters first"):
        mlp.load_state_dict(mlp.state_dict())


class Doubler(Adapter):
    """Not additive: y -> 2 y, W -> 2 W."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y * self.scale

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.scale, None if bias is None else bias * self.scale


def test_the_order_of_adapters_that_do_not_commute_is_kept() -> None:
    layer = layer_of(nn.Linear(6, 4), 2, 4, 0, 1.0)
    layer.attach("twice", Doubler())
    x = torch.randn(3, 6)
    for order in (["default", "twice"], ["twice", "default"]):
        layer.active = order
        y = layer(x)
        layer.merge()
        assert (layer(x) - y).abs().max() <= 40 * U * 2 * magnitude(layer, x).max()
        layer.unmerge()
        with pytest.raises(ValueError, match=r"apply in this order at '': merge from the first"):
            merge_adapters(layer, [order[1]])
        merge_adapters(layer, [order[0]])
        assert (layer(x) - y).abs().max() <= 40 * U * 2 * magnitude(layer, x).max()
        layer.unmerge()


class Unmergeable(Doubler):
    unmergeable = "it is a test"


class Misshapen(Doubler):
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight[1:], bias


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Unmergeable, "the adapter 'default' at 'head' cannot be merged: it is a test"),
        (Misshapen, r"merging at 'head' made a weight of shape \(4, 24\) out of one of shape"),
        ("overflow", "merged weight of 'head' is not finite in torch.float16"),
        ("nan", "merged weight of 'head' is not finite in torch.float32"),
    ],
)
@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("unload", [False, True])
def test_an_error_in_the_last_layer_leaves_the_model_as_it_was(
    fault: object,
    message: str,
    keep_base: bool,
    unload: bool,
    mlp: nn.Module,
    shake: Shake,
    state_of: Callable[[nn.Module], object],
) -> None:
    if fault == "overflow":
        mlp.half()
    add_adapter(mlp, LoRAConfig(r=2, targets=r".*"))
    shake(mlp)
    if isinstance(fault, type):
        del mlp.head.adapters["default"]
        mlp.head.attach("default", fault())
    else:
        mlp.head.A.data.fill_(1e4 if fault == "overflow" else float("nan"))
    before = str(state_of(mlp))
    options = {"merge": True} if unload else {"keep_base": keep_base}
    with pytest.raises(ValueError, match=message):
        (unload_adapters if unload else merge_adapters)(mlp, **options)
    assert str(state_of(mlp)) == before


def test_without_the_base_there_is_no_way_back(
    make_mlp: Callable[[], nn.Module], shake: Shake
) -> None:
    model = make_mlp()
    add_adapter(model, LoRAConfig(r=2), "a")
    shake(model)
    x = torch.randn(3, 12)
    kept = copy.deepcopy(model)
    merge_adapters(kept)
    merge_adapters(model, keep_base=False)
    assert torch.equal(model(x), kept(x))
    with pytest.raises(ValueError, match="'inp' was merged with keep_base=False"):
        unmerge_adapters(model)
    with (
        pytest.raises(ValueError, match=r"keep_base=False cannot be disabled.*load the base model"),
        disable_adapters(model),
    ):
        pass
    way_back = "'inp' is merged.*: the base was not kept, so call unload_adapters first"
    for change in (merge_adapters, lambda m: set_adapters(m, []), lambda m: delete_adapter(m, "a")):
        with pytest.raises(ValueError, match=way_back):
            change(model)
    with pytest.raises(RuntimeError, match=way_back):
        model.load_state_dict(model.state_dict())
    unload_adapters(model)
    assert type(model.inp) is nn.Linear
    assert torch.equal(model(x), kept(x))


def test_a_layer_by_itself_is_called_so_and_the_dtype_is_checked() -> None:
    layer = LoRALinear(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"needs a floating-point dtype, got torch\.int8"):
        layer.merge(dtype=torch.int8)
    assert layer.merged is None
    layer.merge()
    with pytest.raises(ValueError, match="this layer is merged already: call unmerge_adapters"):
        layer.merge()
    with pytest.raises(RuntimeError, match="this layer is merged: call unmerge_adapters first"):
        layer.load_state_dict(layer.state_dict())


def test_unload_gives_plain_modules(
    make_mlp: Callable[[], nn.Module], shake: Shake, same_bits: Same
) -> None:
    base = make_mlp()
    names = [(name, type(module)) for name, module in base.named_modules()]
    x = torch.randn(3, 12)
    for merge in (False, True):
        for merged_before in (False, True):
            model = copy.deepcopy(base)
            add_adapter(model, LoRAConfig(r=2))
            shake(model)
            y = model(x)
            if merged_before:
                merge_adapters(model)
                y = model(x)
            unload_adapters(model, merge=merge)
            assert [(name, type(module)) for name, module in model.named_modules()] == names
            assert list(model.state_dict()) == list(base.state_dict())
            if merge:
                bound = 200 * U * y.abs().max()  # some tens of terms, each a few roundings
                assert (model(x) - y).abs().max() <= bound
            else:
                assert same_bits(model(x), base(x))
    with pytest.raises(ValueError, match="itself a host and cannot replace itself"):
        unload_adapters(LoRALinear(nn.Linear(2, 2)))


def test_unload_refuses_a_layer_merged_in_part(mlp: nn.Module) -> None:
    add_adapter(mlp, LoRAConfig(r=2), "a")
    add_adapter(mlp, LoRAConfig(r=2), "b")
    set_adapters(mlp, ["a", "b"])
    merge_adapters(mlp, "a")
    with pytest.raises(ValueError, match="'inp' is merged in part: call unmerge_adapters first"):
        unload_adapters(mlp, merge=True)


def test_hooks_and_settings_of_the_base_survive_merging(mlp: nn.Module, shake: Shake) -> None:
    called = []
    mlp.inp.register_forward_hook(lambda *_: called.append(1))
    add_adapter(mlp, LoRAConfig(r=2))
    shake(mlp)
    merge_adapters(mlp)
    mlp(torch.randn(2, 12))
    assert called == [1]
    assert not any(p.requires_grad for p in mlp.inp.merged.module.parameters())


@pytest.mark.parametrize("double_quant", [False, True])
def test_requantizing_is_opt_in_and_reported(double_quant: bool, shake: Shake) -> None:
    linear = nn.Linear(64, 32)
    base = NF4Linear.from_linear(linear, code="fp4", block_size=32, double_quant=double_quant)
    x = torch.randn(3, 64)
    for scale, low, high in ((1e-4, -1.0, 0.7), (0.5, 0.9, 1.1)):
        model = nn.Sequential(copy.deepcopy(base), nn.Linear(32, 2))
        add_adapter(model, LoRAConfig(r=2, targets=["0", "1"]))
        shake(model, scale)
        with pytest.raises(ValueError, match="requantize=True, but none of the layers"):
            merge_adapters(copy.deepcopy(model)[1], requantize=True)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        report = merge_adapters(model, requantize=True)
        made = model[0].merged.module
        assert isinstance(made, NF4Linear)
        assert (made.code, made.block_size, made.double_quant) == ("fp4", 32, double_quant)
        first, second = report.layers
        assert (first.name, first.requantized, second.requantized) == ("0", True, False)
        # the report, by its definition
        delta = model[0].delta_weight().detach()
        stored = made.dense_weight() - model[0].base.dense_weight()
        kept = float((stored * delta).sum() / delta.square().sum())
        error = float((stored - delta).norm() / delta.norm())
        assert abs(first.kept - kept) <= 1e-2 * max(1, error)  # delta is W' - W: rounded at W'
        assert abs(first.error - error) <= 1e-2 * max(1, error)
        assert low < first.kept < high
        assert second.error < 1e-2
        assert "1 of them requantized" in str(report)
        assert re.search(rf"^0 +plain +{first.kept:.1%} +{first.error:.1%}$", str(report), re.M)
        y = model(x)
        unmerge_adapters(model)
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key])
        merge_adapters(model)  # dense unless asked
        assert isinstance(model[0].merged.module, DenseLinear)
        assert not torch.equal(model(x), y)


def test_a_4bit_base_merges_dense_in_the_dtype_of_its_surroundings(mlp: nn.Module) -> None:
    mlp.bfloat16()
    quantize_model(mlp)
    add_adapter(mlp, LoRAConfig(r=2))
    merge_adapters(mlp)
    assert mlp.mid[0].base.bias is None
    assert mlp.mid[0].merged.module.weight.dtype == torch.bfloat16
    unmerge_adapters(mlp)
    merge_adapters(mlp, dtype=torch.float32)
    assert mlp.mid[0].merged.module.weight.dtype == torch.float32
    # as NF4Linear, it computes in x's dtype
    assert mlp(torch.randn(2, 12).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mlp.inp(torch.randn(2, 12)).dtype == torch.bfloat16
    alone = LoRALinear(NF4Linear.from_linear(nn.Linear(64, 2, bias=False)))
    alone.merge()
    assert alone.merged.module.weight.dtype == torch.float32


def test_a_merge_under_autocast_is_the_same(mlp: nn.Module, shake: Shake, same_bits: Same) -> None:
    add_adapter(mlp, LoRAConfig(r=2))
    shake(mlp)
    merge_adapters(mlp)
    weight = mlp.inp.merged.module.weight
    unmerge_adapters(mlp)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merge_adapters(mlp)
    assert same_bits(mlp.inp.merged.module.weight, weight)


def test_modules_without_a_dense_weight_say_so() -> None:
    with pytest.raises(TypeError, match="ReLU has no dense weight"):
        dense_weight(nn.ReLU())
    assert isinstance(LoRALinear(nn.Linear(2, 2)).adapter("default"), LoRA)
