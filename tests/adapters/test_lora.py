"""The LoRA layer: its mathematics, its dtypes, and what it must not change."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_core.adapters import Adapted, LoRA, LoRALinear, dense_weight
from lora_core.quant import NF4Linear
from lora_core.testing import check_adapter

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
Same = Callable[[Tensor, Tensor], bool]

sizes = st.integers(1, 40)


def filled(layer: LoRALinear, seed: int = 0, scale: float = 1.0) -> LoRALinear:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (layer.A, layer.B):
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return layer


@given(
    k=sizes,
    n=sizes,
    r=st.integers(1, 9),
    dtype=st.sampled_from(FLOATS),
    bias=st.booleans(),
    seed=st.integers(0, 99),
    four_bit=st.booleans(),
    alpha=st.sampled_from([-7.0, 0.0, 1.0, 32.0]),
)
def test_a_new_adapter_leaves_every_bit(
    k: int,
    n: int,
    r: int,
    dtype: torch.dtype,
    bias: bool,
    seed: int,
    four_bit: bool,
    alpha: float,
    same_bits: Same,
) -> None:
    torch.manual_seed(seed)
    base: nn.Module = nn.Linear(k, n, bias=bias)
    base = (NF4Linear.from_linear(base) if four_bit else base).to(dtype)
    x = torch.randn(5, k, dtype=dtype)
    x[0], x[1] = 0.0, -0.0  # rows whose outputs are zeros of either sign
    layer = LoRALinear(base, r=r, alpha=alpha)
    assert same_bits(layer(x), base(x))
    assert layer(x[:0]).shape == (0, n)


def test_the_sign_of_zero_is_at_stake(same_bits: Same) -> None:
    class Zeros(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_tensor([0.0, -0.0]).expand(len(x), 2)

    base = Zeros(3, 2)
    x = torch.randn(4, 3)
    y = base(x)
    assert not same_bits(y + torch.zeros_like(y), y)  # what adding a zero update would do
    for alpha in (1.0, -1.0):
        assert same_bits(LoRALinear(base, r=2, alpha=alpha)(x), y)


@given(k=sizes, n=sizes, r=st.integers(1, 9), seed=st.integers(0, 99), scale=st.floats(0.01, 3))
def test_the_formula_in_float64(k: int, n: int, r: int, seed: int, scale: float) -> None:
    base = nn.Linear(k, n)
    layer = filled(LoRALinear(base, r=r, alpha=8), seed, scale)
    x = torch.randn(3, 4, k)
    s, A, B = 8 / r, layer.A.detach().double(), layer.B.detach().double()
    W, b = base.weight.detach().double(), base.bias.detach().double()
    truth = x.double() @ W.T + b + s * (x.double() @ A.T) @ B.T
    size = x.double().abs() @ W.abs().T + b.abs() + s * (x.double().abs() @ A.abs().T) @ B.abs().T
    u = torch.finfo(torch.float32).eps / 2
    bound = (k + r + 3) * u / (1 - (k + r + 3) * u) * size
    assert ((layer(x).double() - truth).abs() <= bound).all()
    delta = layer.delta_weight()
    assert delta.shape == (n, k)
    assert delta.dtype == torch.float32
    bound = (r + 1) * u / (1 - (r + 1) * u) * s * (B.abs() @ A.abs())
    assert ((delta.double() - s * B @ A).abs() <= bound).all()


def test_gradients_reach_the_adapter_and_the_input_only() -> None:
    layer = filled(LoRALinear(nn.Linear(6, 4), r=3))
    x = torch.randn(5, 6, requires_grad=True)
    layer(x).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == [
        "adapters.default.A",
        "adapters.default.B",
    ]
    assert x.grad is not None
    double = copy.deepcopy(layer)
    double.base.double()
    for p in double.adapters.parameters():
        p.data = p.data.double()
    wide = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(double, (wide,))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("four_bit", [False, True])
def test_it_computes_in_the_dtype_of_x_and_keeps_float32_weights(
    dtype: torch.dtype, four_bit: bool
) -> None:
    linear = nn.Linear(64, 8)
    base = NF4Linear.from_linear(linear) if four_bit else linear
    layer = filled(LoRALinear(base))
    before = layer.A.detach().clone()
    for changed in (layer.to(dtype), layer.half().to(dtype)):
        assert changed.A.dtype == changed.B.dtype == torch.float32
        assert torch.equal(changed.A, before)
        assert changed(torch.randn(2, 64, dtype=dtype)).dtype == dtype


def test_autocast_rules_the_dtype() -> None:
    layer = filled(LoRALinear(nn.Linear(8, 8)))
    x = torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        delta = layer.delta_weight()
    assert torch.equal(delta, layer.delta_weight())


def test_dropout_acts_on_the_adapter_in_training_alone() -> None:
    base = nn.Linear(50, 3)
    layer = filled(LoRALinear(base, dropout=0.5))
    x = torch.ones(200, 50)
    clean = filled(LoRALinear(base))(x)
    assert torch.equal(layer.eval()(x), clean)
    noisy = layer.train()(x)
    assert not torch.equal(noisy, clean)
    dropped = LoRALinear(base, dropout=0.5)  # B = 0: dropout on the base's path would show
    assert torch.equal(dropped(x), base(x))
    update, mean = (clean - base(x))[0], (noisy - base(x)).mean(0)
    spread = (noisy - base(x)).std(0) / math.sqrt(200)
    assert ((mean - update).abs() < 5 * spread).all()


@pytest.mark.parametrize("fullgraph_base", ["linear", "nf4"])
def test_it_compiles_into_one_graph(fullgraph_base: str) -> None:
    linear = nn.Linear(64, 16)
    base = NF4Linear.from_linear(linear) if fullgraph_base == "nf4" else linear
    layer = filled(LoRALinear(base, dropout=0.0))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 64)
    got = compiled(x)
    assert torch.equal(got, layer(x))  # this backend runs the same kernels
    got.sum().backward()
    grads = [layer.A.grad.clone(), layer.B.grad.clone()]
    layer.zero_grad()
    layer(x).sum().backward()
    assert torch.equal(grads[0], layer.A.grad)
    assert torch.equal(grads[1], layer.B.grad)
    layer.enabled = False
    assert torch.equal(compiled(x), layer.base(x))


def test_copies_and_pickles_are_whole(same_bits: Same) -> None:
    layer = filled(LoRALinear(nn.Linear(6, 4)))
    layer.merge()
    x = torch.randn(3, 6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same_bits(twin(x), layer(x))
        twin.unmerge()
        twin.A.data.zero_()
        assert twin.base is not layer.base
    layer.unmerge()
    assert layer.A.detach().any()


def test_starts() -> None:
    wide = LoRA(400, 3, r=100)
    assert wide.A.abs().max() <= 1 / math.sqrt(400)
    assert wide.A.abs().max() > 0.99 / math.sqrt(400)
    assert abs(wide.A.std().item() * math.sqrt(3 * 400) - 1) < 0.03  # uniform, not normal
    assert not wide.B.any()
    normal = LoRA(400, 3, r=100, init="gaussian")
    assert abs(normal.A.std().item() * 100 - 1) < 0.03
    assert normal.A.abs().max() > 3 / 100
    assert LoRA(4, 4, r=16, alpha=32).scaling == 2.0
    assert LoRA(4, 4, r=16, alpha=32, use_rslora=True).scaling == 8.0


def test_the_layer_shows_the_active_pair() -> None:
    layer = LoRALinear(nn.Linear(6, 4), r=2, name="a")
    layer.attach("b", LoRA(6, 4, r=3, alpha=6))
    assert layer.A.shape == (2, 6)
    layer.active = ["b", "a"]
    assert layer.A.shape == (3, 6)
    assert layer.B.shape == (4, 3)
    assert layer.scaling == 2.0
    filled(layer)
    layer.adapter("a").B.data.fill_(0.1)
    both = sum(layer.adapter(name).delta_weight() for name in "ab")
    assert torch.equal(layer.delta_weight(), both)
    layer.active = []
    assert not layer.delta_weight().any()
    assert "r=3, scaling=2" in repr(layer)


def test_the_base_is_seen_through_the_host() -> None:
    base = nn.Linear(6, 4)
    layer = LoRALinear(base)
    assert layer.in_features == 6
    assert layer.weight is base.weight
    assert torch.equal(dense_weight(layer), base.weight)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = layer.nothing
    with pytest.raises(AttributeError):
        _ = LoRALinear.around(nn.Linear(2, 2)).A


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"r": 2.5}, "r must be a whole number of at least 1, got 2.5"),
        ({"r": True}, "r must be a whole number"),
        ({"alpha": math.inf}, "alpha must be a finite number, got inf"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"init": "pissa"}, "init must be one of 'kaiming', 'gaussian', got 'pissa'"),
    ],
)
def test_bad_settings_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRALinear(nn.Linear(4, 4), **options)


def test_only_linear_like_bases() -> None:
    with pytest.raises(TypeError, match=r"needs a linear-like base .* got ReLU"):
        LoRALinear(nn.ReLU())

    class Doubling(nn.Module):  # the contract of four is enough
        in_features = out_features = 3

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

        def dense_weight(self) -> Tensor:
            return 2 * torch.eye(3)

    layer = filled(LoRALinear(Doubling()))
    x = torch.randn(2, 3)
    y = layer(x)
    layer.merge()
    u = torch.finfo(torch.float32).eps / 2
    size = 2 * x.abs() + 2.0 * (x.abs() @ layer.A.abs().T) @ layer.B.abs().T
    assert ((layer(x) - y).abs() <= 2 * (3 + 16 + 3) * u * 1.01 * size).all()


def test_the_property_tests_hold() -> None:
    check_adapter(lambda base: LoRALinear(base, r=4, dropout=0.2), nn.Linear(12, 7), examples=10)
    check_adapter(
        lambda base: LoRALinear(base, r=4), NF4Linear.from_linear(nn.Linear(64, 6)), examples=10
    )
    assert isinstance(LoRALinear(nn.Linear(2, 2)), Adapted)


def test_the_update_is_float32_whatever_the_default_dtype() -> None:
    layer = filled(LoRALinear(nn.Linear(3, 2)))
    torch.set_default_dtype(torch.float64)
    try:
        assert layer.delta_weight().dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


# --- the update inside the base's own product ----------------------------------------------------


class Calls(TorchDispatchMode):
    """Names of the project's operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "lora_kernels":
            self.names.append(func._schema.name.removeprefix("lora_kernels::"))
        return func(*args, **(kwargs or {}))


