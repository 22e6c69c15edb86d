"""The 16 bins of NF4 are said to hold equally many normal weights; they do not.

The paper builds NF4 from quantiles so that "each quantization bin has an equal number of values
assigned from the input tensor" (section 2, of quantile quantization). Two things stand between the
quantiles and the bins. The table's values are means of neighbouring quantiles, but a weight goes to
the nearest value, and the borders halfway between the values are no quantiles. And a block is
divided by its largest magnitude, so that within a block nothing is normal with a fixed spread: one
of the 64 is ±1 by construction, and the outermost bins hold little else.

The shares of independent normal weights are computed (`lora_core.quant.bin_masses`), the shares of
the base's weights counted. "Equal" is taken to mean: the fullest bin holds no more than `MARGIN`
more than the emptiest, relative to 1/16. A chi-square on millions of weights would reject any
table, so the interval is of the size of the difference, not of its existence; chi-square is among
the figures.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.papers.claim import Check, Claim, Finding, Settings
from lora_core.checkpoint import load_model
from lora_core.evaluate.estimate import Estimate, bootstrap
from lora_core.quant import bin_masses, nf4_values, quantize_nf4

BLOCK = 64
MARGIN = 0.1
PICTURE = "images/nf4-bins.png"


def layer_counts(settings: Settings) -> np.ndarray:
    """How many weights of each layer of the base have each code, (layers, 16)."""
    model = load_model(settings.model, dtype=torch.float32)
    counts = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "head" not in name:
            packed = quantize_nf4(module.weight.detach(), block_size=BLOCK).packed
            codes = torch.cat((packed >> 4, packed & 15))
            counts.append(torch.bincount(codes.int(), minlength=16).numpy())
    return np.stack(counts)


def unevenness(shares: Sequence[float] | np.ndarray) -> float:
    """(largest - smallest share) / (1/16): 0 where all bins are alike."""
    return float(16 * (max(shares) - min(shares)))


def entropy(shares: Sequence[float] | np.ndarray) -> float:
    """Bits that a code carries; 4 where all bins are alike."""
    return -sum(float(share) * math.log2(share) for share in shares if share > 0)


def over_layers(counts: np.ndarray) -> Estimate:
    """The unevenness of all weights, layers resampled."""

    def statistic(drawn: np.ndarray) -> float:
        total = counts[drawn].sum(axis=0)
        return unevenness(total / total.sum())

    return bootstrap(len(counts), statistic, unit="layers")


def run(settings: Settings) -> Finding:
    """Shares of the bins: computed for normal weights, counted on the base's."""
    expected = bin_masses("nf4", BLOCK).numpy()
    counts = layer_counts(settings)
    total = counts.sum(axis=0)
    shares = total / total.sum()
    values = nf4_values().tolist()
    rows = [
        {
            "bin": code,
            "value": values[code],
            "normal weights, × 1/16": float(16 * expected[code]),
            "this base's weights, × 1/16": float(16 * shares[code]),
        }
        for code in range(16)
    ]
    computed = unevenness(expected)
    exact = Estimate(computed, 1, computed, computed, "distribution", 1.0, "exact")
    checks = [
        Check("fullest − emptiest bin by 1/16, normal weights", exact, "within", MARGIN),
        Check(
            "fullest − emptiest bin by 1/16, this base's weights",
            over_layers(counts),
            "within",
            MARGIN,
        ),
    ]
    chi_square = float(((total - total.sum() / 16) ** 2 / (total.sum() / 16)).sum())
    figures = {
        "weights": int(total.sum()),
        "chi_square_15_degrees": chi_square,
        "chi_square_by_weights": chi_square / float(total.sum()),
        "bits_of_4_normal": entropy(expected),
        "bits_of_4_this_base": entropy(shares),
    }
    return Finding(rows, checks, figures)


CLAIM = Claim(
    name="equal_bins",
    paper="Dettmers et al. 2023, arXiv:2305.14314, sections 2 and 3",
    says="each of NF4's 16 bins holds an equal share of normal weights",
    run=run,
    scale="shares of normal weights hold for any model; those of the base are of its own weights",
)
