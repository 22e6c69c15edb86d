"""Linear and cross-entropy in one operator: against the loss of whole logits, and in memory."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lora_kernels import head_chunks, linear_cross_entropy
from lora_kernels.cross_entropy import Grading
from lora_kernels.gpu import cross_entropy as gpu
from lora_kernels.linear_cross_entropy import linear_cross_entropy_reference as plain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = ["weight", "bias", "pair", "all"]
NAMES = ("hidden", "weight", "bias", "down", "up")
SCALING = 1.5


@contextlib.contextmanager
def sizes(chunk: int, rows: int = 1, block: int = 5, cast: int = 1 << 25) -> Iterator[None]:
    """Chunks of so many bytes, and blocks of so many rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_chunks, "CHUNK_BYTES", chunk)
        patch.setattr(head_chunks, "MIN_ROWS", rows)
        patch.setattr(head_chunks, "BLOCK_ROWS", block)
        patch.setattr(head_chunks, "CAST_BYTES", cast)
        yield


def draw(
    seed: int, m: int, classes: int, features: int, head: str, graded: float = 0.6
) -> tuple[list[Tensor | None], Tensor]:
    """Hidden, weight, bias, A and B in float64, None where the head has none, and targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors: list[Tensor | None] = [normal(m, features), normal(classes, features)]
    tensors.append(normal(classes) if head in ("bias", "all") else None)
    pair = head in ("pair", "all")
    tensors += [normal(3, features), normal(classes, 3)] if pair else [None, None]
    targets = torch.randint(0, classes, (m,), generator=generator)
    masked = torch.rand(m, generator=generator) >= graded
    return tensors, targets.masked_fill(masked, -100)


def leaves(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors]


def gradients(total: Tensor, tensors: list[Tensor | None], factor: float = 0.25) -> list[Tensor]:
    """Of the total, times a number as a mean would have it."""
    given = [t for t in tensors if t is not None]
    return list(torch.autograd.grad(total * factor, given, retain_graph=True))


@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(0, 12), st.integers(1, 40), st.integers(1, 9)),
    head=st.sampled_from(HEADS),
    grading=st.builds(
        Grading,
        st.sampled_from([None, 4.0]),
        st.sampled_from([1.0, 0.25]),
        st.sampled_from([0.0, 0.2]),
    ),
    graded=st.sampled_from([0.0, 0.5, 1.0]),
    chunk=st.integers(1, 4000),
)
def test_in_float64_it_is_the_loss_of_whole_logits(
    seed: int,
    shape: tuple[int, int, int],
    head: str,
    grading: Grading,
    graded: float,
    chunk: int,
) -> None:
    drawn, targets = draw(seed, *shape, head, graded)
    ours, theirs = leaves(drawn, torch.float64), leaves(drawn, torch.float64)
    wanted, by_row = plain(theirs[0], targets, *theirs[1:], SCALING, grading)
    with sizes(chunk):
        total, losses = linear_cross_entropy(
            ours[0], targets, *ours[1:], SCALING, **grading._asdict()
        )
        found = gradients(total, ours)
    torch.testing.assert_close(total, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses, by_row.detach(), rtol=1e-12, atol=1e-12)
    for mine, truth in zip(found, gradients(wanted, theirs), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-11)


BACKENDS = [("reference", head) for head in HEADS] + [("native", head) for head in HEADS]


@pytest.mark.parametrize(("backend", "head"), [*BACKENDS, ("triton", "all")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_below_float64_it_is_as_accurate(
    as_accurate_as: Callable[..., None],
    head: str,
    dtype: torch.dtype,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    poison: None,
) -> None:
    monkeypatch.setenv("LORA_KERNELS", backend)
    monkeypatch.setattr(gpu, "BLOCK", 128)
    shapes = ((7, 33, 16), (40, 130, 24), (24, 300, 9))[: 1 if backend == "triton" else 3]
    for seed, (m, classes, features) in enumerate(shapes):
        for grading in (Grading(), Grading(20.0, 0.5, 0.1)):
            drawn, targets = draw(seed, m, classes, features, head)
            drawn = [None if t is None else (t / features**0.5).to(dtype) for t in drawn]
            exact, theirs, ours = (leaves(drawn, d) for d in (torch.float64, dtype, dtype))
            truth = plain(exact[0], targets, *exact[1:], SCALING, grading)
            base = plain(theirs[0], targets, *theirs[1:], SCALING, grading)
            # 8 rows a chunk, blocks of 5 rows, several slices of the vocabulary
            with sizes(8 * (classes + 2 * features) * dtype.itemsize):
                total, losses = linear_cross_entropy(
                    ours[0], targets, *ours[1:], SCALING, **grading._asdict()
                )
                found = gradients(total, ours)
            as_accurate_as(losses, base[1], truth[1])
            torch.testing.assert_close(total, losses.double().sum().float(), rtol=1e-6, atol=0)
            others = zip(gradients(base[0], theirs), gradients(truth[0], exact), strict=True)
            for mine, (their, true) in zip(found, others, strict=True):
                as_accurate_as(mine, their, true)


def test_a_16_bit_weights_gradient_is_rounded_once(as_accurate_as: Callable[..., None]) -> None:
    """Of 64 blocks, whose sum in 16 bits would be off by several roundings."""
    drawn, targets = draw(0, 320, 20, 8, "weight", 1.0)
    hidden, weight = (t.bfloat16().double() for t in drawn[:2])
    hidden[:, 0] = 1.0  # sums that grow and do not cancel
    targets[:] = 3
    ours, exact = leaves([hidden, weight], torch.bfloat16), leaves([hidden, weight], torch.float64)
    with sizes(64):
        total, _ = linear_cross_entropy(ours[0], targets, ours[1])
        found = gradients(total, ours)[1]
    truth = gradients(plain(exact[0], targets, exact[1])[0], exact)[1]
    error = (found.double() - truth).abs().max() / truth.abs().max()
    assert error < 2.0**-8  # a rounding of the result, and of logits


def test_rows_that_are_not_graded_cost_nothing() -> None:
    drawn, targets = draw(1, 20, 30, 6, "all")
    ours = leaves(drawn, torch.float32)
    with torch.no_grad():
        ours[0][targets == -100] = torch.nan  # nobody looks there
    total, losses = linear_cross_entropy(ours[0], targets, *ours[1:], SCALING)
    assert total.isfinite()
    assert losses[targets == -100].eq(0).all()
    assert losses[targets != -100].gt(0).all()
    dhidden, *others = gradients(total, ours)
    assert dhidden[targets == -100].eq(0).all()
    assert all(g.isfinite().all() and g.any() for g in others)


@pytest.mark.parametrize("m", [0, 5])
def test_nothing_graded_gives_zeros(m: int) -> None:
    drawn, targets = draw(1, m, 30, 6, "all", graded=0.0)
    ours = leaves(drawn, torch.bfloat16)
    total, losses = linear_cross_entropy(ours[0], targets, *ours[1:], SCALING)
    assert total == 0
    assert losses.shape == (m,)
    for gradient, t in zip(gradients(total, ours), ours, strict=True):
        assert gradient.shape == t.shape
        assert gradient.dtype is torch.bfloat16
        assert not gradient.any()


def test_backward_twice_gives_the_same_and_scales() -> None:
    drawn, targets = draw(2, 20, 30, 6, "all")
    ours = leaves(drawn, torch.float32)
    total, _ = linear_cross_entropy(ours[0], targets, *ours[1:], SCALING)
    first, second, double = (gradients(total, ours, factor) for factor in (0.25, 0.25, 0.5))
    for a, b, c in zip(first, second, double, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a * 2, c)


def test_inputs_are_left_alone_and_need_no_layout() -> None:
    drawn, targets = draw(2, 20, 30, 6, "all")
    ours = leaves(drawn, torch.float32)
    wide = [None if t is None else torch.stack((t, t), -1).detach()[..., 0] for t in ours]
    before = [t.clone() for t in wide]
    strided = [t.requires_grad_() for t in wide]
    wanted, _ = linear_cross_entropy(ours[0], targets, *ours[1:], SCALING)
    total, _ = linear_cross_entropy(strided[0], targets, *strided[1:], SCALING)
    assert torch.equal(total, wanted)
    for a, b in zip(gradients(total, strided), gradients(wanted, ours), strict=True):
        torch.testing.assert_close(a, b)
    assert all(map(torch.equal, before, strided))


# --- what is computed, and what is kept ----------------------------------------------------------


def seen(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """Notes the calls of one step of the loops."""
    calls: list[tuple[Any, ...]] = []
    run = getattr(head_chunks, name)
    monkeypatch.setattr(head_chunks, name, lambda *a: calls.append(a) or run(*a))
    return calls


def test_without_anything_to_train_no_gradient_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = seen(monkeypatch, "grade_rows")
    drawn, targets = draw(0, 9, 12, 5, "all")
    trained = leaves(drawn, torch.float32)
    frozen = [t.detach() for t in trained]
    with torch.no_grad():
        linear_cross_entropy(trained[0], targets, *trained[1:], SCALING)
    total, losses = linear_cross_entropy(frozen[0], targets, *frozen[1:], SCALING)
    assert not total.requires_grad
    assert not losses.requires_grad
    assert [wants for *_, wants in calls] == [False, False]
    linear_cross_entropy(trained[0], targets, *frozen[1:], SCALING)
    assert calls[-1][-1] is True


@pytest.mark.parametrize("only", NAMES)
def test_one_gradient_alone_is_the_same(only: str) -> None:
    drawn, targets = draw(3, 9, 12, 5, "all")
    ours = leaves(drawn, torch.float32)
    wanted = gradients(linear_cross_entropy(ours[0], targets, *ours[1:], SCALING)[0], ours)
    for name, t in zip(NAMES, ours, strict=True):
        t.requires_grad_(name == only)
    total, _ = linear_cross_entropy(ours[0], targets, *ours[1:], SCALING)
    alone = torch.autograd.grad(total * 0.25, ours[NAMES.index(only)])[0]
    torch.testing.assert_close(alone, wanted[NAMES.index(only)])


@pytest.mark.parametrize("trained", [False, True])
def test_saved_is_what_was_computed(trained: bool) -> None:
    hidden, weight = torch.randn(64, 16, requires_grad=True), torch.randn(500, 16)
    weight.requires_grad_(trained)
    targets = torch.randint(0, 500, (64,))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_cross_entropy(hidden, targets, weight)
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    for t in (hidden, weight, targets):
        assert (own.pop(t.untyped_storage().data_ptr(), None) is not None) == trained
    assert sum(own.values()) <= 64 * 16 * 4 + trained * 64 * 2 * 4  # dx; m and S


def test_losses_take_no_gradient_and_second_derivatives_say_so() -> None:
    drawn, targets = draw(0, 9, 12, 5, "all")
    ours = leaves(drawn, torch.float32)
    total, losses = linear_cross_entropy(ours[0], targets, *ours[1:], SCALING)
    assert not losses.requires_grad
    assert losses.grad_fn is None
    for t in ours:
        (first,) = torch.autograd.grad(total, t, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"no second derivative.*of whole logits"):
            first.square().sum().backward()


def peak_of(run: Callable[[], object]) -> int:
    """Most bytes that PyTorch's allocator held at once, above what it held before."""
    kind = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind], profile_memory=True) as profile:
        run()
    events = list(profile.profiler.kineto_results.experimental_event_tree())
    changes = []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = most = 0
    for _, size in sorted(changes):
        held += size
        most = max(most, held)
    return most


