"""What is trained, how it decays, at which rates, and where its state is."""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from lora_core import LoRAConfig, add_adapter
from lora_core.adapters import adapted_modules
from lora_core.adapters.groups import second_factors
from lora_core.train import (
    AdamW8bit,
    PagedAdamW,
    TrainConfig,
    fused_adamw,
    make_adamw,
    make_optimizer,
    trained_parameters,
)
from lora_core.train.fused_adamw import fused_adamw_


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 2))
    config = TrainConfig(weight_decay=0.1, lr=1e-2, beta1=0.5, beta2=0.6, eps=1e-5)
    optimizer = make_adamw(model.named_parameters(), config)
    decayed, kept = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 3), (5, 2)]
    assert [p.shape for p in kept["params"]] == [(4,), (4,), (4,)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.5, 0.6), 1e-5)
    assert len(make_adamw([("b", nn.Parameter(torch.zeros(2)))], config).param_groups) == 1


def test_one_step_is_algorithm_2() -> None:
    w0, grad = torch.tensor([[0.5, -2.0]]), torch.tensor([[0.1, -3.0]])
    parameter = nn.Parameter(w0.clone())
    config = TrainConfig(lr=0.01, weight_decay=0.1)
    optimizer = make_adamw([("w", parameter)], config)
    parameter.grad = grad.clone()
    optimizer.step()
    w, g = w0.double(), grad.double()
    # at step 1 the bias corrections make m = g and v = g²
    expected = w - 0.01 * 0.1 * w - 0.01 * g / (g.abs() + 1e-8)
    torch.testing.assert_close(parameter.double(), expected, rtol=4 * 2**-23, atol=0)


def test_what_is_trained() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight  # tied: once
    model[0].bias.requires_grad_(False)
    assert list(trained_parameters(model)) == ["0.weight", "1.bias"]
    with pytest.raises(ValueError, match="no parameter requires a gradient: add an adapter, or"):
        trained_parameters(model.requires_grad_(False))
    with pytest.raises(TypeError, match=r"1 of 1 trained parameters are 16 bits wide \(weight, …"):
        trained_parameters(nn.Linear(2, 2, bias=False).bfloat16())


def test_bs_are_found_by_type(every_form: nn.Module) -> None:
    targets = ["embed", "fused", "mix", "conv", "grouped"]
    add_adapter(every_form, LoRAConfig(r=4, targets=targets, bias="lora_only"))
    add_adapter(every_form, LoRAConfig(r=2, targets=["mix"], use_dora=True), name="lora_B")
    found = second_factors(every_form)
    wanted = [
        adapter.B for _, host in adapted_modules(every_form) for adapter in host.adapters.values()
    ]
    assert len(found) == len(wanted) == 6
    assert all(any(b is p for p in found) for b in wanted)
    assert second_factors(nn.Linear(2, 2)) == set()


def test_lora_plus_groups() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    add_adapter(model, LoRAConfig(r=2, targets=["0"], use_dora=True))
    model[1].requires_grad_(True)
    named = list(trained_parameters(model).items())
    config = TrainConfig(lr=1e-3, lora_plus=16, weight_decay=0.1)
    for kind in ("adamw", "adamw8bit", "adamw-paged"):
        made = make_optimizer(
            model, named, TrainConfig(**{**vars(config), "optimizer": kind})
        ).param_groups
        shapes = [[tuple(p.shape) for p in group["params"]] for group in made]
        assert shapes == [[(2, 6)], [(5,), (5,), (5,)], [(5, 2)]]  # A; vectors; B
        assert [group["lr"] for group in made] == [1e-3, 1e-3, 1.6e-2]
        assert [group["weight_decay"] for group in made] == [0.1, 0.0, 0.1]
    assert len(make_optimizer(model, named, TrainConfig(lr=1e-3)).param_groups) == 2


def test_lora_plus_without_a_b_is_refused() -> None:
    model = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"lora_plus is 4, the rate of LoRA's B .* leave it at 1"):
        make_optimizer(model, model.named_parameters(), TrainConfig(lora_plus=4))


def test_a_device_without_fused_kernel_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(3, 4, device="meta")
    optimizer = make_optimizer(model, model.named_parameters(), TrainConfig())
    assert not optimizer.defaults["fused"]
    assert "AdamW has no fused kernel for meta: it takes several passes" in capsys.readouterr().err


