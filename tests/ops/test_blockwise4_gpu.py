"""The kernels that quantize and expand: bit-equal to the definition where rounding is at stake."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core.quant import quantize_4bit
from lora_core.quant.codebook import CODEBOOKS
from lora_core.quant.double_quant import dynamic_map
from lora_core.testing import check_quantizer
from lora_kernels import Weight4, dequantize4, encode_scales, expand4_slice, quantize4
from lora_kernels.gpu import blockwise4 as gpu

# the interpreter computes in numpy, which warns where IEEE arithmetic gives NaN or infinity
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

BLOCKS = [2**i for i in range(5, 13)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[Any, Any]]:
    """Run a function with the definition and with the kernels."""

    def run(function: Callable[[], Any]) -> tuple[Any, Any]:
        results = []
        for backend in ("reference", "triton"):
            monkeypatch.setenv("LORA_KERNELS", backend)
            results.append(function())
        return results[0], results[1]

    return run


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, the sign of zero included; any NaN is as good as another."""
    as_bits = (
        t.nan_to_num(0.0, torch.inf, -torch.inf).view(BITS[t.element_size()]) for t in (a, b)
    )
    return bool(torch.equal(a.isnan(), b.isnan()) and torch.equal(*as_bits))


def at_midpoints(table: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A block whose quotients lie on midpoints or next to one, after scaling and rounding."""
    values = table.sort().values
    middle = (values[:-1] + values[1:]) / 2
    near = torch.cat([middle, *(middle.nextafter(torch.tensor(v)) for v in (-9.0, 9.0))])
    index = torch.randint(0, len(near), (count,), generator=generator)
    block = near[index] * torch.rand((), generator=generator).mul(2).add(0.1)
    return block.clamp(-1, 1)


SPECIAL = torch.tensor(
    [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1.1754942e-38, 6e-8, 1.0, -1.0, 3e4, -3e4]
)


def difficult(kind: str, n: int, table: Tensor, seed: int) -> Tensor:
    """float32 values where a rounding decides."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "midpoints":
        return at_midpoints(table, n, generator)
    if kind == "special":
        return SPECIAL[torch.randint(0, len(SPECIAL), (n,), generator=generator)]
    scale = {"subnormal": 1e-40, "huge": 8e37, "normal": 1.0, "float16's end": 2e4}[kind]
    x = torch.randn(n, generator=generator).clamp(-4, 4) * scale  # finite, however rare the draw
    x[torch.rand(n, generator=generator) < 0.2] = 0
    x[n // 3 : n // 2] = 0  # whole blocks, if they are small
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind", ["midpoints", "special", "subnormal", "huge", "normal", "float16's end"]
)
@settings(max_examples=max(4, settings.default.max_examples // 4))
@given(
    n=st.integers(0, 5000),
    block=st.sampled_from(BLOCKS),
    name=st.sampled_from([*CODEBOOKS, "custom"]),
    nested=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_there_and_back_is_the_definition_bit_for_bit(
    both: Callable[..., Any],
    n: int,
    dtype: torch.dtype,
    block: int,
    name: str,
    kind: str,
    nested: bool,
    seed: int,
) -> None:
    table = torch.rand(16, generator=torch.Generator().manual_seed(seed)) * 2.2 - 1.1
    table = table if name == "custom" else CODEBOOKS[name].table()
    x = difficult(kind, n, table, seed).to(dtype)
    x = x.nan_to_num(0.0, 6e4, -6e4) if dtype == torch.float16 else x

    wanted, got = both(lambda: quantize4(x, table, block))
    assert torch.equal(got[0], wanted[0])
    assert same_bits(got[1], wanted[1])

    codes, scales = wanted
    how: dict[str, Any] = {}
    if nested:
        scales, *rest = encode_scales(scales / 1024, dynamic_map())
        how["nested"] = (*rest, dynamic_map())
    wanted, got = both(lambda: dequantize4(codes, scales, table, block, n, dtype, **how))
    assert same_bits(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_every_byte_times_every_kind_of_scale(
    both: Callable[..., Any], dtype: torch.dtype, nested: bool
) -> None:
    """All 256 bytes under scales of any magnitude or sign, none among them."""
    scales = torch.logspace(-46, 39, 341, dtype=torch.float64).float() * torch.rand(341).add(0.5)
    # times the code 1 halfway between two numbers of a 16-bit format, the even one on either side
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 9.2e-41 / 2])
    rare = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    scales = torch.cat((scales, -scales, ties, rare))
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(scales))
    how: dict[str, Any] = {}
    stored = scales.repeat_interleave(8)  # 8 blocks of 64 hold the 256 bytes
    if nested:  # each of the 256 entries, whatever the group's scale is
        stored = torch.arange(256).repeat(len(stored) // 256 + 1)[: len(stored)].to(torch.uint8)
        absmax = scales[torch.randint(0, len(scales), (-(-len(stored) // 256),))]
        how["nested"] = (absmax, torch.tensor(1e-3), dynamic_map())
    table = CODEBOOKS["nf4"].table()
    wanted, got = both(lambda: dequantize4(codes, stored, table, 64, 2 * len(codes), dtype, **how))
    assert same_bits(got, wanted)


@pytest.mark.parametrize("shift", [1, 2, 3, 4, 8])
def test_codes_that_begin_anywhere(
    both: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    """A 32-bit load needs an address that is a multiple of 4; other codes are read by bytes.

    Processors bear such loads and GPUs do not, so the form chosen is looked at too.
    """
    bytewise: list[bool] = []
    constants = gpu._expand_constants
    monkeypatch.setattr(
        gpu, "_expand_constants", lambda *args: bytewise.append(args[-1]) or constants(*args)
    )
    memory = torch.randint(0, 256, (64 * 64 + shift,), dtype=torch.uint8)
    scales, table = torch.rand(128), CODEBOOKS["nf4"].table()
    codes = memory[shift:]
    wanted, got = both(lambda: dequantize4(codes, scales, table, 64, 8192))
    assert torch.equal(got, wanted)
    w = Weight4(codes, scales, table, 16, 512, 64)
    wanted, got = both(lambda: expand4_slice(w, 3, 16, 64, 512, torch.bfloat16))
    assert torch.equal(got, wanted)
    assert bytewise == [shift % 4 != 0] * 2


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("n", [1, 63, 64, 8191, 8192, 8193, 20001])
def test_every_element_is_written_and_no_other(both: Callable[..., Any], n: int) -> None:
    x = torch.randn(n)
    table = CODEBOOKS["fp4"].table()
    wanted, got = both(lambda: quantize4(x, table, 64))
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    memory = torch.full((n + 16,), torch.nan)
    _, got = both(lambda: dequantize4(*wanted, table, 64, n, out=memory[8 : n + 8]).clone())
    assert got.isfinite().all()
    assert memory[:8].isnan().all()
    assert memory[n + 8 :].isnan().all()


def test_more_rows_than_a_grid_has(both: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "MOST_ROWS", 2)
    q = quantize_4bit(torch.randn(300, 1024), double_quant=True)
    nested = (q.scale_absmax, q.scale_offset, dynamic_map())
    w = Weight4(q.packed, q.scales, q.code.table(), 300, 1024, 64, *nested)
    for box in ((1, 299, 64, 256), (0, 300, 0, 1024)):
        wanted, got = both(lambda box=box: expand4_slice(w, *box, torch.bfloat16))
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("shape", [(2**16 + 8, 2**16), (2**25 + 1, 128)])
def test_offsets_beyond_32_bits(both: Callable[..., Any], shape: tuple[int, int]) -> None:
    """The last rows of a weight of more than 2^32 elements, whose memory is not even touched.

    Codes, scales and elements all lie further than 2^31 from where their tensors begin.
    """
    n, k = shape
    codes = torch.empty(n * k // 2, dtype=torch.uint8)
    scales = torch.empty(n * k // 32)
    table = CODEBOOKS["nf4"].table()
    codes[-512 * 64 :] = torch.randint(0, 256, (512 * 64,), dtype=torch.uint8)
    scales[-2048:] = torch.rand(2048)
    w = Weight4(codes, scales, table, n, k, 32)
    wanted, got = both(lambda: expand4_slice(w, n - 1, n, k - 128, k, torch.float32))
    assert torch.equal(got, wanted)
    assert got.abs().sum() > 0


@pytest.mark.parametrize("stride", [1 << 10, 1 << 20, 1 << 24, 1 << 26])
def test_a_tile_spans_less_than_32_bits_count(stride: int) -> None:
    """Offsets inside a tile are 32 bits wide, however long the rows are that it is cut from."""
    part = gpu._Slice(0, 4096, 1, stride)
    rows = gpu._expand_constants(32, part, True, False)["ROWS"]
    assert rows == 1 or rows * stride * 32 < 1 << 31
    assert rows > 1 or stride >= 1 << 24


class Reads(TorchDispatchMode):
    """Counts what makes the host wait: values read, and results whose size depends on values."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "item",
        "equal",
        "is_nonzero",
        "unique",
        "masked_se",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.__name__.startswith(self.WAITING):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("double_quant", [False, True])
def test_nothing_is_read_but_the_flag(monkeypatch: pytest.MonkeyPatch, double_quant: bool) -> None:
    monkeypatch.setenv("LORA_KERNELS", "triton")
    w, flag = torch.randn(40, 64), torch.zeros(1, dtype=torch.int32)
    quantize_4bit(w, double_quant=double_quant)  # tables are placed
    with Reads() as reads:
        q = quantize_4bit(w, double_quant=double_quant, flag=flag)
        q.dequantize()
        quantize_4bit(w, double_quant=double_quant, check_finite=False)
    assert reads.found == []
    with Reads() as reads:
        quantize_4bit(w, double_quant=double_quant)
    assert len(reads.found) == 1 + double_quant  # all values, and the mean of the scales


@pytest.mark.parametrize("code", ["nf4", "fp4", "int4"])
def test_the_properties_of_a_quantizer(
    monkeypatch: pytest.MonkeyPatch, code: str, full_run: bool
) -> None:
    monkeypatch.setenv("LORA_KERNELS", "triton")
    check_quantizer(
        lambda w, **options: quantize_4bit(w, code, **options),
        code=code,
        examples=100 if full_run else 6,
    )


COMPILE = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
import triton
from lora_kernels.gpu import blockwise4, quantize4

launched, found = [], {}
target = GPUTarget("cuda", 90, 32)

class Recorder:
    '''Stands for a kernel, and notes the types that a launch would compile it for.'''
    def __init__(self, kernel):
        self.bind = create_function_from_signature(
            kernel.signature, kernel.params, make_backend(target)
        )
    def __getitem__(self, grid):
        return self
    def __call__(self, *args, num_warps, enable_fp_fusion, **constants):
        params, types, _ = self.bind(*args, **constants)
        names = list(params)
        assert not any(known for type_, known in types if type_ == "i64"), types
        launched.append({n: t[0] for n, t in zip(names, types)} | {"warps": num_warps}
                        | {"fusion": enable_fp_fusion} | {"constants": constants})

variants = {v.name: v for v in blockwise4.variants() + quantize4.variants()}
blockwise4._expand_kernel = Recorder(blockwise4._expand_kernel)
quantize4._kernel = Recorder(quantize4._kernel)
codes, scales, table = torch.zeros(32, dtype=torch.uint8), torch.ones(1), torch.zeros(16)
blockwise4.expand(codes, scales, None, table, 64, torch.zeros(64, dtype=torch.bfloat16))
quantize4.quantize(torch.ones(64).bfloat16(), table, table.int(), 64, 1e-38, torch.zeros(1).int())
for name in ("expand4/bf16/64/float32 scales", "quantize4/bf16/64"):
    v = variants[name]
    launch = launched.pop(0)
    assert launch.pop("warps") == v.warps, (launch, v)
    assert launch.pop("fusion") == v.fp_fusion is False
    assert launch.pop("constants") == v.constants, (launch, v)
    assert launch == v.signature, (launch, v)
    source = ASTSource(fn=v.kernel, signature=v.signature, constexprs=v.constants)
    found[name] = triton.compile(source, target=target).asm["ttir"]
print(json.dumps(found))
"""


def test_what_is_launched_is_what_the_gate_compiles_and_counts_in_64_bits() -> None:
    """In a process without the interpreter: the launchers' types and constants are the variants',
    and every pointer to something large moves by a 64-bit offset first."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=clean, check=False
    )
    assert run.returncode == 0, run.stderr
    for name, ttir in json.loads(run.stdout).items():
        large = ("x_ptr", "codes_ptr", "scales_ptr", "out_ptr")
        for pointer in (p for p in large if f"%{p}" in ttir):
            moves = [line for line in ttir.splitlines() if f"tt.addptr %{pointer}," in line]
            splats = [line for line in ttir.splitlines() if f"tt.splat %{pointer} " in line]
            assert moves or splats, (name, pointer)
            assert all(", i64" in line for line in moves), (name, pointer, moves)
