"""What the library ships passes the checks that it offers for other people's code."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_core.adapters import LoRALinear
from lora_core.losses import linear_cross_entropy, masked_cross_entropy
from lora_core.quant import NF4Linear, quantize_4bit, quantize_nf4
from lora_core.testing import check_adapter, check_operator, check_quantizer, operands
from lora_kernels import Weight4, matmul4


@pytest.mark.parametrize(("k", "n", "r"), [(24, 24, 4), (1, 5, 1), (65, 3, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_lora_linear(k, n, r, bias, examples):
    linear = nn.Linear(k, n, bias=bias)
    check_adapter(
        lambda base: LoRALinear(base, r=r, alpha=3, dropout=0.1), linear, examples=examples
    )


@pytest.mark.parametrize(("k", "n"), [(64, 24), (33, 7)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_lora_linear_on_a_4_bit_base(k, n, double_quant, examples):
    base = NF4Linear.from_linear(nn.Linear(k, n), double_quant=double_quant)
    check_adapter(lambda base: LoRALinear(base, r=3, alpha=6, dropout=0.1), base, examples=examples)


def test_quantize_nf4(examples):
    check_quantizer(quantize_nf4, examples=examples)


@pytest.mark.parametrize("code", ["fp4", "fp4_e3m0", "int4", torch.linspace(-1, 1, 16)], ids=str)
def test_quantize_4bit(code, examples):
    check_quantizer(
        lambda w, **options: quantize_4bit(w, code, **options), code=code, examples=examples
    )


def test_matmul4(examples):
    def with_weight(drawn):
        x, w = drawn.tensors()
        q = quantize_nf4(w.float(), double_quant=False)
        weight = Weight4(q.packed, q.scales, q.code.table(), *w.shape, q.block_size)
        return x, weight, q.dequantize()

    check_operator(
        lambda x, weight, dense: matmul4(x, weight),
        lambda x, weight, dense: F.linear(x, dense.detach().to(x.dtype)),
        inputs=operands("rows k", "n k").map(with_weight),
        examples=examples,
    )


def _with_labels(drawn):
    """Labels with every third token not graded."""
    *tensors, labels = drawn.tensors()
    vocabulary = tensors[-1].shape[0 if len(tensors) == 2 else -1]
    labels = torch.arange(labels.numel()).view(labels.shape) % vocabulary
    labels[labels % 3 == 2] = -100
    return *tensors, labels


def test_masked_cross_entropy(examples):
    def definition(logits, labels):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        kept = labels[:, 1:] != -100
        losses = -wide[:, :-1].log_softmax(-1)[kept]  # (graded, V)
        losses = losses.gather(1, labels[:, 1:][kept][:, None])
        return losses.sum() / kept.sum().clamp(min=1)

    inputs = operands("rows tokens vocab", "rows tokens", smallest=1, largest=17)
    check_operator(
        masked_cross_entropy, definition, inputs=inputs.map(_with_labels), examples=examples
    )


def test_linear_cross_entropy(examples):
    def definition(hidden, head, labels):
        return masked_cross_entropy(F.linear(hidden, head), labels)

    inputs = operands("rows tokens dim", "vocab dim", "rows tokens", smallest=1, largest=17)
    check_operator(
        linear_cross_entropy, definition, inputs=inputs.map(_with_labels), examples=examples
    )