@pytest.mark.parametrize("trained", [False, True])
def test_memory_is_one_chunk_and_the_gradients(trained: bool) -> None:
    """A sixty-fourth of M 8192, V 128,256, H 4096 in bfloat16: 2^20 bytes of logits a chunk."""
    m, classes, features, chunk = 1024, 16_032, 512, 1 << 20
    hidden = torch.randn(m, features).bfloat16().requires_grad_()
    weight = (torch.randn(classes, features) / 23).bfloat16().requires_grad_(trained)
    targets = torch.randint(0, classes, (m,))
    with sizes(chunk, rows=8, block=256, cast=chunk // 2):

        def step() -> None:
            linear_cross_entropy(hidden, targets, weight)[0].backward()

        peak = peak_of(step)
    dhidden, dweight = m * features * 2, classes * features * 2 * trained
    # dx and a chunk or slice; float32 copies of some rows, and their index
    assert dhidden + chunk // 2 < peak - dweight < dhidden + chunk + chunk // 2
    assert peak - dweight < 200e6 / 64


FULL = """
import gc, sys, torch
from lora_kernels import linear_cross_entropy

def held(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

trained = sys.argv[1] == "trained"
small = [torch.randn(shape).bfloat16().requires_grad_() for shape in ((64, 32), (99, 32))]
linear_cross_entropy(small[0], torch.arange(64), small[1])[0].backward()  # code is loaded
hidden = torch.empty(8192, 4096, dtype=torch.bfloat16).normal_().requires_grad_()
weight = torch.empty(128256, 4096, dtype=torch.bfloat16).normal_(std=0.02).requires_grad_(trained)
targets = torch.randint(0, 128256, (8192,))
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # VmHWM starts again
before = held("VmRSS")
linear_cross_entropy(hidden, targets, weight)[0].mul(1 / 8192).backward()
print(held("VmHWM") - before - trained * weight.numel() * 2)
"""


@pytest.mark.parametrize("trained", [False, True])
def test_memory_at_full_size(trained: bool, full_run: bool) -> None:
    """M 8192, V 128,256, H 4096 in bfloat16: under 200 MB, in a process of its own."""
    if not full_run or not Path("/proc/self/clear_refs").exists():
        pytest.skip("17 or 34 TFLOP: in a full run, where the kernel counts peak memory")
    which = "trained" if trained else "frozen"
    done = subprocess.run(
        [sys.executable, "-c", FULL, which],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())},
    )
    assert int(done.stdout) < 200e6


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [1 << 25, 64])
def test_autocast_multiplies_in_its_dtype(as_accurate_as: Callable[..., None], cast: int) -> None:
    """A float32 head under bfloat16, cast whole or in slices; gradients come in float32."""
    drawn, targets = draw(4, 24, 70, 16, "all")
    drawn = [None if t is None else t / 4 for t in drawn]
    ours, theirs, exact = (leaves(drawn, d) for d in (torch.float32,) * 2 + (torch.float64,))
    with torch.autocast("cpu", torch.bfloat16), sizes(8 * (70 + 2 * 16) * 2, cast=cast):
        total, losses = linear_cross_entropy(ours[0], targets, *ours[1:], SCALING)
        found = gradients(total, ours)
    halves = [t.bfloat16() for t in theirs]
    base = plain(halves[0], targets, *halves[1:], SCALING)
    truth = plain(exact[0], targets, *exact[1:], SCALING)
    assert total.dtype is losses.dtype is torch.float32
    as_accurate_as(losses, base[1], truth[1])
    rounding = 2 * torch.finfo(torch.bfloat16).eps
    others = zip(gradients(base[0], theirs), gradients(truth[0], exact), strict=True)
    for mine, (their, true) in zip(found, others, strict=True):
        assert mine.dtype is torch.float32
        error, baseline = ((t.double() - true).abs().max() for t in (mine, their))
        assert error <= 2 * baseline + rounding * true.abs().max()


