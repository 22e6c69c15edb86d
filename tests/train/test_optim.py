"""What is trained, and how it decays."""

import pytest
import torch
from torch import nn

from lora_core.train import TrainConfig, make_adamw, trained_parameters


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
