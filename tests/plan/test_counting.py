"""The count of live bytes, and each rule of what operators hold inside, against real runs."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from lora_core.plan.counting import LiveBytes, storage_bytes
from lora_core.plan.inside import GPU_SLICE, Inside
from lora_core.quant import NF4Linear
from lora_kernels import masked_attention, matmul4
from lora_kernels.linear_cross_entropy import linear_cross_entropy
from lora_kernels.lora_linear import lora_linear4
from lora_kernels.lora_update import lora_update

ROOT = Path(__file__).parents[2]


def nothing(*_: Any) -> int:
    return 0


def test_storages_are_counted_once_and_until_they_die() -> None:
    live = LiveBytes(nothing)
    with FakeTensorMode(), live:
        a = torch.empty(100)  # 400 bytes
        b = a[10:].view(9, 10)
        a.add_(1)
        assert live.now == 400
        c = b + 1
        assert live.now == 400 + 360
        del a
        assert live.now == 760  # b holds it
        del b, c
        assert live.now == 0
    assert live.peaks[""] == 760


def test_phases_have_peaks_of_their_own() -> None:
    live = LiveBytes(nothing)
    with FakeTensorMode(), live:
        live.phase = "first"
        a = torch.empty(100)
        b = a + a
        del b
        live.phase = "second"
        assert live.peaks == {"first": 800, "second": 400}
        assert storage_bytes([a, a[1:]]) == 400


def test_selections_take_every_row_and_questions_get_no_for_an_answer() -> None:
    live = LiveBytes(nothing)
    with FakeTensorMode(), live:
        x, mask = torch.empty(4, 6, 3), torch.empty(4, 6) > 0
        assert x[mask].shape == (24, 3)
        assert mask.nonzero().shape == (24, 2)
        assert not mask.any()
        x[mask] = 1.0


def fake_peak(run: Callable[[dict[str, Tensor]], object], tensors: dict[str, Tensor]) -> int:
    """The peak above its inputs that is counted on fake tensors."""
    live = LiveBytes(Inside(torch.float32))
    mode = FakeTensorMode()
    fake = {k: mode.from_tensor(t.detach()) for k, t in tensors.items()}
    with mode:
        for name, tensor in fake.items():
            tensor.requires_grad_(tensors[name].requires_grad)
        live.watch(fake.values())
        before = live.now
        with live:
            kept = run(fake)
        del kept
    return max(live.peaks.values()) - before


def real_peak(run: Callable[[dict[str, Tensor]], object], tensors: dict[str, Tensor]) -> int:
    """The same of a real run, by the allocator's events."""
    run(tensors)  # compiles what is compiled on first use
    for tensor in tensors.values():
        tensor.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = run(tensors)
    del kept
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


ROWS, K, N, RANK = 300, 1536, 2048, 8
LAYER = NF4Linear.from_linear(nn.Linear(K, N, bias=False))


def weight(t: dict[str, Tensor]) -> Any:
    names = ("codes", "scales", "table", "scale_absmax", "scale_offset", "scale_table")
    return LAYER.weight4._replace(**{name: t[name] for name in names})


def inputs(dtype: torch.dtype, **sizes: tuple[int, ...]) -> dict[str, Tensor]:
    stored = LAYER.weight4
    names = ("codes", "scales", "table", "scale_absmax", "scale_offset", "scale_table")
    found = {name: getattr(stored, name).detach() for name in names}
    for name, size in sizes.items():
        wide = name in ("down", "up")
        made = torch.randn(size, dtype=torch.float32 if wide else dtype)
        found[name] = made.requires_grad_()
    return found


def product(t: dict[str, Tensor]) -> Tensor:
    return matmul4(t["x"], weight(t))


def product_and_gradient(t: dict[str, Tensor]) -> Tensor:
    y = matmul4(t["x"], weight(t))
    y.backward(torch.empty_like(y))
    return y


