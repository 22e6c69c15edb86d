r"""How weights fill the 16 bins of a 4-bit code.

NF4 is made so that weights drawn from a normal distribution would use each code about equally; how
far real weights do is a question of counting. A weight is divided by the largest magnitude of its
block, as the quantizer does, and falls into the bin of the nearest level. Two facts keep the shares
from 1/16 even for perfectly normal weights: one weight of every block is its absmax and lands on an
end, and the levels are means of quantiles, so that their midpoints are not quantiles
(`lora_core.quant.bin_masses` has the exact shares).

The codes come from the quantizer itself, so that the bins are its bins to the last tie; a layer in
4 bits already is counted by the codes it holds. A model is read one layer at a time.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 and appendix E.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_core.adapters import dense_weight, is_linear
from lora_core.quant import Codebook, NF4Linear, quantize_4bit
from lora_core.targets import in_head, output_head_name, sites, unwrap

__all__ = ["WeightHistogram", "model_bins", "weight_bins"]

CELLS = 161  # of the fine histogram of w / absmax over [-1, 1]; odd: zero is the middle of one
_CHUNK = 1 << 20  # weights scaled at a time, a multiple of every block size


@dataclass(frozen=True)
class WeightHistogram:
    """Counts of block-normalised weights."""

    code: str
    """name of the code"""
    block_size: int
    """weights that share a scale"""
    levels: tuple[float, ...]
    """the code's values, ascending, each once"""
    counts: tuple[int, ...]
    """weights in the bin of each level"""
    fine: tuple[int, ...] | None
    """weights in each of `CELLS` equal cells over [-1, 1]; None where only codes are known"""
    layers: int
    """how many weights were read"""

    @property
    def total(self) -> int:
        """How many numbers were counted."""
        return sum(self.counts)

    @property
    def edges(self) -> tuple[float, ...]:
        """Where bins meet: midpoints of neighbouring levels."""
        pairs = zip(self.levels[:-1], self.levels[1:], strict=True)
        return tuple((a + b) / 2 for a, b in pairs)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of all weights, those in each bin; they sum to 1."""
        return tuple(count / self.total if self.total else 0.0 for count in self.counts)

    def __add__(self, other: "WeightHistogram") -> "WeightHistogram":
        """Both together: the fine counts only where both have them."""
        mine, theirs = (self.code, self.block_size), (other.code, other.block_size)
        if mine != theirs or self.levels != other.levels:
            raise ValueError(f"bins of {mine} and of {theirs} cannot be counted together")
        fine = None
        if self.fine is not None and other.fine is not None:
            fine = tuple(a + b for a, b in zip(self.fine, other.fine, strict=True))
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        layers = self.layers + other.layers
        return WeightHistogram(self.code, self.block_size, self.levels, counts, fine, layers)


@torch.no_grad()
def weight_bins(
    weight: "Tensor | nn.Module", code: str | Tensor = "nf4", block_size: int = 64
) -> WeightHistogram:
    """Count a weight by the bins of a code.

    Args:
        weight: a floating tensor of any shape, or a linear layer; an `NF4Linear` is counted by the
            codes it holds, in its own code and block size.
        code: as `quantize_4bit` takes it.
        block_size: weights that share a scale, a power of two from 32 to 4096.

    Returns:
        The counts.

    Raises:
        TypeError: no weight.
        ValueError: NaN or infinity in the weight, or a bad option.
    """
    if isinstance(weight, NF4Linear):
        numel = weight.in_features * weight.out_features
        book, packed, block_size, fine = weight.codebook, weight.codes, weight.block_size, None
    else:
        dense = weight if isinstance(weight, Tensor) else dense_weight(weight)
        quantized = quantize_4bit(dense, code, block_size, double_quant=False)
        numel, book, packed = dense.numel(), quantized.code, quantized.packed
        fine = _fine_counts(dense, quantized.absmax, block_size)
    held, levels = _code_counts(packed, numel), _levels(book)
    counts = tuple(sum(held[code] for code in codes) for codes in levels.values())
    return WeightHistogram(book.name, block_size, tuple(levels), counts, fine, 1)


def model_bins(
    model: nn.Module, code: str | Tensor = "nf4", block_size: int = 64
) -> WeightHistogram:
    """Count all linear weights of a model, one at a time, without adapters and output head.

    Args:
        model: a model, its layers dense or in 4 bits.
        code: for dense layers; layers in 4 bits must share one code and block size.
        block_size: for dense layers.

    Returns:
        The counts of all layers together. Where some layers are in 4 bits already, only those are
        counted, in their own code: the others were kept from quantization on purpose.

    Raises:
        ValueError: no linear layer, or layers of several codes.
    """
    found: WeightHistogram | None = None
    layers = list(_linears(model))
    packed = [layer for layer in layers if isinstance(layer, NF4Linear)]
    for layer in packed or layers:
        own = weight_bins(layer, code, block_size)
        found = own if found is None else found + own
    if found is None:
        raise ValueError("the model has no linear layer whose weights could be counted")
    return found


def _linears(model: nn.Module) -> Iterator[nn.Module]:
    """Linear layers, each once, without adapters and without the output head."""
    head = output_head_name(model)
    seen: set[int] = set()
    for name, site in sites(model):
        layer = unwrap(site)
        if is_linear(layer) and not in_head(name, head) and id(layer) not in seen:
            seen.add(id(layer))
            yield layer


def _code_counts(packed: Tensor, numel: int) -> list[int]:
    """How often each code is held: bytes are counted, then split, so nothing is expanded."""
    of_bytes = torch.bincount(packed.flatten(), minlength=256).view(16, 16)  # (high, low nibble)
    counts = of_bytes.sum(1) + of_bytes.sum(0)
    if numel % 2:  # the low nibble that is left over
        counts[int(packed.flatten()[-1]) & 15] -= 1
    return [int(count) for count in counts.tolist()]


def _levels(book: Codebook) -> dict[float, list[int]]:
    """The code's values, ascending, and the codes that stand for each (fp4 has two zeros)."""
    found: dict[float, list[int]] = {}
    for value, code in sorted((value, code) for code, value in enumerate(book.table().tolist())):
        found.setdefault(value, []).append(code)
    return found


def _fine_counts(weight: Tensor, absmax: Tensor, block_size: int) -> tuple[int, ...]:
    """Weights in equal cells over [-1, 1], a chunk of blocks at a time."""
    flat = weight.detach().flatten()
    counts = torch.zeros(CELLS, dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].float()
        first = start // block_size
        scales = absmax[first : first + -(-part.numel() // block_size)].clamp(min=1e-38)
        scaled = part / scales.repeat_interleave(block_size)[: part.numel()]
        cells = ((scaled + 1) * (CELLS / 2)).long().clamp(0, CELLS - 1)
        counts += torch.bincount(cells, minlength=CELLS)
    return tuple(int(count) for count in counts.tolist())
