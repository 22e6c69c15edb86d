"""Operators with one plain PyTorch definition each and, where they exist, faster backends."""

from lora_kernels.attention import masked_attention
from lora_kernels.blockwise4 import (
    decode_scales,
    dequantize4,
    encode_scales,
    expand4,
    expand4_slice,
    quantize4,
)
from lora_kernels.dispatch import backend_for, describe
from lora_kernels.grouped import grouped_linear, grouped_matmul4, groups_of
from lora_kernels.linear_cross_entropy import linear_cross_entropy
from lora_kernels.lora_linear import lora_linear4
from lora_kernels.lora_update import lora_update
from lora_kernels.matmul4 import matmul4
from lora_kernels.operands import Weight4
from lora_kernels.packed_attention import (
    Documents,
    document_mask,
    documents,
    row_documents,
)
from lora_kernels.rms_norm import rms_norm
from lora_kernels.rotary import rotary
from lora_kernels.swiglu import swiglu

__all__ = [
    "Documents",
    "Weight4",
    "backend_for",
    "decode_scales",
    "dequantize4",
    "describe",
    "document_mask",
    "documents",
    "encode_scales",
    "expand4",
    "expand4_slice",
    "grouped_linear",
    "grouped_matmul4",
    "groups_of",
    "linear_cross_entropy",
    "lora_linear4",
    "lora_update",
    "masked_attention",
    "matmul4",
    "quantize4",
    "rms_norm",
    "rotary",
    "row_documents",
    "swiglu",
]
