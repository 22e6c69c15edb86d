"""DoRA: held to its dense formula on every form, and no dense weight made on the way."""

import copy
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

from lora_core.adapters import Adapted, LoRAConfig, add_adapter, dense_weight, set_adapters
from lora_core.adapters.dora import DoRA
from lora_core.adapters.forms import form_of
from lora_core.quant import NF4Linear
from lora_core.testing.bounds import exceeds, gamma

Hold = Callable[..., None]
Same = Callable[[Tensor, Tensor], bool]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MAKE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(64, 12),
    "no bias": lambda: nn.Linear(64, 12, bias=False),
    "4-bit": lambda: NF4Linear.from_linear(nn.Linear(64, 12)),
    "embedding": lambda: nn.Embedding(9, 6),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"),
    "conv3d": lambda: nn.Conv3d(2, 4, 2, stride=2),
}
INPUTS = {
    "embedding": (2, 7),
    "conv1d": (2, 4, 5),
    "grouped": (1, 4, 5, 6),
    "conv3d": (1, 2, 4, 4, 4),
}


def input_of(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = INPUTS.get(kind, (3, 64))
    return torch.randint(9, shape) if kind == "embedding" else torch.randn(shape).to(dtype)


def adapted(base: nn.Module, fill: float = 0.3, **options: Any) -> Adapted:
    form = form_of(base)
    assert form is not None
    pair = DoRA(form.in_features, form.out_features, form=form, **{"r": 2, "alpha": 3, **options})
    pair.begin(base)
    host = Adapted(base.requires_grad_(False))
    host.attach("default", pair)
    host.active = ["default"]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in pair.parameters():
            fan = p.shape[-1] if p.dim() > 1 else 1
            p.add_(torch.randn(p.shape, generator=generator), alpha=fill / fan**0.5)
    return host


@given(
    kind=st.sampled_from(list(MAKE)),
    dtype=st.sampled_from(DTYPES),
    fill=st.sampled_from([0.05, 1.0]),
    rslora=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_dense_formula(
    kind: str, dtype: torch.dtype, fill: float, rslora: bool, seed: int, hold_to_dense: Hold
) -> None:
    torch.manual_seed(seed)
    host = adapted(MAKE[kind]().to(dtype), fill, use_rslora=rslora)
    hold_to_dense(host, input_of(kind, dtype))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_adapter_leaves_every_bit(kind: str, dtype: torch.dtype, same_bits: Same) -> None:
    host = adapted(MAKE[kind]().to(dtype), fill=0.0)
    x = input_of(kind, dtype)
    pair = host.adapter("default")
    assert torch.equal(pair.gain(host.base), torch.ones_like(pair.magnitude))
    assert same_bits(host(x), host.base(x))
    # also after the base was rounded: m and c were measured once
    if kind != "embedding" and dtype == torch.float32:
        host.to(torch.bfloat16)
        assert same_bits(host(x.bfloat16()), host.base(x.bfloat16()))


@given(
    kind=st.sampled_from(list(MAKE)), r=st.integers(1, 4), scale=st.sampled_from([1e-3, 1.0, 1e3])
)
def test_the_identity_gives_the_norm(kind: str, r: int, scale: float) -> None:
    r *= 2  # the groups
    base = MAKE[kind]()
    host = adapted(base, fill=scale, r=r)
    pair = host.adapter("default")
    W = pair.form.matrix(dense_weight(base)).double()
    update = pair.form.matrix(pair.delta_weight(torch.float64))
    down, up = (f.detach().abs().double() for f in pair.factors())
    size = W.abs() + pair.form.delta(down, up * pair.scaling)
    norms = (W + update).norm(dim=1)
    # relative error of a square root: half of its argument's
    bound = gamma(2 * W.shape[1] + 4 * r + 16) * size.square().sum(1) / norms / 2
    fault = exceeds(pair.norms(base), norms, 1.01 * bound)
    assert fault is None, fault


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
def test_rows_whose_squares_leave_float32(scale: float, same_bits: Same) -> None:
    base = nn.Linear(8, 4, bias=False)
    base.weight.data.mul_(scale)
    host = adapted(base, fill=0.0)
    pair = host.adapter("default")
    x = torch.randn(3, 8)
    assert same_bits(host(x), base(x))
    lengths = base.weight.double().norm(dim=1)
    assert ((pair.magnitude.double() - lengths).abs() <= 1e-6 * lengths).all()
    pair.B.data.fill_(scale)
    V = base.weight.double() + pair.scaling * pair.B.double() @ pair.A.double()
    norms = V.norm(dim=1)
    assert ((pair.norms(base).double() - norms).abs() <= 1e-4 * norms).all()
    pair.B.data.fill_(1.0)  # however far the update is from the weight
    assert torch.isfinite(pair.norms(base)).all()
    assert (pair.norms(base) > 0).all()


def test_a_row_of_zeros_stays_zero() -> None:
    base = nn.Linear(8, 3)
    base.weight.data[1] = 0.0
    host = adapted(base, fill=0.0)
    pair = host.adapter("default")
    assert pair.magnitude[1] == 0
    x = torch.randn(2, 8)
    assert torch.equal(host(x), base(x))
    host.merge()
    assert torch.equal(host(x), base(x))
    host.unmerge()
    pair.B.data.fill_(0.5)
    y = host(x)
    assert torch.equal(y[:, 1], base.bias[1].expand(2))
    assert torch.isfinite(y).all()
    host.merge()
    assert torch.equal(host(x)[:, 1], y[:, 1])


def test_a_layer_of_zeros_is_refused(
    state_of: Callable[[nn.Module], dict[str, object]],
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data.zero_()
    before = state_of(model)
    with pytest.raises(ValueError, match="use_dora: the weight of '1' is all zeros"):
        add_adapter(model, LoRAConfig(r=2, use_dora=True))
    assert state_of(model) == before


class Sizes(TorchDispatchMode):
    """Element counts of the new tensors that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.by = 0, ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        for t in torch.utils._pytree.tree_leaves(out):
            new = isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given
            if new and t.numel() > self.largest:
                self.largest, self.by = t.numel(), str(func)
        return out


N, K, ROWS, RANK = 96, 128, 5, 4


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_training_makes_no_dense_weight(kind: str) -> None:
    base, x = {
        "linear": (nn.Linear(K, N), torch.randn(ROWS, K, requires_grad=True)),
        "conv": (nn.Conv1d(32, N, 4), torch.randn(1, 32, 6, requires_grad=True)),
        "embedding": (nn.Embedding(K, N), torch.arange(ROWS)),
    }[kind]
    host = adapted(base, r=RANK)
    saved: list[int] = []
    weight = base.weight.data_ptr()

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() != weight:
            saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), Sizes() as seen:
        host(x).square().sum().backward()
    widest = max(N, K) * max(ROWS, RANK, 6)
    assert seen.largest <= widest, seen.by  # of W's 12288
    assert max(saved) <= widest


def test_training_on_4_bits_expands_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    host = adapted(NF4Linear.from_linear(nn.Linear(K, N)), r=RANK)
    x = torch.randn(ROWS, K, requires_grad=True)
    y = host(x)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dense weight was made")

    monkeypatch.setattr(NF4Linear, "dense_weight", refuse)
    monkeypatch.setattr(NF4Linear, "quantized", property(refuse))
    with pytest.raises(AssertionError, match="a dense weight was made"):
        host.adapter("default").measure(host.base)  # the watch works
    again = host(x)
    assert torch.equal(again, y)
    again.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in host.adapters.parameters())


def test_16_bit_weights_are_widened_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    host = adapted(nn.Conv2d(8, 12, 3, groups=2).bfloat16())
    x = torch.randn(2, 8, 5, 5).bfloat16()
    norms = host.adapter("default").norms(host.base)
    monkeypatch.setattr("lora_core.adapters.dora._SLICE", 36)
    with Sizes() as seen:
        sliced = host.adapter("default").norms(host.base)
    assert seen.largest < host.base.weight.numel()
    assert ((norms - sliced).abs() <= 1e-5 * norms).all()
    assert host(x).dtype == torch.bfloat16


def test_other_weights_are_measured_when_they_are_loaded() -> None:
    torch.manual_seed(0)
    for make in (lambda: nn.Linear(64, 8), lambda: NF4Linear.from_linear(nn.Linear(64, 8))):
        host, other = adapted(make()), adapted(make())
        x = torch.randn(3, 64)
        assert not torch.equal(host(x), other(x))
        host.load_state_dict(other.state_dict())
        assert torch.equal(host(x), other(x))
        model = nn.Sequential(host)
        more = adapted(make())
        model.load_state_dict(nn.Sequential(more).state_dict())
        assert torch.equal(model(x), more(x))
        alone = {f"0.base.{k}": v for k, v in other.base.state_dict().items()}
        model.load_state_dict(alone, strict=False)  # the base's weights alone
        lengths = dense_weight(other.base).norm(dim=1)
        assert ((host.adapter("default").lengths - lengths).abs() <= 1e-6 * lengths).all()


def test_what_was_measured_travels_with_the_state(same_bits: Same) -> None:
    """|W| is that of the float32 weights; rounded ones would measure a little else."""
    torch.manual_seed(0)
    hosts = [adapted(nn.Linear(64, 8)).to(torch.bfloat16) for _ in range(2)]
    x = torch.randn(3, 64).bfloat16()
    hosts[1].load_state_dict(hosts[0].state_dict())
    assert same_bits(hosts[1](x), hosts[0](x))
    fresh = adapted(nn.Linear(64, 8)).to(torch.bfloat16)
    assert same_bits(torch.func.functional_call(fresh, hosts[0].state_dict(), (x,)), hosts[0](x))
    before = hosts[0].adapter("default").lengths.clone()
    hosts[0].adapter("default").measure(hosts[0].base)
    assert not torch.equal(hosts[0].adapter("default").lengths, before)


def test_copies_pickles_checkpoints_and_compilation(same_bits: Same) -> None:
    host = adapted(nn.Linear(6, 4))
    x = torch.randn(3, 6, requires_grad=True)
    for twin in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        assert same_bits(twin(x), host(x))
        twin.load_state_dict(host.state_dict())  # the hook came along
    plain = torch.autograd.grad(host(x).sin().sum(), (x, *host.adapters.parameters()))
    again = checkpoint(lambda x: host(x).sin(), x, use_reentrant=False).sum()
    other = torch.autograd.grad(again, (x, *host.adapters.parameters()))
    assert all(same_bits(a, b) for a, b in zip(plain, other, strict=True))
    compiled = torch.compile(host, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), host(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = host(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(host.adapter("default").norms(host.base).float(), norms_of(host))


def norms_of(host: Adapted) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return host.adapter("default").norms(host.base)


def test_hooks_of_a_4_bit_base_see_its_own_calls_alone() -> None:
    host = adapted(NF4Linear.from_linear(nn.Linear(64, 8)))
    seen: list[int] = []
    host.base.register_forward_hook(lambda *_: seen.append(1))
    host(torch.randn(3, 64))
    assert seen == [1]


def test_dropout_leaves_the_base_s_share() -> None:
    host = adapted(nn.Linear(6, 4), dropout=0.5)
    pair = host.adapter("default")
    pair.B.data.zero_()
    x = torch.randn(3, 6)
    assert torch.equal(host.train()(x), host.eval()(x))
    pair.B.data.fill_(1.0)
    assert not torch.equal(host.train()(x), host.eval()(x))


def test_it_stands_alone(state_of: Callable[[nn.Module], dict[str, object]]) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    add_adapter(model, LoRAConfig(r=2, use_dora=True), "a")
    add_adapter(model, LoRAConfig(r=2), "b")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"'a' \(DoRA\) is defined on the base alone"):
        set_adapters(model, ["a", "b"])
    assert state_of(model) == before
    set_adapters(model, "a")


def test_biases_are_no_part_of_the_direction(hold_to_dense: Hold) -> None:
    for kind in ("linear", "4-bit", "grouped"):
        base = MAKE[kind]()
        host = adapted(base, bias=base.bias, up_bias=True)
        hold_to_dense(host, input_of(kind))


def test_what_is_saved_is_loaded() -> None:
    for kind, shape in {"linear": (12,), "grouped": (1, 6, 1, 1), "embedding": (6,)}.items():
        base = MAKE[kind]()
        host, other = adapted(base), adapted(copy.deepcopy(base), fill=0.0)
        tensors = host.adapter("default").tensors()
        assert tensors["lora_magnitude_vector"].shape == shape
        assert "lengths" not in tensors
        other.adapter("default").load({k: t.detach().clone() for k, t in tensors.items()})
        x = input_of(kind)
        assert torch.equal(other(x), host(x))


def test_weights_on_meta_are_refused(state_of: Callable[..., dict[str, object]]) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    for options in ({"use_dora": True}, {"init": "pissa"}, {"bias": "lora_only"}):
        with pytest.raises(ValueError, match="'0' is on the meta device, and DoRA"):
            add_adapter(model, LoRAConfig(r=2, **options))
    assert type(model[0]) is nn.Linear
    add_adapter(model, LoRAConfig(r=2))
    assert all(p.is_meta for p in model.parameters())
