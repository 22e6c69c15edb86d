"""Who is timed: this project, each of its routes by itself, bitsandbytes, and 16-bit weights.

All read the same codes and scales, so that one float64 answer judges everybody. bitsandbytes gets
them as a state of its own with double quantization; "dense" is the weight rounded to 16 bits once,
which no 4-bit product can beat when there are many rows. LoRA beside a peer is written as PEFT
writes it: float32 matrices cast to the dtype of x at each call, two products and a sum.

A contender has a method for each task that it can do. What is timed here is what `check` has
checked: both call `Ours` and `Route`.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.problem import Lora, decoded
from lora_kernels.blockwise4 import Weight4

NESTED = 0.5 + 1 / 64 + 4 / 16384  # bytes a weight: codes, 8-bit scales, scales of scales
TASKS = ("expand", "quantize", "forward", "dx", "step", "lora", "mixed", "lora step")


class Contender:
    """One way to do the tasks; a method that is missing is a task it takes no part in."""

    name: str
    form: str
    """name of what is kept of a weight: contenders with the same share their copies"""
    bytes_per_weight: float = NESTED
    """its size"""
    families: dict[str, str] = {}  # noqa: RUF012
    """task to the check that it must have passed, for this project's own"""
    uncapturable: dict[str, str] = {}  # noqa: RUF012
    """task to why no CUDA graph can hold it; to try would end the process"""

    def hold(self, weight: Weight4) -> Any:
        """A weight in the form that is kept, or None if its shape does not allow it."""
        raise NotImplementedError

    def can(self, task: str) -> bool:
        """Whether it takes part in a task."""
        method = {"step": "forward", "mixed": "lora_rows", "lora step": "lora"}.get(task, task)
        return hasattr(self, method)


