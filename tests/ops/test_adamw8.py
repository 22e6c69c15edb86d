"""AdamW with 8-bit moments: what the codes keep, and the definition and C bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import adamw8 as operator
from lora_kernels.adamw8 import Moments8, adamw8_, decode, no_moments
from lora_kernels.cpu import library

SETTINGS: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
SETTINGS |= {"weight_decay": 0.1}
State = tuple[list[Tensor], list[Moments8]]

shapes = st.lists(
    st.tuples(st.integers(0, 700)) | st.tuples(st.integers(1, 40), st.integers(1, 40)),
    min_size=1,
    max_size=6,
)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda backend: monkeypatch.setenv("LORA_KERNELS", backend)


def run(sizes: list[tuple[int, ...]], seed: int = 0, steps: int = 4, **settings: Any) -> State:
    """Some steps with gradients of many magnitudes, zeros among them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        wide = torch.randn(shape, generator=generator) * 3
        g = torch.randn(shape, generator=generator) * 10**wide
        return g * (torch.rand(shape, generator=generator) > 0.2)

    params = [torch.randn(shape, generator=generator) for shape in sizes]
    moments = [no_moments(p) for p in params]
    for step in range(1, steps + 1):
        grads = [draw(shape) for shape in sizes]
        adamw8_(params, grads, moments, step=step, **{**SETTINGS, **settings})
    return params, moments


def same(a: State, b: State) -> None:
    """Assert equality, bit for bit."""
    for x, y in zip(a[0], b[0], strict=True):
        assert torch.equal(x, y)
    for one, other in zip(a[1], b[1], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_first_step_is_adamw(
    backend: str, use: Callable[[str], None], as_accurate_as: Callable[..., None]
) -> None:
    if backend == "native" and library.why_not():
        pytest.skip("no C compiler")
    use(backend)
    w, g = torch.randn(1000), torch.randn(1000) * 10 ** torch.randn(1000)

    def peer(dtype: torch.dtype) -> Tensor:
        p = torch.nn.Parameter(w.to(dtype))
        p.grad = g.to(dtype)
        torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1).step()
        return p.detach()

    ours = w.clone()
    adamw8_([ours], [g], [no_moments(w)], step=1, **SETTINGS)
    as_accurate_as(ours, peer(torch.float32), peer(torch.float64))


