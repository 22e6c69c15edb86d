"""A 4-bit tensor as a plain object, and the functions that make one.

`NF4Tensor` is no subclass of `torch.Tensor`: it holds codes and scales, says how large it is, and
turns back into a dense tensor when told to. What multiplies by it is `NF4Linear`.

Bits a parameter at block size 64: 4 for the code, 32/64 = 0.5 for the scale; with double
quantization 8/64 + 32/(64·256) = 0.127 instead of the 0.5.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_core.quant.codebook import Codebook, codebook
from lora_core.quant.double_quant import encode_scales, shared_map
from lora_kernels.blockwise4 import decode_scales, dequantize4, quantize4

__all__ = ["NF4Tensor", "quantize_4bit", "quantize_nf4", "shared_table"]

_placed: dict[tuple[Codebook, torch.device], Tensor] = {}


@dataclass(frozen=True, eq=False)
class NF4Tensor:
    """Codes and scales of one tensor; make it with `quantize_4bit`."""

    packed: Tensor
    """uint8 (ceil(n / 2),), two codes a byte, the first in the high nibble"""
    scales: Tensor
    """float32 (blocks,), or uint8 (blocks,) under double quantization"""
    shape: torch.Size
    """of the tensor that was quantized"""
    dtype: torch.dtype
    """of the tensor that was quantized; what `dequantize` returns"""
    code: Codebook
    """the table of 16 values"""
    block_size: int
    """elements that share a scale"""
    scale_absmax: Tensor | None = None
    """float32 (ceil(blocks / 256),) under double quantization"""
    scale_offset: Tensor | None = None
    """float32 () under double quantization"""

    @property
    def double_quant(self) -> bool:
        """Whether the scales are kept in 8 bits."""
        return self.scale_absmax is not None

    @property
    def absmax(self) -> Tensor:
        """The decoded scales, float32 (blocks,)."""
        if not self.double_quant:
            return self.scales
        return decode_scales(self.scales, *(self._nested or ()))

    @property
    def _nested(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """What decodes the scales under double quantization."""
        if self.scale_absmax is None or self.scale_offset is None:
            return None
        return self.scale_absmax, self.scale_offset, shared_map(self.scales.device)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, nested scales and offset; tables are shared and not counted."""
        tensors = (self.packed, self.scales, self.scale_absmax, self.scale_offset)
        return sum(t.nbytes for t in tensors if t is not None)

    @property
    def bits_per_param(self) -> float:
        """Bits an element; 0 for an empty tensor."""
        numel = self.shape.numel()
        return 8 * self.nbytes / numel if numel else 0.0

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """Expand to a dense tensor.

        Args:
            dtype: of the result; default that of the tensor that was quantized. The float32 product
                of table entry and scale is rounded to it once.
            out: contiguous, as many elements of that dtype: written, and a view of it is returned.

        Returns:
            A tensor of `shape`.

        Raises:
            ValueError: an `out` of another kind.
        """
        flat = dequantize4(
            self.packed,
            self.scales,
            shared_table(self.code, self.packed.device),
            self.block_size,
            self.shape.numel(),
            dtype or self.dtype,
            nested=self._nested,
            out=out,
        )
        return flat.view(self.shape)

    def rows(self, start: int, stop: int) -> "NF4Tensor":
        """Take rows `start … stop` of a matrix whose rows are whole blocks, without copying codes.

        Nested scales are decoded first: a group of 256 need not end where a row does.

        Args:
            start: first row.
            stop: one past the last.

        Returns:
            A 4-bit tensor of its own, with float32 scales.

        Raises:
            ValueError: rows that are not whole blocks, or a range outside the matrix.
        """
        if len(self.shape) != 2 or self.shape[1] % self.block_size:
            raise ValueError(
                f"rows can be taken of a matrix whose row length is a multiple of the block "
                f"({self.block_size}); this is {tuple(self.shape)}"
            )
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows {start} to {stop} are not within 0 to {self.shape[0]}")
        k = self.shape[1]
        blocks = k // self.block_size
        return replace(
            self,
            packed=self.packed[start * k // 2 : stop * k // 2],
            scales=self.absmax[start * blocks : stop * blocks],
            shape=torch.Size((stop - start, k)),
            scale_absmax=None,
            scale_offset=None,
        )

    def to(self, device: torch.device | str) -> "NF4Tensor":
        """Copy to a device; codes and scales stay bit-equal."""
        return replace(
            self,
            packed=self.packed.to(device),
            scales=self.scales.to(device),
            scale_absmax=None if self.scale_absmax is None else self.scale_absmax.to(device),
            scale_offset=None if self.scale_offset is None else self.scale_offset.to(device),
        )


def quantize_4bit(
    w: Tensor,
    code: str | Tensor | Codebook = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    name: str = "w",
    check_finite: bool = True,
    flag: Tensor | None = None,
) -> NF4Tensor:
    """Quantize to 4 bits: `code_i = argmin_c |w_i / absmax_b - table_c|` in blocks of `block_size`.

    Args:
        w: any shape and layout; float16, bfloat16, float32, or float64 (rounded to float32 first).
        code: "nf4", "fp4", "fp4_e3m0", "int4", or 16 ascending numbers as a float tensor.
        block_size: elements that share a scale, a power of two from 32 to 4096.
        double_quant: keep the scales in 8 bits.
        name: what `w` is called in messages.
        check_finite: wait for the result and refuse what is not finite.
        flag: int32 (1,) on the device of `w`, set to 1 by what would be refused; then nothing is
            waited for and `check_finite` has no say.

    Returns:
        The 4-bit tensor, on the device of `w`.

    Raises:
        TypeError: `w` is not floating-point, or a code of another type.
        ValueError: NaN or infinity in `w`, or a bad option.

    Ref: QLoRA, arXiv:2305.14314, equations 1 and 5.
    """
    book = codebook(code)
    told: dict[str, Any] = {"check_finite": check_finite, "flag": flag}
    packed, scales = quantize4(w, shared_table(book, w.device), block_size, name, **told)
    absmax = offset = None
    if double_quant:
        scales, absmax, offset = encode_scales(scales, **told)
    return NF4Tensor(packed, scales, w.shape, w.dtype, book, block_size, absmax, offset)


def quantize_nf4(w: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Tensor:
    """Quantize to NF4; `quantize_4bit` with `code="nf4"`.

    Args:
        w: any shape and layout, floating-point.
        block_size: elements that share a scale, a power of two from 32 to 4096.
        double_quant: keep the scales in 8 bits.

    Returns:
        The 4-bit tensor.
    """
    return quantize_4bit(w, "nf4", block_size, double_quant)


def shared_table(code: Codebook, device: torch.device) -> Tensor:
    """The table on a device, copied there once (a copy would wait for it): for reading only."""
    found = _placed.get((code, device))
    if found is None:
        with torch.inference_mode(False):  # or training could not use what evaluation placed
            found = code.table(device)
        if type(found) is Tensor:  # not a fake one, while a compiler traces
            _placed[code, device] = found
    return found