def test_hidden_may_be_of_16_bits_under_autocast_with_a_float32_head() -> None:
    drawn, targets = draw(4, 24, 70, 16, "weight")
    hidden, weight = drawn[0].bfloat16(), drawn[1].float()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_cross_entropy(hidden, targets, weight)
    assert torch.equal(total, linear_cross_entropy(hidden, targets, weight.bfloat16())[0])


# --- as an operator ------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "trained"), [("weight", False), ("all", True)])
def test_opcheck(head: str, trained: bool) -> None:
    drawn, targets = draw(0, 9, 12, 5, head)
    ours = leaves(drawn, torch.float32)
    ours[1].requires_grad_(trained)
    pair = ours[3] is not None
    scaling = torch.tensor([SCALING]) if pair else None
    grading = (torch.float32, 4.0, 0.5, 0.1)
    wants = (True, trained, ours[2] is not None, pair)
    operator = torch.ops.lora_kernels.linear_cross_entropy.default
    torch.library.opcheck(operator, (ours[0], targets, *ours[1:], scaling, *grading, *wants))
    frozen = [None if t is None else t.detach() for t in ours]
    norms = torch.rand(9, 2) + 1
    operator = torch.ops.lora_kernels.linear_cross_entropy_dweight.default
    arguments = (torch.ones(()), norms, frozen[0], targets, *frozen[1:], scaling, *grading)
    torch.library.opcheck(operator, arguments)