@given(st.integers(1, 600), st.floats(-15, 15), st.integers(0, 6), st.integers(0, 99))
def test_codes_are_near_and_never_lose_a_root(
    n: int, magnitude: float, spread: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    exponent = magnitude + spread * torch.randn(n, generator=generator)
    g = torch.randn(n, generator=generator) * 10 ** exponent.clamp(-17, 18)
    g[torch.rand(n, generator=generator) < 0.1] = 0
    p, moments = torch.zeros(n), no_moments(g)
    adamw8_([p], [g], [moments], step=1, **{**SETTINGS, "beta1": 0.5, "beta2": 0.75})
    m, s = 0.5 * g.double(), (0.25 * (g * g).double()).sqrt()
    found_m, found_s = (t.double() for t in decode(moments))
    unit_m, unit_s = (
        unit.double().repeat_interleave(256)[:n] for unit in (moments.mean_unit, moments.root_unit)
    )
    c = (m.abs() / unit_m).sqrt()
    assert ((found_m.abs() / unit_m).sqrt() - c).abs().max() <= 0.5 * (1 + 1e-4)
    c = (s / unit_s).sqrt().sqrt()
    off = (found_s / unit_s).sqrt().sqrt() - c
    assert off.abs().max() <= 1 + 1e-4
    assert torch.equal(moments.root == 0, (g * g) == 0)
    assert (found_m * m >= 0).all()
    assert p.isfinite().all()


def settle(steps: int = 700) -> Tensor:
    """sqrt(v) of elements that calm down beside one that does not, over what it should be."""
    generator = torch.Generator().manual_seed(0)
    p = torch.zeros(256)
    moments = no_moments(p)
    square = torch.zeros(256)
    for step in range(1, 2 * steps + 1):
        g = torch.randn(256, generator=generator)
        g[1:] *= 1.0 if step <= steps else 0.2
        adamw8_([p], [g], [moments], step=step, **{**SETTINGS, "beta2": 0.995})
        square = 0.995 * square + 0.005 * g * g
    return (decode(moments)[1] / square.sqrt())[1:]


def test_the_root_follows_a_gradient_that_calms_down(
    use: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use("reference")
    assert abs(settle().mean() - 1) < 0.05
    # rounded to the nearest, it stays where it was
    monkeypatch.setattr(operator, "_noise", lambda piece, seed, device: 0.5)
    assert settle().mean() > 1.5


def test_a_small_gradient_beside_a_large_one_does_not_explode(use: Callable[[str], None]) -> None:
    use("reference")
    p, moments = torch.zeros(256), no_moments(torch.zeros(256))
    for step in range(1, 200):
        g = torch.full((256,), 1e-4 if step % 2 else 0.0)
        g[0] = 1.0
        adamw8_([p], [g], [moments], step=step, **{**SETTINGS, "weight_decay": 0.0})
    true = 0.5 / 0.5**0.5  # m / sqrt(v) of a gradient that is there every other step
    speed = p[1:].abs() / p[0].abs()
    assert speed.max() < 2 * true
    assert speed.mean() == pytest.approx(true, rel=0.3)  # codes of m are coarse at 1e-4


@given(shapes, st.integers(0, 99), st.sampled_from([256, 512, 1024]))
def test_pieces_do_not_show(sizes: list[tuple[int, ...]], seed: int, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_KERNELS", "reference")
        whole = run(sizes, seed)
        patch.setattr(operator, "PIECE", piece)
        same(run(sizes, seed), whole)


@given(shapes, st.integers(0, 99))
def test_c_is_the_definition(isa: str, sizes: list[tuple[int, ...]], seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        found = run(sizes, seed)
        patch.setenv("LORA_KERNELS", "reference")
        same(found, run(sizes, seed))


def test_c_on_several_threads_and_without_decay(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(300, 300), (5,), (256,), (40_001,)]
    settings = {"weight_decay": 0.0, "eps": 0.1, "beta1": 0.0}
    monkeypatch.setattr(library, "threads", lambda: 3)
    found = run(sizes, steps=2, **settings)
    monkeypatch.setenv("LORA_KERNELS", "reference")
    same(found, run(sizes, steps=2, **settings))


def test_the_definitions_memory_does_not_grow(use: Callable[[str], None], live_bytes: Any) -> None:
    use("reference")
    params = [torch.zeros(1 << 20) for _ in range(4)]
    moments = [no_moments(p) for p in params]
    grads = [torch.ones_like(p) for p in params]
    with live_bytes:
        adamw8_(params, grads, moments, step=1, **SETTINGS)
    assert live_bytes.peak < 80 * operator.PIECE  # bytes; the piece's size, not the tensors'


class Operations(TorchDispatchMode):
    """Counts operations that compute: views, which cost no launch, are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        view = any(a.alias_info is not None for a in func._schema.returns)
        self.count += not view and "arange" not in str(func)
        return func(*args, **(kwargs or {}))


def test_operations_do_not_grow_with_the_number_of_tensors(use: Callable[[str], None]) -> None:
    use("reference")

    def count(tensors: int) -> int:
        params = [torch.zeros(300) for _ in range(tensors)]
        grads, moments = [torch.ones(300)] * tensors, [no_moments(p) for p in params]
        with Operations() as operations:
            adamw8_(params, grads, moments, step=1, **SETTINGS)
        return operations.count

    assert count(100) == count(2) < 80


def test_torch_knows_the_operator() -> None:
    params, grads = [torch.randn(300), torch.randn(5, 4)], [torch.randn(300), torch.randn(5, 4)]
    states = [list(part) for part in zip(*map(no_moments, params), strict=True)]
    factors = [0.9, 0.9, 0.1, 0.999, 0.001, 2.0, 1e-8, 1e-2]
    version = params[0]._version
    tests = ("test_schema", "test_faketensor")
    arguments = (params, grads, *states, factors, 3)
    torch.library.opcheck(torch.ops.lora_kernels.adamw8_, arguments, test_utils=tests)
    adamw8_(params, grads, [no_moments(p) for p in params], step=1, **SETTINGS)
    assert params[0]._version > version


def test_it_compiles_without_a_break() -> None:
    def once(run: Callable[..., None]) -> State:
        generator = torch.Generator().manual_seed(0)
        shapes = [(300,), (5, 4)]
        params, grads = (
            [torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)
        )
        moments = [no_moments(p) for p in params]
        run(params, grads, moments)
        return params, moments

    def step(params: list[Tensor], grads: list[Tensor], moments: list[Moments8]) -> None:
        adamw8_(params, grads, moments, step=1, **SETTINGS)

    same(once(torch.compile(step, fullgraph=True, backend="aot_eager")), once(step))


def test_refusals() -> None:
    p = torch.zeros(300)

    def step(
        params: list[Tensor], grads: list[Tensor], moments: list[Moments8], number: int = 1
    ) -> None:
        adamw8_(params, grads, moments, step=number, **SETTINGS)

    good = no_moments(p)
    step([], [], [])
    with pytest.raises(ValueError, match="steps are counted from 1; got 0"):
        step([p], [p], [good], 0)
    with pytest.raises(ValueError, match="needs a gradient and moments; got 1, 0 and 1"):
        step([p], [], [good])
    with pytest.raises(TypeError, match=r"must be float32; got torch.float64 and torch.float32"):
        step([p.double()], [p], [good])
    with pytest.raises(TypeError, match="codes are int8 and uint8, units float32; got uint8, fl"):
        step([p], [p], [good._replace(mean=good.root)])
    with pytest.raises(ValueError, match=r"contiguous and of its gradient's shape; got \(3, 100\)"):
        step([p.view(100, 3).t()], [p.view(3, 100)], [good])
    with pytest.raises(ValueError, match=r"300 elements need 300 codes and 2 units each; got \[30"):
        step([p], [p], [no_moments(p[:30])])
    with pytest.raises(ValueError, match="codes and units must be contiguous; call"):
        step([p], [p], [good._replace(mean=good.mean[:1].expand(300))])
    with pytest.raises(ValueError, match="must lie on one device"):
        step([p], [p.to("meta")], [good])