class Ours(Contender):
    """This project as a model calls it: the routes chosen by the number of rows."""

    name, form = "lora-core", "codes"
    families = {  # noqa: RUF012
        "expand": "expand",
        "quantize": "quantize",
        "forward": "multiply",
        "dx": "dx",
        "step": "multiply",
        "lora": "lora",
        "mixed": "mixed",
        "lora step": "lora",
    }

    def hold(self, weight: Weight4) -> Weight4:
        """Codes as stored."""
        return weight

    def quantize(self, w: Tensor, double_quant: bool = True) -> Weight4:
        """NF4, by default with double quantization; as a model is loaded, without a wait."""
        from lora_core.quant import quantize_4bit
        from lora_core.quant.double_quant import shared_map
        from lora_core.quant.nf4 import shared_table

        flag = torch.zeros(1, dtype=torch.int32, device=w.device)
        q = quantize_4bit(w, double_quant=double_quant, flag=flag)
        nested = (q.scale_absmax, q.scale_offset, shared_map(w.device) if double_quant else None)
        table = shared_table(q.code, w.device)
        return Weight4(q.packed, q.scales, table, *w.shape, 64, *nested)

    def expand(self, weight: Weight4, out: Tensor) -> Tensor:
        """W in the dtype of `out`."""
        from lora_kernels.blockwise4 import dequantize4

        codes, scales, table, block = weight.codes, weight.scales, weight.table, weight.block_size
        flat = out.view(-1)
        dequantize4(
            codes, scales, table, block, flat.numel(), out.dtype, nested=weight.nested, out=flat
        )
        return out

    def forward(self, weight: Weight4, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x Wᵀ + bias`, differentiable."""
        from lora_kernels import matmul4

        return matmul4(x, weight, bias)

    def dx(self, weight: Weight4, dy: Tensor) -> Tensor:
        """`dy W`, the operator that backward calls."""
        from lora_kernels.operands import flat

        return torch.ops.lora_kernels.matmul4_dx(dy, *flat(weight))

    def lora(self, weight: Weight4, x: Tensor, lora: Lora, bias: Tensor | None = None) -> Tensor:
        """`x Wᵀ + s (x Aᵀ) Bᵀ`, differentiable, by one adapter or each row's own."""
        from lora_kernels.lora_linear import lora_linear4

        return lora_linear4(x, weight, bias, lora.a, lora.b, lora.scaling, lora.rows)

    lora_rows = lora


class Route(Contender):
    """One of this project's routes, taken at any number of rows."""

    def __init__(self, way: str, arranged: bool = False) -> None:
        self.way, self.arranged = way, arranged
        self.name = f"lora-core {way}{' arranged' if arranged else ''}"
        self.form = "arranged" if arranged else "codes"
        self.bytes_per_weight = NESTED + 0.5 * arranged
        self.families = {"forward": way, "dx": f"dx {way}"}

    def can(self, task: str) -> bool:
        """A route multiplies, forward and (planes excepted) backward."""
        return task == "forward" or (task == "dx" and self.way != "planes" and not self.arranged)

    def hold(self, weight: Weight4) -> Weight4 | None:
        """Codes as stored, and the copy in tensor-core order if it is to be used."""
        from lora_kernels.gpu.arrange4 import arrange

        if not self.arranged:
            return weight
        copy = arrange(weight)
        return None if copy is None else weight._replace(arranged=copy)

    def forward(
        self,
        weight: Weight4,
        x: Tensor,
        bias: Tensor | None = None,
        fields: dict[str, int] | None = None,
    ) -> Tensor:
        """`x Wᵀ + bias`; `fields` changes the default tile."""
        from lora_kernels.gpu import matmul4, planes4, routes4

        if self.way == "dense":
            return routes4.dense_multiply(x, weight, bias)
        module = {"planes": planes4, "halves": matmul4}[self.way]
        size = (len(x), weight.out_features, weight.in_features, x.dtype)
        tile = replace(module.default_tile(*size), **(fields or {}))
        return module.multiply(x, weight, bias, None, tile)[0]

    def dx(self, weight: Weight4, dy: Tensor, fields: dict[str, int] | None = None) -> Tensor:
        """`dy W`."""
        from lora_kernels.gpu import matmul4_dx, routes4

        if self.way == "dense":
            return routes4.dense_dx(dy, weight)
        size = (len(dy), weight.out_features, weight.in_features, dy.dtype)
        tile = replace(matmul4_dx.default_dx_tile(*size), **(fields or {}))
        return matmul4_dx.multiply_dx(dy, weight, tile)


# the arranged copy is read on planes alone
ROUTES = (Route("planes"), Route("planes", arranged=True), Route("halves"), Route("dense"))


class Dense(Contender):
    """The weight in 16 bits and PyTorch's products."""

    name, form, bytes_per_weight = "dense", "dense", 2.0

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def hold(self, weight: Weight4) -> Tensor:
        """The decoded weight, rounded once."""
        return decoded(weight).to(self.dtype)

    def forward(self, w: Tensor, x: Tensor) -> Tensor:
        """`x Wᵀ`."""
        return torch.nn.functional.linear(x, w)

    def dx(self, w: Tensor, dy: Tensor) -> Tensor:
        """`dy W`."""
        return dy @ w

    def lora(self, w: Tensor, x: Tensor, lora: Lora) -> Tensor:
        """`x Wᵀ` and PEFT's update."""
        return _add_peft_lora(self.forward(w, x), x, lora)


class Bitsandbytes(Contender):
    """bitsandbytes' functions, as its layers call them."""

    name, form = "bitsandbytes", "bitsandbytes"
    uncapturable = {"quantize": "it launches on the default stream"}  # noqa: RUF012

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def hold(self, weight: Weight4) -> tuple[Tensor, Any]:
        """The same codes and scales under its own description."""
        from bitsandbytes.functional import QuantState

        if weight.nested is None:
            raise ValueError("bitsandbytes is compared with double quantization alone")
        absmax, offset, steps = weight.nested
        shape = torch.Size((weight.out_features, weight.in_features))
        state = QuantState(
            weight.scales,
            shape=shape,
            code=weight.table,
            blocksize=weight.block_size,
            quant_type="nf4",
            dtype=self.dtype,
            offset=offset,
            state2=QuantState(absmax, code=steps, blocksize=256, dtype=torch.float32),
        )
        return weight.codes.view(-1, 1), state

    def quantize(self, w: Tensor) -> Weight4:
        """NF4 with double quantization."""
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        nested = (state.state2.absmax, state.offset, state.state2.code)
        return Weight4(codes.view(-1), state.absmax, state.code, *w.shape, 64, *nested)

    def expand(self, held: tuple[Tensor, Any], out: Tensor) -> Tensor:
        """W in the dtype of `out`."""
        from bitsandbytes.functional import dequantize_4bit

        # on a CPU it takes no output, and nothing that it does there is a figure
        return dequantize_4bit(*held, out=out if out.is_cuda else None)

    def forward(self, held: tuple[Tensor, Any], x: Tensor) -> Tensor:
        """`x Wᵀ`, by its own choice of kernel."""
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, held[0], held[1])

    def dx(self, held: tuple[Tensor, Any], dy: Tensor) -> Tensor:
        """`dy W`, what its backward does."""
        from bitsandbytes.functional import dequantize_4bit

        return dy @ dequantize_4bit(*held)

    def lora(self, held: tuple[Tensor, Any], x: Tensor, lora: Lora) -> Tensor:
        """`x Wᵀ` and PEFT's update."""
        return _add_peft_lora(self.forward(held, x), x, lora)


def contenders(task: str, dtype: torch.dtype, routes: bool, peers: Collection[str]) -> list[Any]:
    """Whoever takes part in a task.

    Args:
        task: one of `TASKS`.
        dtype: of x.
        routes: each route of this project by itself, instead of the peers.
        peers: "bitsandbytes" where it can be imported.

    Returns:
        This project first.
    """
    everyone: list[Contender] = [Ours(), *ROUTES] if routes else [Ours(), Dense(dtype)]
    if "bitsandbytes" in peers and not routes:
        everyone.append(Bitsandbytes(dtype))
    return [one for one in everyone if one.can(task)]


def peers() -> tuple[list[str], str | None]:
    """The peers that can be imported, and a line on the one that cannot."""
    try:
        import bitsandbytes
    except Exception as error:  # noqa: BLE001  it fails in many ways where its library does not fit
        return [], f"bitsandbytes is not measured: {type(error).__name__}: {error}"
    return ["bitsandbytes"], f"bitsandbytes {bitsandbytes.__version__}"


def _add_peft_lora(y: Tensor, x: Tensor, lora: Lora) -> Tensor:
    low = torch.nn.functional.linear(x, lora.a[0].to(x.dtype))  # (M, r)
    up = torch.nn.functional.linear(low, lora.b[0].to(x.dtype))
    return y + up * lora.scaling[0].to(x.dtype)
