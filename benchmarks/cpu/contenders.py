"""Who is timed on a CPU: this project's instruction sets, bitsandbytes' two layouts, PyTorch.

All 4-bit contenders but one read the same codes and scales, so that one float64 answer judges them.
What each row of the tables is:

* `lora-core avx512`, `avx2`, `neon`, `portable`: `LORA_KERNELS=native` with `LORA_KERNELS_ISA`.
* `lora-core reference`: `LORA_KERNELS=reference`, plain PyTorch.
* `bitsandbytes`: the layout in which its layers train and are saved. `matmul_4bit` decodes
  the scales (`dequantize_blockwise`, C), expands the whole weight (`dequantize_4bit`, C) and calls
  `F.linear`; backward decodes and expands again.
* `bitsandbytes in C`: the C function behind `dequantize_4bit`, writing where it is told to. From
  Python it always writes to new memory.
* `bitsandbytes packed`: what its `Linear4bit` repacks itself into at its first evaluation, on CPUs
  with AVX512-BF16 only, for N a multiple of 32: tiles of 32 rows, scales rounded to bfloat16, no
  double quantization, bfloat16 only, no backward. `matmul_4bit` then calls `gemv_4bit`, whose C
  takes any number of rows of x.
* `dense bf16`, `dense f32`: the decoded weight, `F.linear` and `@`.
* `torch int4`: `aten::_weight_int4pack_mm_for_cpu`, 16 evenly spaced levels and a zero point for
  each 64 weights. It cannot hold NF4, so it has weights of its own and is judged by those.

A contender has a method for each task that it takes part in. `roundings` says how often it rounds a
weight to bfloat16, which sets the bound of its check.
"""

import ctypes
import functools
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import contenders as on_any_device
from benchmarks.gpu.problem import decoded
from lora_kernels import Weight4, backend_for

ISAS = ("avx512", "avx2", "neon", "portable")  # the best first
REFERENCE = "reference"
BF16 = torch.bfloat16
GROUP = 64  # weights that share a scale in `torch int4`, as in NF4
# seconds at large shapes; for reading only. Tensors are hashed by identity, so that one weight has
# one entry, which the next weight replaces
decoded_once = functools.lru_cache(maxsize=1)(decoded)


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Some environment variables for a while; the library reads its own at each call."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Ours(on_any_device.Ours):
    """This project with one instruction set, or with plain PyTorch."""

    roundings = 1
    variables: dict[str, str]

    def __init__(self, isa: str) -> None:
        self.name, self.isa = f"lora-core {isa}", isa
        self.variables = {"LORA_KERNELS": "native", "LORA_KERNELS_ISA": isa}
        if isa == REFERENCE:
            self.variables = {"LORA_KERNELS": REFERENCE}

    def expand(self, weight: Weight4, out: Tensor | None = None) -> Tensor:
        """W in bfloat16, in new memory unless `out` is given."""
        if out is None:
            out = torch.empty(weight.out_features, weight.in_features, dtype=BF16)
        return super().expand(weight, out)

    def expand_kept(self, weight: Weight4, out: Tensor) -> Tensor:
        """W in bfloat16, into memory that is kept from call to call."""
        return self.expand(weight, out)


class Bitsandbytes(on_any_device.Bitsandbytes):
    """The training layout through bitsandbytes' Python functions."""

    roundings = 1
    variables: dict[str, str] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(BF16)

    def expand(self, held: tuple[Tensor, Any]) -> Tensor:
        """W in bfloat16, in new memory: it has no other way on a CPU."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*held)


class BitsandbytesInC:
    """The C function of the training layout, without the new memory of each call."""

    name, form, roundings = "bitsandbytes in C", "bitsandbytes", 1
    bytes_per_weight = on_any_device.NESTED
    variables: dict[str, str] = {}  # noqa: RUF012

    def hold(self, weight: Weight4) -> tuple[Tensor, Any]:
        """As `Bitsandbytes`."""
        return Bitsandbytes().hold(weight)

    def expand_kept(self, held: tuple[Tensor, Any], out: Tensor) -> Tensor:
        """W in bfloat16, into memory that is kept; the scales are decoded by its Python."""
        from bitsandbytes.cextension import lib
        from bitsandbytes.functional import dequantize_blockwise, get_ptr

        codes, state = held
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
        sizes = (ctypes.c_longlong(size) for size in (state.blocksize, *state.shape))
        run = lib.cdequantize_blockwise_cpu_nf4_bf16
        run(get_ptr(codes), get_ptr(scales), get_ptr(out), *sizes)
        return out


class BitsandbytesPacked:
    """The layout for evaluation."""

    name, form, roundings = "bitsandbytes packed", "packed", 3  # table, scale, their product
    bytes_per_weight = 0.5 + 2 / 64  # codes, bfloat16 scales
    variables: dict[str, str] = {}  # noqa: RUF012

    def hold(self, weight: Weight4) -> tuple[Tensor, Any] | None:
        """Repacked as `Linear4bit` does it; None if no tile of 32 rows and 64 columns divides W."""
        from bitsandbytes.functional import _convert_weight_packed_for_cpu

        if weight.out_features % 32 or weight.in_features % 64:
            return None
        return _convert_weight_packed_for_cpu(*Bitsandbytes().hold(weight))

    def forward(self, held: tuple[Tensor, Any], x: Tensor) -> Tensor:
        """`x Wᵀ`."""
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, *held)


class Dense:
    """The decoded weight in one dtype and PyTorch's products."""

    form: str
    variables: dict[str, str] = {}  # noqa: RUF012
    roundings = 1

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.bytes_per_weight = dtype, float(dtype.itemsize)
        self.name = self.form = "dense bf16" if dtype == BF16 else "dense f32"

    def hold(self, weight: Weight4) -> Tensor:
        """The decoded weight, rounded once."""
        return decoded_once(weight).to(self.dtype)

    def prepare(self, x: Tensor) -> Tensor:
        """The input in the dtype of the weight, before the clock starts."""
        return x.to(self.dtype)

    def forward(self, w: Tensor, x: Tensor) -> Tensor:
        """`x Wᵀ`."""
        return torch.nn.functional.linear(x, w)

    def dx(self, w: Tensor, dy: Tensor) -> Tensor:
        """`dy W`."""
        return dy @ w


