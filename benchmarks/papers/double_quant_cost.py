"""Double quantization: 0.127 bits a parameter for the scales instead of 0.5, at no loss.

One float32 scale a block of 64 is 32/64 = 0.5 bits; 8-bit scales with one float32 for 256 of them
are 8/64 + 32/(64·256) = 0.127. Bits are counted on the base's own layers and on a matrix of a
7 B model's size, since small layers do not fill their groups of 256. "No loss": no more than
`MARGIN` of what going to 4 bits costs at all lies between the two, in nats a token.
"""

import torch
from torch import nn

from benchmarks.papers.claim import Check, Claim, Finding, Settings
from benchmarks.papers.quantized import DENSE, Format, loss_difference, measured
from lora_core.checkpoint import load_model
from lora_core.evaluate.estimate import Estimate
from lora_core.quant import quantize_nf4
from lora_core.targets import in_head, output_head_name

PAPER_BITS = 0.127
ROUNDING = 0.0005  # the paper gives three digits
MARGIN = 0.1  # of the nats that NF4 costs
LARGE = (4096, 4096)


def scale_bits(weights: list[torch.Tensor], double_quant: bool) -> float:
    """Bits of scales a parameter, over all of these."""
    made = [quantize_nf4(weight, double_quant=double_quant) for weight in weights]
    parameters = sum(weight.numel() for weight in weights)
    return sum(8 * q.nbytes for q in made) / parameters - 4


def exactly(value: float, unit: str) -> Estimate:
    """A figure that is counted or computed and has no spread."""
    return Estimate(value, 1, value, value, unit, 1.0, "exact")


def run(settings: Settings) -> Finding:
    """Bits of the scales and the loss, with and without."""
    model = load_model(settings.model, dtype=torch.float32)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = output_head_name(model)
    own = [m.weight.detach() for n, m in layers.items() if not in_head(n, head)]
    large = [torch.randn((64, 4096) if settings.quick else LARGE)]
    bits = {
        double: (scale_bits(large, double), scale_bits(own, double)) for double in (False, True)
    }
    found = {double: measured(settings, Format("nf4", double_quant=double)) for double in bits}
    dense = measured(settings, DENSE)
    rows = [
        {
            "scales": "8 bits (double quantization)" if double else "float32",
            "bits a parameter, 4096 × 4096": bits[double][0],
            "bits a parameter, this base": bits[double][1],
            "perplexity": found[double].perplexity,
            "nats lost to dense": loss_difference(found[double], dense),
        }
        for double in bits
    ]
    cost = loss_difference(found[False], dense).value
    checks = [
        Check(
            f"bits of the scales of a 4096 × 4096 layer − {PAPER_BITS}",
            exactly(bits[True][0] - PAPER_BITS, "layer"),
            "within",
            ROUNDING,
        ),
        Check(
            "nats, with − without double quantization",
            loss_difference(found[True], found[False]),
            "within",
            MARGIN * abs(cost),
        ),
    ]
    return Finding(rows, checks, {"nats_lost_by_nf4": cost})


CLAIM = Claim(
    name="double_quant_cost",
    paper="Dettmers et al. 2023, arXiv:2305.14314, section 3",
    says="double quantization takes the scales from 0.5 to 0.127 bits a parameter and costs no "
    "quality",
    run=run,
    scale="bits are the same at any size; the loss is that of one model of 5 M parameters, in "
    "which a layer has as few as 512 blocks",
)
