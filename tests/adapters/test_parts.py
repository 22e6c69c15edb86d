"""Fused projections whose parts have a pair each: W' = W + s [B1 A1; B2 A2; …]."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.adapters import (
    Adapted,
    LoRA,
    LoRAConfig,
    LoRALinear,
    add_adapter,
    dense_weight,
)
from lora_core.quant import NF4Linear

Hold = Callable[..., None]
State = Callable[[nn.Module], dict[str, object]]
QKV = [16, 8, 8]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 32)
        self.out = nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.qkv(x)[..., :16])


def filled(host: Adapted) -> Adapted:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in host.adapters.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return host


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    k=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    four_bit=st.booleans(),
    rslora=st.booleans(),
)
def test_the_dense_formula(
    sizes: list[int],
    k: int,
    dtype: torch.dtype,
    four_bit: bool,
    rslora: bool,
    hold_to_dense: Hold,
) -> None:
    n = sum(sizes)
    base: nn.Module = nn.Linear(k, n)
    base = (NF4Linear.from_linear(base) if four_bit else base).to(dtype)
    host = LoRALinear.around(base.requires_grad_(False))
    host.attach("default", LoRA(k, n, 2, 3, parts=sizes, use_rslora=rslora))
    host.active = ["default"]
    x = torch.randn(3, k).to(dtype)
    assert torch.equal(host(x), base(x))
    pair = host.adapter("default")
    assert pair.A.shape == (2 * len(sizes), k)
    assert pair.B.shape == (n, 2)
    hold_to_dense(filled(host), x)


def test_each_part_is_a_pair_of_its_own() -> None:
    model = Attention()
    report = add_adapter(model, LoRAConfig(r=4, targets=["qkv"], parts={"qkv": QKV}))
    assert report.parameters == 3 * 4 * 64 + 32 * 4
    pair = filled(model.qkv).adapter("default")
    delta = pair.delta_weight()
    for i, (rows, down, up) in enumerate(
        zip(delta.split(QKV), pair.A.chunk(3), pair.B.split(QKV), strict=True)
    ):
        assert torch.linalg.matrix_rank(rows) == 4, i
        assert ((rows - pair.scaling * up @ down).abs() <= 1e-5).all()
    assert torch.linalg.matrix_rank(delta) == 12
    # a part's numbers reach its own rows alone
    x = torch.randn(2, 64)
    grads = torch.autograd.grad(model.qkv(x)[:, :16].sum(), [pair.A, pair.B])
    assert grads[0][:4].all()
    assert not grads[0][4:].any()
    assert not grads[1][16:].any()


def test_starts_decompose_every_part() -> None:
    for init in ("pissa", "olora"):
        model = Attention()
        W = model.qkv.weight.clone()
        config = LoRAConfig(r=8, alpha=4, targets=["qkv"], parts={"qkv": QKV}, init=init)
        add_adapter(model, config)
        assert torch.equal(model.qkv.base.weight, W)
        pair = model.qkv.adapter("default")
        for rows, down, up in zip(W.split(QKV), pair.A.chunk(3), pair.B.split(QKV), strict=True):
            if len(rows) == 8:  # rank 8 holds all of it
                s = pair.scaling if init == "pissa" else 1.0
                assert (rows - s * up @ down).norm() <= 1e-5 * rows.norm()
        assert pair.factors()[0].shape == (48, 64)
        assert not (pair.delta_weight().abs() > 1e-5).any()


def test_saving_and_what_is_refused() -> None:
    host, other = (LoRALinear.around(nn.Linear(6, 5)) for _ in range(2))
    other.base.load_state_dict(host.base.state_dict())
    for one in (host, other):
        one.attach("default", LoRA(6, 5, 2, parts=[3, 2]))
        one.active = ["default"]
    pair = filled(host).adapter("default")
    tensors = {k: t.detach().clone() for k, t in pair.tensors().items()}
    assert tensors["lora_A.weight"].shape == (4, 6)
    assert tensors["lora_B.weight"].shape == (5, 4)
    wrong = {**tensors, "lora_B.weight": torch.ones(5, 4)}
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="numbers outside the blocks of its parts"):
        other.adapter("default").load(wrong)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    other.adapter("default").load(tensors)
    x = torch.randn(3, 6)
    assert torch.equal(other(x), host(x))
    plain = LoRA(6, 5, 4, alpha=pair.scaling * 4)  # on disk it is a plain pair of p times the rank
    plain.load(tensors)
    assert torch.equal(plain.delta_weight(), pair.delta_weight())
    with pytest.raises(AttributeError, match="no attribute 'A'"):
        _ = host.A


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": {"qkv": [16, 8]}}, r"add up to the 32 outputs of a linear layer, got \[16, 8\]"),
        ({"parts": {"qkv": [33, -1]}}, r"parts must be positive sizes"),
        ({"parts": {"kqv": QKV}}, "parts: 'kqv' matches no target; nearest names: 'qkv'"),
        ({"parts": {"qkv": QKV}, "r": 9}, r"r = 9 is above the size of 'qkv', 32 × 64, in parts"),
        ({"parts": {"qkv": QKV}, "use_dora": True}, "use_dora and parts cannot be used together"),
    ],
)
def test_bad_parts(options: dict[str, object], message: str, state_of: State) -> None:
    model = Attention()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        add_adapter(model, LoRAConfig(**{"r": 2, "targets": ["qkv"], **options}))
    assert state_of(model) == before
    with pytest.raises(TypeError, match="parts must be a dict"):
        LoRAConfig(parts=[1, 2])


def test_convolutions_have_no_parts(state_of: State) -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 1))
    before = state_of(model)
    with pytest.raises(ValueError, match="outputs of a linear layer"):
        add_adapter(model, LoRAConfig(r=2, targets=["0"], parts={"0": [3, 3]}))
    assert state_of(model) == before


def test_the_base_takes_a_fused_update_into_its_product() -> None:
    host = LoRALinear.around(NF4Linear.from_linear(nn.Linear(64, 24)))
    host.attach("default", LoRA(64, 24, 4, parts=[8, 16]))
    host.active = ["default"]
    pair = filled(host).adapter("default")
    x = torch.randn(3, 64)
    assert host._taken_by_base() is pair
    apart = pair(x, host.base(x), host.base)
    size = x.abs() @ (dense_weight(host.base).abs() + pair.delta_weight().abs() + 1).T
    assert ((host(x) - apart).abs() <= 200 * torch.finfo(torch.float32).eps * size).all()