def test_a_compiler_is_told_the_layout() -> None:
    (hidden, weight, *_), targets = draw(0, 9, 12, 5, "weight")
    hidden, weight = hidden.t().contiguous().t(), weight.t().contiguous().t()
    grading = (torch.float64, None, 1.0, 0.0)
    operator = torch.ops.lora_kernels.linear_cross_entropy.default
    head = (weight.requires_grad_(), None, None, None, None)
    wants = (True, True, False, False)
    _, _, _, dhidden, *_ = operator(hidden.requires_grad_(), targets, *head, *grading, *wants)
    assert dhidden.stride() == (5, 1)
    torch.library.opcheck(operator, (hidden, targets, *head, *grading, *wants))


def test_compiled_it_is_one_graph_for_any_number_of_graded_rows() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(hidden: Tensor, targets: Tensor, *head: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden, targets, *head, SCALING, softcap=9.0)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for graded in (1.0, 0.4, 0.0):
        drawn, targets = draw(0, 9, 12, 5, "all", graded)
        ours = leaves(drawn, torch.float32)
        total, losses = compiled(ours[0], targets, *ours[1:])
        wanted, by_row = step(ours[0], targets, *ours[1:])
        assert torch.equal(total, wanted)
        assert torch.equal(losses, by_row)
        assert not losses.requires_grad
        assert all(map(torch.equal, gradients(total, ours), gradients(wanted, ours)))
    assert counter.frame_count == 1


