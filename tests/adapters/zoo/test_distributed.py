"""Distributed data parallel over gloo: one process, and two with half of the batch each."""

import copy
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lora_core.adapters import (
    LoRAConfig,
    add_adapter,
    merge_adapters,
    set_adapters,
    unmerge_adapters,
)

SCRIPT = Path(__file__).with_name("two_ranks.py")
Same = Callable[[Tensor, Tensor], bool]


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")


@pytest.fixture
def one_rank(tmp_path: Path, loopback: None) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_one_process(chosen: Any, one_rank: None, same_bits: Same) -> None:
    """Every parameter is used, so that none has to be looked for; the gradients are the same."""
    chosen.fill(chosen.model)
    chosen.call(chosen.model, grad=True).square().mean().backward()
    wanted = {k: p.grad.clone() for k, p in chosen.model.named_parameters() if p.requires_grad}
    for static in (False, True):
        chosen.model.zero_grad()
        wrapped = DistributedDataParallel(
            chosen.model, find_unused_parameters=False, static_graph=static
        )
        for _ in range(2):  # the second forward fails if the first left a gradient out
            chosen.model.zero_grad()
            chosen.call(wrapped, grad=True).square().mean().backward()
        for key, p in chosen.model.named_parameters():
            if p.requires_grad:
                assert same_bits(p.grad, wanted[key]), key


def test_adapters_change_under_a_wrapper(
    one_rank: None, perceptron: nn.Module, same_bits: Same
) -> None:
    add_adapter(perceptron, LoRAConfig(r=2, alpha=2), "a")
    nn.init.normal_(perceptron.fused.adapters["a"].B)
    wrapped, twin = DistributedDataParallel(perceptron), copy.deepcopy(perceptron)
    x = torch.randn(2, 12)
    adapted = wrapped(x)
    assert same_bits(adapted, twin(x))
    for model in (wrapped, twin):
        merge_adapters(model)
    assert same_bits(wrapped(x), twin(x))
    for model in (wrapped, twin):
        unmerge_adapters(model)
        set_adapters(model, [])
    assert same_bits(wrapped(x), twin(x))
    assert not torch.equal(wrapped(x), adapted)


def test_two_processes_sum_their_shards(tmp_path: Path, loopback: None, same_bits: Same) -> None:
    """Gradients are the mean of the shards', to the bit; after a step both ranks hold the same."""
    other = subprocess.Popen(
        [sys.executable, str(SCRIPT), "1", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        runpy.run_path(str(SCRIPT))["join"](0, tmp_path)
    finally:
        said, _ = other.communicate(timeout=300)
        print(said)
    assert other.returncode == 0
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) == 4
    for key, first in results[0].items():
        second = results[1][key]
        assert first["ddp"].keys() == first["own"].keys()
        for name in first["ddp"]:
            mean = first["own"][name] / 2 + second["own"][name] / 2
            assert same_bits(first["ddp"][name], mean), (key, name)
            assert same_bits(second["ddp"][name], mean), (key, name)
            assert not torch.equal(first["own"][name], second["own"][name])
            assert same_bits(first["after"][name], second["after"][name])
