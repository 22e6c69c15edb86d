"""Products with a 4-bit weight in C, on every instruction set that this machine has.

W is known exactly in float64, and few rows are multiplied by it unrounded. So their bound is that
of any order of float32 additions, and one rounding of the result.
"""

import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lora_core.quant.codebook import CODEBOOKS
from lora_core.testing import check_operator
from lora_kernels import Weight4, decode_scales
from lora_kernels import matmul4 as matmul
from lora_kernels.cpu import library, machine
from lora_kernels.cpu import matmul4 as cpu
from lora_kernels.matmul4 import dx_reference, matmul4_reference

BLOCKS = [2**i for i in range(5, 13)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
NF4, FP4, INT4 = (CODEBOOKS[name].table() for name in ("nf4", "fp4", "int4"))
NO_ZERO = torch.linspace(-3.0, 5.0, 16)
TABLES = [NF4, FP4, INT4, NO_ZERO]
CHUNKS = [32, 64, 128]  # weights in a chunk on 4, 8 and 16 lanes


def exact(weight: Weight4) -> Tensor:
    """W in float64, where the product of two float32 is exact."""
    n, k = weight.out_features, weight.in_features
    scales = decode_scales(weight.scales, *(weight.nested or ())).double()
    index = torch.stack((weight.codes >> 4, weight.codes & 15), 1).view(-1)[: n * k].long()
    each = scales.repeat_interleave(weight.block_size)[: n * k]
    return (weight.table.double()[index] * each).view(n, k)


def assert_sums(y: Tensor, x: Tensor, weight: Weight4, bias: Tensor | None = None) -> None:
    """Within what K float32 additions and the rounding of the result can do."""
    w, x = exact(weight), x.double()
    bias = torch.zeros(len(w)) if bias is None else bias
    truth = x @ w.t() + bias.double()
    magnitude = x.abs() @ w.t().abs() + bias.double().abs()
    kind = torch.finfo(y.dtype)
    # one of each product, of at most K + 4 sums, of the scale, of the bias
    sums = (weight.in_features + 8) * 2**-24 * magnitude + 1e-37
    rounding = kind.eps / 2 * (truth.abs() + sums) + kind.smallest_normal * kind.eps
    assert y.shape == truth.shape
    excess = (y.double() - truth).abs() - sums - rounding
    assert not excess.numel() or excess.max() <= 0, excess.max()


@pytest.fixture
def many_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """C takes whatever it can."""
    for dtype in FLOATS:
        monkeypatch.setitem(cpu.FEW_ROWS, dtype, 99)


@pytest.fixture
def all_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- few rows ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa", "many_are_few", "poison")
@given(
    m=st.integers(0, 13),
    n=st.sampled_from([0, 1, 2, 3, 5, 40]),
    blocks=st.integers(0, 9),
    block=st.sampled_from(BLOCKS),
    dtype=st.sampled_from(FLOATS),
    bias_dtype=st.sampled_from([None, *FLOATS, torch.float64]),
    nested=st.booleans(),
    table=st.sampled_from(TABLES),
    seed=st.integers(0, 2**31),
)
@example(  # 300 blocks a row: scales are decoded in two parts
    m=5, n=5, blocks=300, block=32, dtype=torch.float32, bias_dtype=None, nested=True, table=FP4,
    seed=1,
)  # fmt: skip
@example(  # a row of 259 blocks, the last of which fill no chunk
    m=1, n=3, blocks=259, block=32, dtype=torch.float32, bias_dtype=None, nested=True, table=NF4,
    seed=2,
)  # fmt: skip
def test_few_rows(
    make_weight: Callable[..., Weight4],
    m: int,
    n: int,
    blocks: int,
    block: int,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    nested: bool,
    table: Tensor,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight = make_weight(n, blocks * block, block, nested=nested, table=table, seed=seed)
    x = torch.randn(m, blocks * block).to(dtype)
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    y = cpu.multiply(x, weight, bias)
    assert y.dtype == dtype
    assert_sums(y, x, weight, bias)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_size_and_every_tail(
    make_weight: Callable[..., Weight4], block: int, nested: bool
) -> None:
    for k in {block * i for i in range(1, 6)}:
        for m in (1, 3):
            weight = make_weight(6, k, block, nested=nested, seed=k)
            x = torch.randn(m, k)
            assert_sums(cpu.multiply(x, weight, None), x, weight)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_nothing_that_an_earlier_call_left_behind_counts(
    make_weight: Callable[..., Weight4], m: int
) -> None:
    """Scales and sums lie where others have lain: behind the last block there may be NaN."""
    weight = make_weight(7, 96, 32)
    before = make_weight(8, 64 * 256, 32)
    before = before._replace(scales=before.scales * torch.nan)
    assert cpu.multiply(torch.randn(m, 64 * 256), before, None).isnan().all()
    assert_sums(cpu.multiply(x := torch.randn(m, 96), weight, None), x, weight)


@pytest.mark.usefixtures("isa", "many_are_few")
def test_each_weight_meets_its_own_x(make_weight: Callable[..., Weight4]) -> None:
    """A row of the unit matrix picks a column of W; powers of two make it exact."""
    table = 2.0 ** torch.arange(16) * torch.tensor([1.0, -1.0]).repeat(8)
    for k in (32, 160, 256):
        weight = make_weight(7, k, 32, table=table)._replace(
            scales=2.0 ** torch.arange(7 * k // 32).remainder(20)
        )
        y = cpu.multiply(torch.eye(k)[:99], weight, None)
        assert torch.equal(y.double(), exact(weight).t()[:99])


@pytest.mark.usefixtures("isa")
def test_as_good_as_a_float32_weight_and_better_than_a_rounded_one(
    make_weight: Callable[..., Weight4],
) -> None:
    n, k = 256, 4096
    weight = make_weight(n, k)
    weight = weight._replace(scales=weight.scales.abs() + 0.5)
    w = exact(weight)
    for m, mean in ((1, 0), (4, 0), (8, 3)):
        x = (torch.randn(m, k) + mean).bfloat16().float()
        truth = x.double() @ w.t()

        def error(y: Tensor, truth: Tensor = truth) -> float:
            return (y.double() - truth).square().mean().sqrt().item()

        ours = error(cpu.multiply(x, weight, None))
        assert ours <= 1.05 * error(F.linear(x, w.float()))
        rounded = error(F.linear(x, w.bfloat16().float()))
        assert ours < rounded / 1000
        # in bfloat16 what is left is the rounding of the result
        half = error(cpu.multiply(x.bfloat16(), weight, None))
        assert half <= 1.001 * error(truth.bfloat16())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("table", [NF4, NO_ZERO], ids=["with zero", "without"])
def test_infinities_and_nan_do_what_they_do_elsewhere(
    make_weight: Callable[..., Weight4], table: Tensor
) -> None:
    """0 times infinity is NaN, infinities of two signs are, all else is infinite."""
    weight = make_weight(40, 160, 32, table=table)
    for special in ([torch.inf], [-torch.inf, -torch.inf], [torch.inf, -torch.inf], [torch.nan]):
        x = torch.randn(3, 160)  # the last 32 fill no chunk, and come after the 104th
        x[1, torch.tensor([104, 5][: len(special)])] = torch.tensor(special)
        y, wanted = cpu.multiply(x, weight, None), x.double() @ exact(weight).t()
        assert torch.equal(y.isnan(), wanted.isnan())
        assert torch.equal(y[wanted.isinf()].double(), wanted[wanted.isinf()])
        assert y[[0, 2]].isfinite().all()


@pytest.mark.usefixtures("isa", "all_threads", "many_are_few")
@pytest.mark.parametrize("m", [1, 2, 5])
def test_the_same_bits_on_any_number_of_threads(
    make_weight: Callable[..., Weight4], m: int
) -> None:
    """Large enough for several pieces; each row of W alone gives its column again."""
    n, k = 1031, 1056
    weight, x = make_weight(n, k, 32, nested=True), torch.randn(m, k)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(cpu.multiply(x, weight, None))
    assert all(torch.equal(y, results[0]) for y in results)
    assert_sums(results[0], x, weight)
    part = weight._replace(
        codes=weight.codes[256 * k // 2 : 263 * k // 2],
        scales=weight.scales[256 * k // 32 : 263 * k // 32],
        scale_absmax=weight.scale_absmax[33:],  # 256 rows are 33 groups of 256 blocks
        out_features=7,
    )
    part = part._replace(scale_absmax=part.scale_absmax[: -(-part.scales.numel() // 256)])
    assert torch.equal(cpu.multiply(x, part, None), results[0][:, 256:263])


@pytest.mark.parametrize("isa", machine.available()[:1], indirect=True)
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("threads", [0, -3])
def test_less_than_one_thread_is_one(
    make_weight: Callable[..., Weight4], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    weight, x = make_weight(1031, 1056, 32), torch.randn(1, 1056)
    wanted = cpu.multiply(x, weight, None)
    monkeypatch.setattr(library, "threads", lambda: threads)
    assert torch.equal(cpu.multiply(x, weight, None), wanted)


@pytest.mark.parametrize("isa", machine.available()[:1], indirect=True)
@pytest.mark.usefixtures("isa", "all_threads")
def test_callers_at_the_same_time(make_weight: Callable[..., Weight4]) -> None:
    torch.set_num_threads(2)
    weight = make_weight(600, 1024)
    inputs = [torch.randn(m, 1024) for m in (1, 2, 3, 8) * 3]
    alone = [cpu.multiply(x, weight, None) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: cpu.multiply(x, weight, None), inputs))
    assert all(map(torch.equal, alone, together))


@pytest.mark.usefixtures("isa", "many_are_few")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tensors_that_begin_anywhere(
    make_weight: Callable[..., Weight4], dtype: torch.dtype
) -> None:
    plain = make_weight(9, 192)
    x, bias = torch.randn(5, 192).to(dtype), torch.randn(9)
    wanted = cpu.multiply(x, plain, bias)
    for shift in range(1, 8):

        def moved(t: Tensor, by: int = shift) -> Tensor:
            room = torch.empty(t.numel() + by, dtype=t.dtype)
            return room[by:].copy_(t.reshape(-1)).view(t.shape)

        weight = plain._replace(codes=moved(plain.codes), scales=moved(plain.scales))
        assert torch.equal(cpu.multiply(moved(x), weight, moved(bias)), wanted)
    apart = torch.stack((x, x * torch.nan), -1)[..., 0]
    assert torch.equal(cpu.multiply(apart, plain, bias.repeat_interleave(2)[::2]), wanted)
    assert torch.equal(cpu.multiply(x.t().contiguous().t(), plain, bias), wanted)


@pytest.mark.parametrize("isa", machine.available()[:1], indirect=True)
@pytest.mark.usefixtures("isa")
def test_beyond_two_to_the_31st_weight(make_weight: Callable[..., Weight4]) -> None:
    """Codes that nobody has written take no memory: zeros, up to the last rows."""
    n, k, block, tail = (1 << 19) + 5, 4096, 4096, 5
    codes = torch.frombuffer(mmap.mmap(-1, n * k // 2), dtype=torch.uint8)
    last = make_weight(tail, k, block, seed=3)
    codes[-last.codes.numel() :] = last.codes
    scales = torch.ones(n)
    scales[-tail:] = last.scales
    weight, x = Weight4(codes, scales, NF4, n, k, block), torch.randn(1, k)
    y = cpu.multiply(x, weight, None)
    assert torch.equal(y[:, -tail:], cpu.multiply(x, last, None))
    assert (y[:, :-tail] == y[0, 0]).all()
    assert y[0, 0].item() == pytest.approx(-x.double().sum().item(), rel=1e-4)


# --- many rows -----------------------------------------------------------------------------------


@pytest.fixture(params=["panels", "one panel"])
def small_panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "panels":
        monkeypatch.setattr(cpu, "PANEL_BYTES", 4096)
        monkeypatch.setattr(cpu, "PANEL_COLUMNS", 64)
    monkeypatch.setattr(cpu, "FEW_ROWS", {})


@pytest.mark.parametrize("isa", machine.available()[:1], indirect=True)
@pytest.mark.usefixtures("isa", "small_panels", "poison")
@given(
    m=st.sampled_from([0, 1, 9, 33]),
    n=st.sampled_from([0, 1, 3, 37, 150]),
    k=st.sampled_from([0, 1, 31, 64, 96, 100, 192, 320]),
    block=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from([*FLOATS, torch.float64]),
    bias_dtype=st.sampled_from([None, torch.float32, torch.bfloat16]),
    nested=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(  # several panels either way, and a bias
    m=9, n=150, k=192, block=64, dtype=torch.float32, bias_dtype=torch.float32, nested=True, seed=3,
)  # fmt: skip
@example(
    m=33, n=37, k=320, block=32, dtype=torch.bfloat16, bias_dtype=torch.bfloat16, nested=False,
    seed=4,
)  # fmt: skip
def test_many_rows(
    make_weight: Callable[..., Weight4],
    as_accurate_as: Callable[..., None],
    m: int,
    n: int,
    k: int,
    block: int,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    nested: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight = make_weight(n, k, block, nested=nested, seed=seed)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    w = exact(weight)
    truth, size = x.double() @ w.t(), x.double().abs() @ w.t().abs()
    if bias is not None:
        truth, size = truth + bias.double(), size + bias.double().abs()
    y = cpu.multiply(x, weight, bias)
    as_accurate_as(y, matmul4_reference(x, weight, bias), truth, size)
    dx = cpu.multiply_dx(dy, weight)
    truth, size = dy.double() @ w, dy.double().abs() @ w.abs()
    as_accurate_as(dx, dx_reference(dy, weight), truth, size)


@pytest.mark.parametrize("isa", machine.available()[:1], indirect=True)
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_a_panel(
    make_weight: Callable[..., Weight4], dtype: torch.dtype, backward: bool, live_bytes: Any
) -> None:
    """Beside the result; the dense weight would be 8 MB in bfloat16."""
    weight = make_weight(1024, 4096)
    x = torch.randn(40, 1024 if backward else 4096).to(dtype)
    limit = cpu.PANEL_BYTES // 4
    with pytest.MonkeyPatch.context() as patch, live_bytes:
        patch.setattr(cpu, "PANEL_BYTES", limit)
        y = cpu.multiply_dx(x, weight) if backward else cpu.multiply(x, weight, None)
    assert limit / 2 < live_bytes.peak - y.nbytes <= 1.01 * limit
    assert live_bytes.peak < 0.3 * 1024 * 4096 * x.element_size()


@pytest.mark.parametrize("isa", machine.available()[:1], indirect=True)
@pytest.mark.usefixtures("isa")
def test_float64_is_never_multiplied_in_float32(make_weight: Callable[..., Weight4]) -> None:
    weight, x = make_weight(5, 64), torch.randn(1, 64, dtype=torch.float64)
    y = cpu.multiply(x, weight, None)
    w = exact(weight).float().double()  # W is rounded to float32, and nothing after it is
    terms = x.abs() @ w.abs().t()
    assert ((y - x @ w.t()).abs() <= 2 * 64 * torch.finfo(torch.float64).eps * terms).all()


# --- as an operator ------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
def test_the_property_test_for_operators(
    make_weight: Callable[..., Weight4], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KERNELS", "native")
    weight = make_weight(24, 160, 32, nested=True)

    def run(x: Tensor, bias: Tensor) -> Tensor:
        return matmul(x, weight, bias)

    def reference(x: Tensor, bias: Tensor) -> Tensor:
        return matmul4_reference(x, weight, bias)

    def arguments(m: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return torch.randn(m, 160).to(dtype), torch.randn(24)

    cases = st.builds(
        arguments, st.sampled_from([0, 1, 2, 5, 8, 9]), st.sampled_from(FLOATS), st.integers(0, 99)
    )
    check_operator(run, reference, inputs=cases, examples=12)


@pytest.mark.parametrize("isa", machine.available()[:1], indirect=True)
@pytest.mark.usefixtures("isa")
def test_few_rows_really_run_in_c(
    make_weight: Callable[..., Weight4], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise all of the above would pass on the definition."""
    called = []
    function = library.function

    def spy(name: str, *types: Any) -> Callable[..., None]:
        called.append(name)
        return function(name, *types)

    monkeypatch.setattr(library, "function", spy)
    monkeypatch.setenv("LORA_KERNELS", "auto")
    matmul(torch.randn(2, 4, 64), make_weight(3, 64))
    assert called == ["lora_matmul4"]
    called.clear()
    matmul(torch.randn(99, 64), make_weight(3, 64))
    assert called == ["lora_expand4"]


def test_a_bias_on_another_device(make_weight: Callable[..., Weight4]) -> None:
    with pytest.raises(ValueError, match="bias must be on the CPU, as x is; got meta"):
        cpu.multiply(torch.ones(1, 64), make_weight(4, 64), torch.ones(4, device="meta"))


@pytest.mark.parametrize("run", [cpu.multiply, cpu.multiply_dx])
def test_weights_that_c_would_read_beyond(
    make_weight: Callable[..., Weight4], run: Callable[..., Tensor]
) -> None:
    good, nested = make_weight(4, 64), make_weight(4, 64, nested=True)
    x = torch.ones(1, 64 if run is cpu.multiply else 4)
    more = (None,) if run is cpu.multiply else ()
    with pytest.raises(ValueError, match=r"ceil\(n / 2\) = 128 bytes for n = 256; got 127"):
        run(x, good._replace(codes=good.codes[1:]), *more)
    with pytest.raises(ValueError, match=r"= 4 entries for n = 256, block = 64; got 3"):
        run(x, good._replace(scales=good.scales[1:]), *more)
    with pytest.raises(ValueError, match=r"must be float32 \(16,\); got torch.float32 \(15,\)"):
        run(x, good._replace(table=NF4[1:]), *more)
    with pytest.raises(ValueError, match=r"scales of torch\.uint8 need nested="):
        run(x, nested._replace(scale_table=None), *more)
    with pytest.raises(ValueError, match="codes must be on the CPU, as x is; got meta"):
        run(x, good._replace(codes=good.codes.to("meta")), *more)
    for weight, name in ((good, "scales"), (nested, "scale_absmax"), (nested, "scale_offset")):
        moved = getattr(weight, name).to("meta")
        with pytest.raises(ValueError, match=r"scales must be on cpu with their codes.* got meta"):
            run(x, weight._replace(**{name: moved}), *more)
    with pytest.raises(TypeError, match=r"codes must be uint8, two a byte; got torch\.int64"):
        run(x, good._replace(codes=good.codes.long()), *more)
    with pytest.raises(ValueError, match=r"nested scales must be uint8; got torch\.float32"):
        run(x, nested._replace(scales=torch.ones(4)), *more)
    wrong = r"nested must be float32 \(1,\), \(\) and \(256,\) for 4 scales; got "
    for bad in (
        {"scale_absmax": torch.ones(2)},
        {"scale_table": torch.ones(255)},
        {"scale_offset": torch.ones((), dtype=torch.float64)},
    ):
        with pytest.raises(ValueError, match=wrong):
            run(x, nested._replace(**bad), *more)