def test_the_unfused_formulas_are_the_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    group = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    fused = [[torch.randn(5, 3), torch.rand(9)] for _ in range(4)]
    fused[3] = [t.abs() for t in fused[3]]
    plain = copy.deepcopy(fused)
    fused_adamw_(*fused, [3, 8], group)
    monkeypatch.setattr(fused_adamw, "FUSED", ())
    fused_adamw_(*plain, [3, 8], group)
    for one, other in zip(fused, plain, strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def quadratic(make: Callable[[list[nn.Parameter]], Any], steps: int = 60) -> torch.Tensor:
    """The distance left to go, step by step: 40,000 weights towards targets of many sizes."""
    torch.manual_seed(4)
    target = torch.randn(200, 200) * 10 ** (0.5 * torch.randn(200, 200))
    weight = nn.Parameter(torch.zeros(200, 200))
    optimizer, left = make([weight]), []
    for _ in range(steps):
        loss = (weight - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        left.append(loss.item())
    return torch.tensor(left)


def test_8_bits_against_float32_and_bitsandbytes(oracle: Callable[[str], ModuleType]) -> None:
    """Its CPU code runs here; where float32 goes, both go.

    Without noise in the gradient its nearest codes are closer (0.1 %, ours 1.5 %).
    """
    bitsandbytes = oracle("bitsandbytes")
    exact = quadratic(lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.01))
    ours = quadratic(lambda p: AdamW8bit(p, lr=0.05, weight_decay=0.01))
    peer = quadratic(lambda p: bitsandbytes.optim.AdamW8bit(p, lr=0.05, weight_decay=0.01))
    worst, peers = (float((found / exact - 1).abs().max()) for found in (ours, peer))
    assert worst < 0.02
    assert peers < 0.02


def test_8_bit_state_and_its_size() -> None:
    large, small = nn.Parameter(torch.randn(128, 64)), nn.Parameter(torch.randn(63, 65))
    unused = nn.Parameter(torch.randn(5))
    optimizer = AdamW8bit([large, small, unused], lr=1e-2)
    large.grad, small.grad = torch.randn(128, 64), torch.randn(63, 65)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert set(optimizer.state[large]) == {"step", "mean", "mean_unit", "root", "root_unit"}
    assert set(optimizer.state[small]) == {"step", "mean", "square"}
    assert not optimizer.state[unused]
    held = sum(t.nbytes for t in optimizer.state[large].values() if isinstance(t, torch.Tensor))
    assert held == large.numel() * (2 + 8 / 256)  # 2.03 bytes a parameter


def test_8_bit_and_paged_refusals() -> None:
    half, turned = nn.Parameter(torch.zeros(4).half()), nn.Parameter(torch.zeros(4, 3).t())
    whole = nn.Parameter(torch.zeros(9000))
    for kind in (AdamW8bit, PagedAdamW):
        name = kind.__name__
        with pytest.raises(TypeError, match=f"{name} trains float32 parameters; got one of .*16"):
            kind([half])
        with pytest.raises(ValueError, match=rf"{name} trains contiguous .*\(3, 4\) with strides"):
            kind([turned])
        for setting, value in (("lr", -1.0), ("eps", -1.0), ("weight_decay", -1.0)):
            with pytest.raises(ValueError, match=f"{setting} must be 0 or more; got -1.0"):
                kind([whole], **{setting: value})
        with pytest.raises(ValueError, match=r"betas must be two numbers in \[0, 1\); got"):
            kind([whole], betas=(0.9, 1.0))
    split = nn.Parameter(torch.zeros(3))
    split.to_local = lambda: split  # as FSDP2's tensors have it
    with pytest.raises(ValueError, match="cannot train weights that FSDP split: use"):
        AdamW8bit([split])
    whole.grad = torch.ones(9000)
    plain = torch.optim.AdamW([whole])
    plain.step()
    with pytest.raises(ValueError, match=r"saved state of parameter 0 is \{'exp_avg'.*AdamW8bit k"):
        AdamW8bit([whole]).load_state_dict(plain.state_dict())


def test_rates_of_their_own_are_groups_and_multiply_lora_plus() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    add_adapter(model, LoRAConfig(r=2, targets=["0"]))
    model[2].requires_grad_(True)
    named = dict(trained_parameters(model))
    a, b, weight, bias = named.values()
    config = TrainConfig(lr=1e-3, lora_plus=16, weight_decay=0.1)
    made = make_optimizer(model, named.items(), config, {weight: 4, bias: 4, b: 0.5})
    groups = [([tuple(p.shape) for p in g["params"]], g["lr"]) for g in made.param_groups]
    assert groups == [
        ([(2, 6)], 1e-3),
        ([(5, 2)], 8e-3),
        ([(3, 5)], 4e-3),
        ([(3,)], 4e-3),
    ]
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.1, 0.1, 0.0]
    with pytest.raises(ValueError, match=r"the rate factor of 2.bias must be above 0 .* got 0"):
        make_optimizer(model, named.items(), config, {bias: 0})
    assert a in {p for g in made.param_groups for p in g["params"]}
