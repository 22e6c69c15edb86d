"""`check_quantizer` passes a right quantizer and fails each planted fault."""

import pytest
import torch

from lora_core.testing import check_quantizer

LEVELS = torch.tensor(
    [-1.0, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]
)


class Packed:
    """A 4-bit quantizer as a user might write it; faults override pieces of it."""

    levels = LEVELS
    stored = LEVELS

    def __init__(self, w, *, block_size, double_quant):
        if not bool(w.isfinite().all()):
            raise ValueError("the weight is not finite")
        self.shape, self.dtype, self.block = w.shape, w.dtype, block_size
        flat = w.float().flatten()
        self.n = flat.numel()
        count = -(-self.n // block_size)
        blocks = torch.zeros(count * block_size)
        blocks[: self.n] = flat
        blocks = blocks.view(count, block_size)
        self.absmax = self.scales(blocks)
        scaled = blocks * (1 / self.absmax.clamp(min=1e-38))[:, None]
        thresholds = (self.levels[1:] + self.levels[:-1]) / 2
        codes = torch.bucketize(scaled, thresholds).flatten().to(torch.uint8)
        self.packed = (codes[0::2] << 4) | codes[1::2]
        if double_quant:
            self.absmax = self.compress(self.absmax)

    def scales(self, blocks):
        return blocks.abs().amax(1)

    def compress(self, absmax):
        """Round to 8 bits about the mean, in groups of 256."""
        if not absmax.numel():
            return absmax
        mean = absmax.mean()
        out = []
        for group in (absmax - mean).split(256):
            step = group.abs().max() / 127
            out.append((group / step.clamp(min=1e-30)).round() * step + mean)
        return torch.cat(out)

    def unpack(self):
        return torch.stack((self.packed >> 4, self.packed & 15), dim=1).flatten()

    def dequantize(self):
        values = self.stored[self.unpack().long()].view(-1, self.block) * self.absmax[:, None]
        return values.flatten()[: self.n].view(self.shape).to(self.dtype)


class WrongEntry(Packed):
    """One of the sixteen levels is off in the fourth decimal."""

    stored = LEVELS.clone()
    stored[10] += 1e-4


class WrongThreshold(Packed):
    """One level is given to values nearer to its neighbour."""

    levels = LEVELS.clone()
    levels[10] += 0.02


class ScaleOff(Packed):
    def scales(self, blocks):
        return super().scales(blocks) * 1.001


class ScaleOfTheMean(Packed):
    def scales(self, blocks):
        return 2.5 * blocks.abs().mean(1)


class SwappedNibbles(Packed):
    def unpack(self):
        return torch.stack((self.packed & 15, self.packed >> 4), dim=1).flatten()


class LastBlock(Packed):
    """A partial last block borrows the scale of the block before."""

    def scales(self, blocks):
        absmax = super().scales(blocks)
        if absmax.numel() > 1 and self.n % self.block:
            absmax[-1] = absmax[-2]
        return absmax


class LastElement(Packed):
    """The odd element at the end is dropped."""

    def dequantize(self):
        out = super().dequantize()
        if self.n % 2:
            out.view(-1)[-1] = 0
        return out


class ZeroBlock(Packed):
    def scales(self, blocks):
        return super().scales(blocks).clamp(min=1e-3)

    stored = LEVELS.clone()
    stored[7] = 1e-30


class WrongDtype(Packed):
    def dequantize(self):
        return super().dequantize().float()


class WrongShape(Packed):
    def dequantize(self):
        return super().dequantize().flatten()


class NotContiguous(Packed):
    """Reads the storage, not the view."""

    def __init__(self, w, **options):
        super().__init__(w.as_strided(w.shape, torch.empty(w.shape).stride()), **options)


class SilentNaN(Packed):
    def __init__(self, w, **options):
        super().__init__(w.nan_to_num(0, 0, 0), **options)


class WritesInput(Packed):
    def __init__(self, w, **options):
        super().__init__(w, **options)
        if w.isfinite().all():
            w.mul_(0.5)


class Absolute(Packed):
    """Quantizes with a step that does not follow the block's scale."""

    def scales(self, blocks):
        return super().scales(blocks) + 1e-6


class DoubleQuantFlat(Packed):
    """Double quantization keeps 4 bits of each scale instead of 8."""

    def compress(self, absmax):
        if not absmax.numel():
            return absmax
        step = (absmax - absmax.mean()).abs().max() / 7
        return ((absmax - absmax.mean()) / step.clamp(min=1e-30)).round() * step + absmax.mean()


NEAREST = "the dequantized weight is .*; the nearest level is the most"
FAULTS = {
    WrongEntry: NEAREST,
    WrongThreshold: NEAREST,
    ScaleOff: NEAREST,
    ScaleOfTheMean: NEAREST,
    SwappedNibbles: NEAREST,
    LastBlock: NEAREST,
    LastElement: NEAREST,
    ZeroBlock: "a block of zeros|the dequantized weight",
    WrongDtype: "dequantize gave torch.float32 for a weight of torch.bfloat16",
    WrongShape: "dequantize gave shape",
    NotContiguous: "a non-contiguous weight gives another result",
    SilentNaN: "nan in the weight became 0.0 in silence",
    WritesInput: "quantize wrote into its input",
    Absolute: NEAREST,
    DoubleQuantFlat: NEAREST,
}


def test_a_right_quantizer_passes():
    check_quantizer(Packed, code=LEVELS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(fault):
    with pytest.raises(AssertionError, match=FAULTS[fault]) as caught:
        check_quantizer(fault, code=LEVELS)
    assert "smallest failing case: QuantizerCase(weight=Weight(shape=(" in str(caught.value)


def test_scaling_and_idempotence_see_what_the_bounds_allow():
    class Ratchet(Packed):
        """Within half a gap of the level, but never the same twice."""

        def dequantize(self):
            return super().dequantize() * (1 + 2.0**-23)

    with pytest.raises(AssertionError, match="quantizing the dequantized weight again changes it"):
        check_quantizer(Ratchet, code=LEVELS, dtypes=[torch.float32])

    class Offset(Packed):
        """Adds what is within the rounding of large weights only."""

        def scales(self, blocks):
            return super().scales(blocks) + torch.tensor(2.0**-27)

    with pytest.raises(AssertionError, match=r"the result for|the dequantized weight"):
        check_quantizer(Offset, code=LEVELS, dtypes=[torch.float32])


def test_a_table_must_be_ascending():
    with pytest.raises(ValueError, match=r"one-dimensional ascending table, got \[1.0, 0.0\]"):
        check_quantizer(Packed, code=torch.tensor([1.0, 0.0]))