def test_what_does_not_fit() -> None:
    hidden, targets, weight = torch.zeros(4, 3), torch.zeros(4).long(), torch.zeros(7, 3)
    down, up = torch.zeros(2, 3), torch.zeros(7, 2)
    with pytest.raises(TypeError, match=r"hidden must be floating-point; got torch\.int64"):
        linear_cross_entropy(targets[:, None], targets, weight)
    with pytest.raises(TypeError, match=r"hidden is torch.float32 and the head's weight torch.bf"):
        linear_cross_entropy(hidden, targets, weight.bfloat16())
    for h, t in ((hidden[:, :2], targets), (hidden, targets[:3]), (hidden[None], targets)):
        with pytest.raises(ValueError, match=r"hidden must be \(M, 3\) and targets \(M,\)"):
            linear_cross_entropy(h, t, weight)
    with pytest.raises(ValueError, match=r"bias must be \(7,\); got \(3,\)"):
        linear_cross_entropy(hidden, targets, weight, hidden[0])
    with pytest.raises(ValueError, match="down and up are one pair: give both or neither"):
        linear_cross_entropy(hidden, targets, weight, None, down)
    with pytest.raises(ValueError, match=r"down and up must be \(r, 3\) and \(7, r\); got \(2, 3"):
        linear_cross_entropy(hidden, targets, weight, None, down, up[:, :1])
    with pytest.raises(ValueError, match=r"weight must be \(V, H\); got \(3,\)"):
        linear_cross_entropy(hidden, targets, weight[0])
    with pytest.raises(ValueError, match=r"scaling must be a number or \(1,\); got \(2,\)"):
        linear_cross_entropy(hidden, targets, weight, None, down, up, torch.ones(2))
    scaling = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="scaling takes no gradient; multiply up by it"):
        linear_cross_entropy(hidden, targets, weight, None, down, up, scaling)
    with pytest.raises(ValueError, match="softcap must be positive, or None for no cap; got 0"):
        linear_cross_entropy(hidden, targets, weight, softcap=0)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\); got 1"):
        linear_cross_entropy(hidden, targets, weight, label_smoothing=1)