def adapted(t: dict[str, Tensor]) -> Tensor:
    return lora_linear4(t["x"], weight(t), None, t["down"], t["up"], 2.0)


def adapted_and_gradient(t: dict[str, Tensor]) -> Tensor:
    y = adapted(t)
    y.backward(torch.empty_like(y))
    return y


def update(t: dict[str, Tensor]) -> Tensor:
    y = lora_update(t["y"], t["x"], t["down"], t["up"], 2.0)
    y.backward(torch.empty_like(y))
    return y


PAIR = {"x": (ROWS, K), "down": (RANK, K), "up": (N, RANK)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("run", "sizes"),
    [
        (product, {"x": (ROWS, K)}),
        (product_and_gradient, {"x": (ROWS, K)}),
        (adapted, PAIR),
        (adapted_and_gradient, PAIR),
        (update, {**PAIR, "y": (ROWS, N)}),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_inside_of_products_is_what_they_allocate(
    run: Any, sizes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    tensors = inputs(dtype, **sizes)
    real = real_peak(run, tensors)
    told = fake_peak(run, tensors)
    assert told == pytest.approx(real, rel=0.03), (told, real)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inside_of_the_loss_is_what_it_allocates(
    trained: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_kernels import head_chunks

    for name, size in {"CHUNK_BYTES": 1 << 22, "BLOCK_ROWS": 256}.items():
        monkeypatch.setattr(head_chunks, name, size)
    hidden = torch.randn(1500, 256, dtype=dtype, requires_grad=True)
    head = torch.randn(6000, 256, dtype=dtype, requires_grad=trained)
    targets = torch.randint(0, 6000, (1500,))

    def run(t: dict[str, Tensor]) -> Tensor:
        total, _ = linear_cross_entropy(t["hidden"], t["targets"], t["head"])
        total.backward()
        return total

    tensors = {"hidden": hidden, "targets": targets, "head": head}
    assert fake_peak(run, tensors) == pytest.approx(real_peak(run, tensors), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_inside_of_capped_attention_is_what_it_allocates(
    dtype: torch.dtype, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_kernels.capped_attention.CHUNK", 1 << 20)
    sizes = {"q": (1, 4, 2048, 32), "k": (1, 2, 2048, 32), "v": (1, 2, 2048, 32)}

    def run(t: dict[str, Tensor]) -> Tensor:
        y = masked_attention(t["q"], t["k"], t["v"], None, softcap=5.0)
        if backward:
            y.backward(torch.empty_like(y))
        return y

    tensors = {
        name: torch.randn(size, dtype=dtype, requires_grad=True) for name, size in sizes.items()
    }
    assert fake_peak(run, tensors) == pytest.approx(real_peak(run, tensors), rel=0.1)


def test_constants_of_the_gpu_are_the_operators_own() -> None:
    text = (ROOT / "kernels/lora_kernels/gpu/routes4.py").read_text()
    named = {
        ast.unparse(node.targets[0]): node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign)
    }
    assert eval(ast.unparse(named["SLICE_BYTES"])) == GPU_SLICE


def test_a_recomputation_keeps_what_it_expanded_until_backward() -> None:
    inside = Inside(torch.bfloat16, "cuda")
    x = torch.empty(300, K, dtype=torch.bfloat16, device="meta")
    arguments = [LAYER.weight4.codes, *[None] * 6, N, K, 64]
    dense = 2 * N * K
    assert inside("lora_kernels::matmul4", (x, *arguments, None), {}) == dense
    inside.begin_layer(recomputing=True)
    inside("lora_kernels::matmul4", (x, *arguments, None), {})
    assert inside("aten::add", (), {}) == dense  # it lies there
    dy = torch.empty(300, N, dtype=torch.bfloat16, device="meta")
    assert inside("lora_kernels::matmul4_dx", (dy, *arguments), {}) == dense
    assert inside("aten::add", (), {}) == 0
