"""4-bit weights: code tables, double quantization, NF4Tensor, NF4Linear."""

from lora_core.quant.codebook import Codebook, bin_masses, codebook, nf4_values
from lora_core.quant.dense import is_4bit
from lora_core.quant.linear import NF4Linear
from lora_core.quant.model import QuantizeReport, dequantize_model, quantize_model
from lora_core.quant.nf4 import NF4Tensor, quantize_4bit, quantize_nf4
from lora_core.quant.stack import NF4Stack

__all__ = [
    "Codebook",
    "NF4Linear",
    "NF4Stack",
    "NF4Tensor",
    "QuantizeReport",
    "bin_masses",
    "codebook",
    "dequantize_model",
    "is_4bit",
    "nf4_values",
    "quantize_4bit",
    "quantize_model",
    "quantize_nf4",
]
