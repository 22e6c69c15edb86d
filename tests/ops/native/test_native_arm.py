"""The C operators on an emulated 64-bit Arm against the definition: NEON, and plain C.

From the public function down to the call into C everything runs here as on any machine. Only that
call is made in the emulator: tensors whose addresses were read are copied there, each between pages
that do not exist, and back. The definition runs here.

How fast it is cannot be told. How many instructions a weight takes can, and may not grow.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lora_core.quant.codebook import codebook
from lora_core.quant.double_quant import dynamic_map
from lora_kernels import Weight4, matmul4
from lora_kernels.blockwise4 import dequantize4, encode_scales, expand4_slice, quantize4
from lora_kernels.cpu import machine, toolchain

pytestmark = pytest.mark.oracle
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BLOCKS = [32, 64, 128, 4096]
TARGETS = ["aarch64-macos", "x86_64-macos", "riscv64-linux-gnu", "powerpc64le-linux-gnu"]


def operators() -> list[Path]:
    """All C files but the threads, which the emulator has none of."""
    return sorted(f for f in toolchain.SOURCES.glob("*.c") if f.name != "pool.c")


@pytest.fixture(scope="module")
def image(bare_program: Callable[..., bytes]) -> Callable[[str], bytes]:
    return functools.cache(lambda isa: bare_program(operators(), *machine.FLAGS[isa]))


@pytest.fixture(scope="module")
def processor(image: Callable[[str], bytes], arm: Callable) -> Callable[[str], Any]:
    return functools.cache(lambda isa: arm(image(isa)))


@pytest.fixture(params=["neon", "portable"])
def defined(
    request: pytest.FixtureRequest,
    processor: Callable[[str], Any],
    run_on: Callable[[Any], None],
) -> Iterator[Callable[..., Any]]:
    """Have operators run on the processor; what is called through this, by the definition."""
    emulated = run_on(processor(request.param))

    def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LORA_KERNELS", "reference")
            return function(*args, **options)

    yield call
    assert emulated.called


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, except that a NaN is like any other."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    if not a.is_floating_point():
        return torch.equal(a, b)
    assert torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(0.125), b.nan_to_num(0.125)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(kind), b.view(kind))


def random_codes(numel: int, block: int, nested: bool) -> tuple[Tensor, Tensor, Any]:
    """Codes, scales and what decodes them."""
    blocks = -(-numel // block)
    codes = torch.randint(0, 256, ((numel + 1) // 2,), dtype=torch.uint8)
    if not nested:  # some whose products are subnormal in 16 bits, or too large
        scales = torch.randn(blocks).abs() * torch.logspace(-9, 6, 16)[torch.arange(blocks) % 16]
        return codes, scales, None
    q = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    return codes, q, (torch.rand(-(-blocks // 256)), torch.randn(()), dynamic_map())


def weight_of(n: int, k: int, block: int, nested: bool) -> Weight4:
    codes, scales, decoders = random_codes(n * k, block, nested)
    table = codebook("nf4").table()
    return Weight4(codes, scales, table, n, k, block, *(decoders or (None, None, None)))


@given(
    numel=st.integers(0, 9000),
    block=st.sampled_from(BLOCKS),
    dtype=st.sampled_from(FLOATS),
    code=st.sampled_from(["nf4", "fp4"]),
    shuffled=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(numel=4096 + 33, block=64, dtype=torch.bfloat16, code="nf4", shuffled=False, seed=0)
@example(numel=31, block=32, dtype=torch.float32, code="fp4", shuffled=True, seed=0)
def test_quantize(
    defined: Callable[..., Any],
    numel: int,
    block: int,
    dtype: torch.dtype,
    code: str,
    shuffled: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    table = codebook(code).table()  # fp4 is not ascending, and has 0 twice
    table = table[torch.randperm(16)] if shuffled else table
    x = torch.randn(numel, dtype=torch.float64).mul(2.0 ** torch.randint(-20, 12, (numel,)))
    x[::7] = 0
    x = x.to(dtype)
    assert all(map(same_bits, quantize4(x, table, block), defined(quantize4, x, table, block)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_ties_and_zeros(defined: Callable[..., Any], dtype: torch.dtype) -> None:
    """Quotients that are midpoints but for how they were rounded, in full and partial blocks."""
    table = torch.arange(16) / 15
    for top in range(1, 64):
        x = torch.arange(-31, 64).clamp(-top, top).to(dtype)
        assert all(map(same_bits, quantize4(x, table, 64), defined(quantize4, x, table, 64)))
    zeros = torch.zeros(64 + 33, dtype=dtype)
    assert all(map(same_bits, quantize4(zeros, table, 64), defined(quantize4, zeros, table, 64)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 99, 100])
def test_quantize_tells_what_is_not_finite(defined: Callable, bad: float, at: int) -> None:
    x, flag = torch.ones(101), torch.zeros(1, dtype=torch.int32)
    quantize4(x, codebook("nf4").table(), 32, flag=flag)
    assert flag.item() == 0
    x[at] = bad
    quantize4(x, codebook("nf4").table(), 32, flag=flag)
    assert flag.item() == 1


def test_quantize_rows_with_gaps(defined: Callable[..., Any]) -> None:
    x, table = torch.randn(70, 33, 2)[..., 0], codebook("nf4").table()
    ours, theirs = quantize4(x, table, 64), defined(quantize4, x, table, 64)
    assert all(map(same_bits, ours, theirs))


@given(
    numel=st.integers(0, 9000),
    block=st.sampled_from(BLOCKS),
    dtype=st.sampled_from(FLOATS),
    nested=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(numel=32 * 600 + 1, block=32, dtype=torch.float16, nested=True, seed=0)
@example(numel=4096 + 31, block=4096, dtype=torch.float64, nested=False, seed=0)
def test_expand(
    defined: Callable[..., Any], numel: int, block: int, dtype: torch.dtype, nested: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    codes, scales, decoders = random_codes(numel, block, nested)
    args = (codes, scales, codebook("nf4").table(), block, numel, dtype)
    assert same_bits(
        dequantize4(*args, nested=decoders), defined(dequantize4, *args, nested=decoders)
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
def test_expand_a_slice(defined: Callable[..., Any], dtype: torch.dtype, nested: bool) -> None:
    weight = weight_of(40, 320, 32, nested)  # blocks 240 to 260 have scales of two groups
    for box in (
        (2, 7, 64, 160),
        (24, 26, 0, 320),
        (24, 40, 96, 320),
        (39, 40, 288, 320),
        (3, 3, 0, 32),
    ):
        ours, theirs = (
            expand4_slice(weight, *box, dtype),
            defined(expand4_slice, weight, *box, dtype),
        )
        assert same_bits(ours, theirs)


@given(blocks=st.integers(1, 1200), size=st.integers(-30, 30), seed=st.integers(0, 2**31))
@example(blocks=256, size=0, seed=0)
@example(blocks=257, size=-126, seed=0)
def test_encode_scales(defined: Callable[..., Any], blocks: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    scales = torch.rand(blocks) * 2.0**size
    ours, theirs = (call(encode_scales, scales, dynamic_map()) for call in (_here, defined))
    assert all(map(same_bits, ours, theirs))


def _here(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


@given(
    m=st.integers(1, 9),
    n=st.integers(1, 40),
    blocks=st.integers(1, 9),
    block=st.sampled_from([32, 64, 256]),
    dtype=st.sampled_from(FLOATS),
    nested=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(1, 5, 300, 32, torch.bfloat16, True, True, 0)
@example(4, 9, 1, 4096, torch.float32, False, False, 0)
def test_few_rows_times_a_weight(
    defined: Callable[..., Any],
    as_accurate_as: Callable[..., None],
    m: int,
    n: int,
    blocks: int,
    block: int,
    dtype: torch.dtype,
    nested: bool,
    has_bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    k = blocks * block
    w = torch.randn(n, k)
    codes, scales = defined(quantize4, w, codebook("nf4").table(), block)
    decoders: tuple[Any, ...] = (None, None, None)
    if nested:
        scales, absmax, offset = defined(encode_scales, scales, dynamic_map())
        decoders = (absmax, offset, dynamic_map())
    weight = Weight4(codes, scales, codebook("nf4").table(), n, k, block, *decoders)
    dense = defined(expand4_slice, weight, 0, n, 0, k, torch.float32)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n) if has_bias else None
    ours = matmul4(x, weight, bias)
    theirs = F.linear(x, dense.to(dtype), None if bias is None else bias.to(dtype))
    truth = F.linear(x.double(), dense.double(), None if bias is None else bias.double())
    size = F.linear(
        x.double().abs(), dense.double().abs(), None if bias is None else bias.abs().double()
    )
    as_accurate_as(ours, theirs, truth, size)


# the systems of which no machine is at hand: what they lack of headers or types shows here
@pytest.mark.parametrize(
    ("target", "isa"),
    [
        ("aarch64-macos", "neon"),
        ("x86_64-macos", "avx2"),
        ("x86_64-linux-musl", "avx512"),
        ("riscv64-linux-gnu", "portable"),
        ("powerpc64le-linux-gnu", "portable"),
    ],
)
def test_it_compiles_for(
    target: str,
    isa: str,
    zig: Callable[..., None],
    strict_flags: tuple[str, ...],
    tmp_path: Path,
    full_run: bool,
) -> None:
    if not full_run and target != "aarch64-macos":
        pytest.skip("up to half a minute each: in the full run")
    for file in toolchain.SOURCES.glob("*.c"):
        flags = (*strict_flags, *machine.FLAGS[isa], "-O0")  # nothing runs: the sooner the better
        # of AltiVec's own vectors, which compared as integers once; here they are of 32-bit lanes
        flags += ("-Wno-deprecated-altivec-src-compat",) if "powerpc" in target else ()
        zig("cc", "-target", target, *flags, "-c", file, "-o", tmp_path / "operator.o")


def test_instructions_a_weight(
    image: Callable[[str], bytes], arm: Callable, run_on: Callable[[Any], Any]
) -> None:
    """One row of x: what another four rows of W cost, each of them a call's fixed price less."""
    emulated = run_on(arm(image("neon"), count=True))
    k, steps = 2048, []
    x = torch.randn(1, k, dtype=torch.bfloat16)
    for n in (4, 8):
        weight = weight_of(n, k, 64, True)
        before = emulated.processor.steps
        matmul4(x, weight)
        steps.append((emulated.processor.steps - before) / 2)  # each call is made twice
    assert (steps[1] - steps[0]) / (4 * k) < 2.1