def calls_of(run: Callable[[], object]) -> list[str]:
    with Calls() as calls:
        run()
    return calls.names


FUSED, APART = ["lora_linear4"], ["matmul4", "lora_update"]


def nf4(r: int = 4, **options: Any) -> LoRALinear:
    return filled(LoRALinear(NF4Linear.from_linear(nn.Linear(64, 24)), r=r, **options))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_operator_equals_base_plus_adapter(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KERNELS", backend)
    layer = nf4()
    x, dy = torch.randn(5, 64).to(dtype), torch.randn(5, 24).to(dtype)
    results: list[list[Tensor]] = []
    for together in (True, False):
        if not together:
            layer.base.register_forward_hook(lambda *_: None)
        leaf = x.clone().requires_grad_()
        assert calls_of(lambda: layer(x)) == (FUSED if together else APART)
        y = layer(leaf)
        results.append([y, *torch.autograd.grad(y, (leaf, layer.A, layer.B), dy)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        if backend == "reference":
            assert torch.equal(ours, theirs)
        else:  # roundings of the terms, whose sum is at most a few times the largest result
            bound = 16 * torch.finfo(dtype).eps * theirs.abs().max()
            assert (ours - theirs).abs().max() <= bound


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_in_the_operator_a_new_adapter_changes_nothing(
    backend: str, same_bits: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KERNELS", backend)
    for dtype in FLOATS:
        base = NF4Linear.from_linear(nn.Linear(64, 24)).to(dtype)
        layer, x = LoRALinear(base, r=3), torch.randn(4, 64).to(dtype)
        for mode in (True, False):
            assert same_bits(layer.train(mode)(x), base(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert same_bits(layer(x), base(x))


def test_when_base_and_adapter_stay_apart() -> None:
    x = torch.randn(3, 64)
    noisy = nf4(dropout=0.5)
    assert calls_of(lambda: noisy.train()(x)) == FUSED
    assert calls_of(lambda: noisy.eval()(x)) == FUSED
    two = nf4()
    two.attach("b", LoRA(64, 24, r=2))
    two.active = ["default", "b"]
    assert calls_of(lambda: two(x)) == [*APART, "lora_update"]
    two.active = ["b"]
    assert calls_of(lambda: two(x)) == FUSED
    two.active = []
    assert calls_of(lambda: two(x)) == ["matmul4"]
    off = nf4()
    off.enabled = False
    assert calls_of(lambda: off(x)) == ["matmul4"]
    off.enabled = True
    off.merge()
    assert calls_of(lambda: off(x)) == []
    off.unmerge()
    assert calls_of(lambda: off(x)) == FUSED
    assert calls_of(lambda: LoRALinear(off)(x)) == [*FUSED, "lora_update"]  # inner, then outer


def test_whoever_watches_the_base_or_the_pair_is_called() -> None:
    x = torch.randn(3, 64)
    seen: list[str] = []
    hooks: list[Callable[[LoRALinear], Any]] = [
        lambda m: m.base.register_forward_hook(lambda *_: seen.append("hook")),
        lambda m: m.base.register_forward_pre_hook(lambda *_: seen.append("hook")),
        lambda m: m.base.register_full_backward_hook(lambda *_: seen.append("hook")),
        lambda m: m.adapters["default"].register_forward_hook(lambda *_: seen.append("hook")),
        lambda m: nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen.append("hook") if module is m.base else None
        ),
    ]
    for register in hooks:
        layer = nf4()
        handle = register(layer)
        assert (
            calls_of(lambda layer=layer: layer(x.clone().requires_grad_()).sum().backward())[0]
            == "matmul4"
        )
        assert seen == ["hook"]
        handle.remove()
        assert calls_of(lambda layer=layer: layer(x)) == FUSED
        assert seen == ["hook"]
        seen.clear()


def test_a_forward_that_was_replaced_is_called() -> None:
    class Doubling(NF4Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(3, 64)
    layer = LoRALinear(Doubling.from_linear(nn.Linear(64, 24)))
    assert torch.equal(layer(x), layer.base(x))
    patched = nf4()
    patched.B.data.zero_()
    patched.base.forward = lambda x: x.new_ones(3, 24)
    assert torch.equal(patched(x), torch.ones(3, 24))

    class Shifted(LoRA):
        def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
            return super().forward(x, y, base) + 1

    kind = nf4()
    kind.attach("shifted", Shifted(64, 24))
    kind.active = ["shifted"]
    assert torch.equal(kind(x), kind.base(x) + 1)


def test_the_scaling_can_be_changed_and_moves_along() -> None:
    layer = nf4(r=4, alpha=8)
    x = torch.randn(3, 64)
    base, y = layer.base(x), layer(x)
    layer.adapter("default").scaling = 4.0
    assert torch.allclose(layer(x) - base, 2 * (y - base), rtol=1e-4, atol=1e-5)
    assert layer.scaling == 4.0
    with torch.device("meta"):
        made = LoRA(8, 8)
    assert made.scale().tolist() == [made.scaling]
    empty = LoRA(8, 8).to("meta")
    assert empty.scale().is_meta
    assert empty.to_empty(device="cpu").scale().tolist() == [2.0]
    with torch.inference_mode():
        evaluated = nf4().half()
        evaluated(x.half())
    assert not evaluated.adapter("default").scale().is_inference()


def test_the_operator_through_checkpointing_and_copies(same_bits: Same) -> None:
    layer = nf4()
    x = torch.randn(3, 64, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sin().sum(), (x, layer.A, layer.B))
    again = checkpoint(lambda x: layer(x).sin(), x, use_reentrant=False).sum()
    for a, b in zip(torch.autograd.grad(again, (x, layer.A, layer.B)), plain, strict=True):
        assert same_bits(a, b)
    twin = copy.deepcopy(layer)
    assert calls_of(lambda: twin(x)) == FUSED
    assert same_bits(twin(x), layer(x))


def test_the_property_tests_hold_in_triton_s_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", "triton")
    base = NF4Linear.from_linear(nn.Linear(64, 6))
    check_adapter(lambda base: LoRALinear(base, r=3), base, dtypes=[torch.bfloat16], examples=2)
