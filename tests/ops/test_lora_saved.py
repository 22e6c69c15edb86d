"""What three adapted layers that share an input keep for backward: x once, and nothing else.

The case: T = 1024 tokens of width 1024 in bfloat16, which is 2.00 MiB, and r = 16. Counted are the
distinct storages that autograd is given to keep, parameters excepted (the codes of a 4-bit weight
are a parameter, its scales are not).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_core import LoRALinear, NF4Linear
from lora_core.models.attention import cast_once

TOKENS, WIDTH, RANK = 1024, 1024, 16
MIB = 1 << 20
MOST = 2.2  # MiB


class Projections(nn.Module):
    """q, k and v of one input."""

    def __init__(self, base: str, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()

        def layer() -> nn.Module:
            linear: nn.Module = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)
            if base == "4-bit":
                linear = NF4Linear.from_linear(linear)
            return LoRALinear(linear, r=RANK, dropout=dropout)

        self.layers = nn.ModuleList(layer() for _ in range(3))
        for each in self.layers:
            nn.init.normal_(each.B, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = cast_once(x)
        return tuple(layer(x) for layer in self.layers)


def mebibytes(model: nn.Module, tensors: list[Any]) -> float:
    """Bytes of the distinct storages, those of parameters excepted."""
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if isinstance(t, Tensor)
    }
    return sum(size for at, size in storages.items() if at not in held) / MIB


def saved(run: Callable[[Tensor], Any], dtype: torch.dtype) -> list[Tensor]:
    """What the hooks see in a forward pass of an x that wants a gradient."""
    x = torch.randn(1, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    kept: list[Tensor] = []  # references, so that no memory is handed out twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(x)
    return kept


def compiled(model: nn.Module, partition: Callable[..., Any]) -> Callable[[Tensor], Any]:
    """The model as one graph, cut into forward and backward as a compiler does."""
    torch._dynamo.reset()

    def as_it_is(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=as_it_is, bw_compiler=as_it_is, partition_fn=partition)
    return torch.compile(model, backend=backend, fullgraph=True)


WAYS = {
    "eager": lambda model: model,
    "aot_eager": lambda model: compiled(model, default_partition),
    # what inductor cuts with: it may compute again in backward what it could keep
    "inductor": lambda model: compiled(model, min_cut_rematerialization_partition),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", ["dense", "4-bit"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("autocast", [False, True])
def test_x_is_kept_once(way: str, base: str, dropout: float, autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    model = Projections(base, dropout, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        size = mebibytes(model, saved(WAYS[way](model), dtype))
        if autocast and base == "dense":  # PyTorch keeps its casts of the frozen weights
            bases = [layer.base for layer in model.layers]
            alone = mebibytes(model, saved(lambda x: [b(cast_once(x)) for b in bases], dtype))
            assert alone == 6.0
            size -= alone
    assert size <= MOST, f"{way}, {base} base, dropout {dropout}: {size:.2f} MiB"
    assert size >= 2.0, "x itself was not seen"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", ["dense", "4-bit"])
def test_frozen_pairs_keep_no_x(way: str, base: str) -> None:
    """As where soft prompts are trained in front of an adapted model."""
    model = Projections(base, 0.05, torch.bfloat16)
    model.requires_grad_(False)
    assert mebibytes(model, saved(WAYS[way](model), torch.bfloat16)) <= 0.2


def test_written_out_it_is_nine_times_as_much() -> None:
    """The same update in plain PyTorch, which shows that the count sees what is kept."""

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(F.dropout(x, 0.05), a.to(x.dtype)), b.to(x.dtype))

    pairs = [(torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)) for _ in range(3)]
    leaves = [tuple(t.requires_grad_() for t in pair) for pair in pairs]
    kept = saved(lambda x: [layer(x, *pair) for pair in leaves], torch.bfloat16)
    size = mebibytes(nn.Module(), kept)
    assert size > 9, f"{size:.2f} MiB"


def test_each_layer_and_each_call_drops_others() -> None:
    """Masks differ between layers that share x, between calls, and repeat with the generator."""
    model = Projections("dense", 0.5, torch.float32)
    for each in model.layers:
        each.load_state_dict(model.layers[0].state_dict())
    x = torch.randn(1, 3, WIDTH)

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        return [*model(x), *model(x)]

    first, again = run(), run()
    assert all(map(torch.equal, first, again))
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    model.eval()
    assert all(torch.equal(y, model(x)[0]) for y in model(x))


@pytest.mark.parametrize("base", ["dense", "4-bit"])
@pytest.mark.parametrize("way", ["eager", "aot_eager", "inductor"])
def test_recomputed_layers_give_the_same_gradients(way: str, base: str) -> None:
    """Activation checkpointing, eager and around a compiled layer."""
    model = Projections(base, 0.3, torch.float32)
    run, results = WAYS[way](model), []
    for recompute in (False, True):
        torch.manual_seed(4)
        x = torch.ones(1, 6, WIDTH, requires_grad=True)
        out = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        loss = sum(y.square().sum() for y in out)
        results.append(torch.autograd.grad(loss, [x, *(each.A for each in model.layers)]))
    assert all(map(torch.equal, *results))
