"""A code table of one's own: 16 levels fitted to a model's weights by Lloyd's algorithm.

$ python docs/examples/own_codebook.py
"""

import torch
from torch import Tensor, nn

from lora_core import LoRALinear, NF4Linear, quantize_4bit
from lora_core.quant import codebook
from lora_core.testing import check_quantizer

BLOCK = 64


def fit(w: Tensor, rounds: int = 50) -> Tensor:
    """Move each level to the mean of what is rounded to it; -1, 0 and 1 stay."""
    blocks = w.flatten().view(-1, BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True)  # (blocks, 1)
    scaled, weight = (blocks / absmax).flatten(), absmax.square().expand_as(blocks).flatten()
    levels = codebook("nf4").table()
    for _ in range(rounds):
        code = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
        total = torch.zeros(16).index_add_(0, code, weight)
        means = torch.zeros(16).index_add_(0, code, weight * scaled) / total.clamp(min=1e-12)
        levels = torch.where(total > 0, means, levels)
        levels[0], levels[7], levels[15] = -1.0, 0.0, 1.0
    return levels


def error(w: Tensor, code: str | Tensor) -> float:
    """Root of the mean squared error, relative to that of w."""
    back = quantize_4bit(w, code, BLOCK).dequantize()
    return ((back - w).norm() / w.norm()).item()


torch.manual_seed(0)
# heavy tails: a Student t distribution with 3 degrees of freedom
linear = nn.Linear(512, 256)
with torch.no_grad():
    linear.weight.copy_(torch.distributions.StudentT(3.0).sample(linear.weight.shape) / 32)
w = linear.weight.detach()

mine = fit(w)
print("levels:", " ".join(f"{level:+.3f}" for level in mine.tolist()))
for name, code in (("int4", "int4"), ("fp4", "fp4"), ("nf4", "nf4"), ("fitted", mine)):
    print(f"{name:>6}: relative error {error(w, code):.4f}")

check_quantizer(lambda w, **options: quantize_4bit(w, mine, **options), code=mine)
print("check_quantizer passed")

layer = LoRALinear(NF4Linear.from_linear(linear, code=mine), r=8)
x = torch.randn(4, 512)
difference = (layer(x) - linear(x)).norm() / linear(x).norm()
print(f"its layer differs from the dense one by {difference:.4f}")
