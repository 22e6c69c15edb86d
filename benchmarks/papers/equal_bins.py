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
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch

from benchmarks.papers.claim import Check, Claim, Finding, Settings
from benchmarks.papers.page import PAGE
from lora_core.checkpoint import base_model_path, load_model
from lora_core.evaluate.estimate import Estimate, bootstrap
from lora_core.quant import bin_masses, nf4_values
from lora_core.report import WeightHistogram, save, weight_bins, weight_histogram
from lora_core.targets import in_head, output_head_name

BLOCK = 64
MARGIN = 0.1
PICTURE = "papers/equal_bins.png"
Shares = Sequence[float] | np.ndarray


def layers_of(settings: Settings) -> list[WeightHistogram]:
    """Each linear layer of the base by NF4's bins, the output head left out."""
    model = load_model(settings.model, dtype=torch.float32)
    head = output_head_name(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return [weight_bins(m, "nf4", BLOCK) for n, m in linears.items() if not in_head(n, head)]


def unevenness(shares: Shares) -> float:
    """(largest - smallest share) / (1/16): 0 where all bins are alike."""
    return float(16 * (max(shares) - min(shares)))


def entropy(shares: Shares) -> float:
    """Bits that a code carries; 4 where all bins are alike."""
    return -sum(float(share) * math.log2(share) for share in shares if share > 0)


def over_layers(layers: Sequence[WeightHistogram]) -> Estimate:
    """The unevenness of all weights, layers resampled."""
    counts = np.array([layer.counts for layer in layers])  # (layers, 16)

    def statistic(drawn: np.ndarray) -> float:
        total = counts[drawn].sum(axis=0)
        return unevenness(total / total.sum())

    return bootstrap(len(counts), statistic, unit="layers")


def draw(settings: Settings, found: WeightHistogram) -> str | None:
    """Save the figure, for the page if it is the page's run; its name, None without matplotlib."""
    shown = settings.model == base_model_path() and not settings.quick
    path = PAGE.parent / PICTURE if shown else settings.out / Path(PICTURE).name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save(weight_histogram(found), path)
    except ImportError:
        print("  no figure: matplotlib is not installed")
        return None
    return PICTURE if shown else str(path)


def run(settings: Settings) -> Finding:
    """Shares of the bins: computed for normal weights, counted on the base's."""
    expected = bin_masses("nf4", BLOCK).numpy()
    layers = layers_of(settings)
    found = reduce(add, layers)
    values = nf4_values().tolist()
    rows = [
        {
            "bin": code,
            "value": values[code],
            "normal weights, × 1/16": float(16 * expected[code]),
            "this base's weights, × 1/16": 16 * found.shares[code],
        }
        for code in range(16)
    ]
    computed = unevenness(expected)
    exact = Estimate(computed, 1, computed, computed, "distribution", 1.0, "exact")
    what = "(fullest − emptiest bin) / (1/16)"
    checks = [
        Check(f"{what}, normal weights", exact, "within", MARGIN),
        Check(f"{what}, this base's weights", over_layers(layers), "within", MARGIN),
    ]
    even = found.total / 16
    chi_square = sum((count - even) ** 2 / even for count in found.counts)
    figures = {
        "weights": found.total,
        "chi_square_15_degrees": chi_square,
        "chi_square_by_weights": chi_square / found.total,
        "bits_of_4_normal": entropy(expected),
        "bits_of_4_this_base": entropy(found.shares),
        "picture": draw(settings, found),
    }
    return Finding(rows, checks, figures)


CLAIM = Claim(
    name="equal_bins",
    paper="Dettmers et al. 2023, arXiv:2305.14314, sections 2 and 3",
    says="each of NF4's 16 bins holds an equal share of normal weights",
    run=run,
    scale="shares of normal weights hold for any model; those of the base are of its own weights",
)