class TorchInt4:
    """PyTorch's own 4-bit product, of uniformly quantized weights."""

    name, form, roundings = "torch int4", "int4", 2  # scale and zero point are bfloat16 already
    bytes_per_weight = 0.5 + 4 / GROUP
    variables: dict[str, str] = {}  # noqa: RUF012

    def quantize_uniform(self, weight: Weight4) -> tuple[Tensor, Tensor, Tensor]:
        """Levels of (smallest, largest) of each group of 64.

        Returns:
            Levels int32 (N, K) from 0 to 15; scale and zero point bfloat16 (N, K / 64) each:
            `w = (level - 8) scale + zero`.
        """
        n, k = weight.out_features, weight.in_features
        groups = decoded_once(weight).view(n, k // GROUP, GROUP)
        low, high = groups.amin(2), groups.amax(2)
        scale = ((high - low).clamp(min=1e-6) / 15).to(BF16)
        zero = (low + 8 * scale.float()).to(BF16)
        levels = (groups - zero.float()[..., None]) / scale.float()[..., None] + 8
        return levels.round_().clamp_(0, 15).to(torch.int32).view(n, k), scale, zero

    def hold(self, weight: Weight4) -> tuple[Tensor, Tensor] | None:
        """Packed levels and (K / 64, N, 2) of scale and zero; None if no tile divides W."""
        if weight.out_features % 16 or weight.in_features % GROUP:
            return None
        levels, scale, zero = self.quantize_uniform(weight)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        return packed, torch.stack((scale.t(), zero.t()), 2).contiguous()

    def own_weight(self, weight: Weight4) -> Tensor:
        """The weight that it multiplies by, float32 (N, K)."""
        levels, scale, zero = self.quantize_uniform(weight)
        n, k = levels.shape
        groups = (levels.view(n, k // GROUP, GROUP) - 8).float()
        return groups.mul_(scale.float()[..., None]).add_(zero.float()[..., None]).view(n, k)

    def forward(self, held: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        """`x Wᵀ`."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, held[0], GROUP, held[1])


def everyone() -> tuple[list[Any], list[str]]:
    """Whoever can take part on this machine, ours first and the best of ours at the front.

    Returns:
        The contenders, and a line for each that cannot, with the reason.
    """
    found: list[Any] = []
    absent: list[str] = []
    for isa in (*ISAS, REFERENCE):
        one = Ours(isa)
        why = _why_not(one)
        if why is None:
            found.append(one)
        else:
            absent.append(f"{one.name} is not measured: {why}")
    peers, lines = _bitsandbytes()
    found += [*peers, Dense(BF16), Dense(torch.float32)]
    if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        found.append(TorchInt4())
    else:
        lines.append("torch int4 is not measured: this PyTorch has no such operator for CPUs")
    return found, absent + lines


def _why_not(one: Ours) -> str | None:
    with environment(one.variables):
        try:
            backend_for(torch.empty(0), (REFERENCE, "native"))
        except ValueError as error:
            return str(error)
    return None


def _bitsandbytes() -> tuple[list[Any], list[str]]:
    # its CPU backend would ask a model hub for another kernel, and says so when it cannot
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from bitsandbytes.functional import has_avx512bf16
    except Exception as error:  # noqa: BLE001  it fails in many ways where its library does not fit
        return [], [f"bitsandbytes is not measured: {type(error).__name__}: {error}"]
    if has_avx512bf16():
        return [Bitsandbytes(), BitsandbytesInC(), BitsandbytesPacked()], []
    line = "bitsandbytes packed is not measured: bitsandbytes repacks with AVX512-BF16 alone"
    return [Bitsandbytes(), BitsandbytesInC()], [line]
