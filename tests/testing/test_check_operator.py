"""`check_operator` passes right operators and fails each planted fault."""

import pytest
import torch
from torch.nn import functional as F

from lora_core.testing import check_operator, operands


def swiglu_reference(gate, up):
    return F.silu(gate) * up


class SwiGLU(torch.autograd.Function):
    """A hand-written operator with a hand-written backward pass; faults override pieces of it."""

    @classmethod
    def value(cls, gate, up):
        return (F.silu(gate.float()) * up.float()).to(gate.dtype)

    @classmethod
    def slope(cls, gate, up, dout):
        g, u, d = gate.float(), up.float(), dout.float()
        s = torch.sigmoid(g)
        return (d * u * s * (1 + g * (1 - s))).to(gate.dtype), (d * g * s).to(up.dtype)

    @classmethod
    def op(cls, gate, up):
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, gate, up):
                ctx.save_for_backward(gate, up)
                return cls.value(gate, up)

            @staticmethod
            def backward(ctx, dout):
                return cls.slope(*ctx.saved_tensors, dout)

        return Function.apply(gate, up)


class MaskOffByOne(SwiGLU):
    """The last element of each run of 16 is not computed."""

    @classmethod
    def value(cls, gate, up):
        out = super().value(gate, up).flatten()
        out[15::16] = 0
        return out.view(gate.shape)


class LastElementMasked(SwiGLU):
    @classmethod
    def slope(cls, gate, up, dout):
        dgate, dup = super().slope(gate, up, dout)
        dup = dup.flatten()
        dup[-1:] = 0
        return dgate, dup.view(up.shape)


class WrongFactor(SwiGLU):
    @classmethod
    def slope(cls, gate, up, dout):
        dgate, dup = super().slope(gate, up, dout)
        return dgate * 1.25, dup


class GradientMissing(SwiGLU):
    @classmethod
    def slope(cls, gate, up, dout):
        return super().slope(gate, up, dout)[0], None


class WritesIntoSaved(SwiGLU):
    """The gradient is put where the saved argument was, unseen by autograd, as a kernel does."""

    @classmethod
    def slope(cls, gate, up, dout):
        dgate, dup = super().slope(gate, up, dout)
        gate.data.copy_(dgate)
        return dgate, dup


class WritesIntoCotangent(SwiGLU):
    @classmethod
    def slope(cls, gate, up, dout):
        grads = super().slope(gate, up, dout)
        if dout.is_contiguous():
            dout.zero_()
        return grads


class AssumesContiguous(SwiGLU):
    """Reads the storage as a kernel with bare pointers does."""

    @classmethod
    def value(cls, gate, up):
        n = gate.numel()
        flat = [t.as_strided((n,), (1,), t.storage_offset()) for t in (gate, up)]
        return super().value(*flat).view(gate.shape)


class FailsOnEmpty(SwiGLU):
    @classmethod
    def value(cls, gate, up):
        gate.max()
        return super().value(gate, up)


class WrongDtype(SwiGLU):
    @classmethod
    def value(cls, gate, up):
        return F.silu(gate.float()) * up.float()


class WrongShape(SwiGLU):
    @classmethod
    def value(cls, gate, up):
        return super().value(gate, up)[..., :1]


FAULTS = {
    MaskOffByOne: "output 0 is off by",
    LastElementMasked: "gradient of floating argument 1 is off by",
    WrongFactor: "gradient of floating argument 0 is off by",
    GradientMissing: "no gradient of floating argument 1",
    WritesIntoSaved: "argument 0 was written to",
    WritesIntoCotangent: "cotangent 0 was written to",
    AssumesContiguous: "output 0 of non-contiguous arguments is off by",
    FailsOnEmpty: "raised IndexError|raised RuntimeError",
    WrongDtype: "output 0 is torch.float32, the reference's is torch.bfloat16",
    WrongShape: "output 0 has shape",
}


def test_a_right_operator_passes():
    check_operator(SwiGLU.op, swiglu_reference)
    check_operator(swiglu_reference, swiglu_reference)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(fault):
    with pytest.raises(AssertionError, match=FAULTS[fault]) as caught:
        check_operator(fault.op, swiglu_reference)
    assert "smallest failing case: Operands(shapes=((" in str(caught.value)


def rms_norm_reference(x, weight):
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (wide * weight.to(wide.dtype)).to(x.dtype)


def rms_norm_without_upcast(x, weight):
    total = torch.zeros_like(x[..., :1])
    for i in range(x.shape[-1]):  # a running sum in the input's dtype, as a kernel would keep it
        total = total + x[..., i : i + 1].square()
    return x * torch.rsqrt(total / x.shape[-1] + 1e-6) * weight


def test_a_dropped_upcast_is_caught():
    inputs = operands("rows hidden", "hidden", smallest=1, largest=257)
    check_operator(rms_norm_reference, rms_norm_reference, inputs=inputs)
    with pytest.raises(AssertionError, match=r"is off by .*, PyTorch's by .*; allowed 2 x that"):
        check_operator(rms_norm_without_upcast, rms_norm_reference, inputs=inputs)


def test_named_dimensions_and_several_outputs():
    def both(a, b):
        return a @ b, (a * 2).sum()

    inputs = operands("m k", "k n")
    check_operator(both, both, inputs=inputs)
    with pytest.raises(AssertionError, match="output 1"):
        check_operator(lambda a, b: (a @ b, a.sum()), both, inputs=inputs)
    with pytest.raises(AssertionError, match="1 outputs, the reference has 2"):
        check_operator(lambda a, b: a @ b, both, inputs=inputs)


def test_integer_arguments_and_options_pass_through():
    def labelled(drawn):
        logits, *_ = drawn.tensors()
        return logits, torch.arange(logits.shape[0]) % logits.shape[1], 0.1

    inputs = operands("rows classes", smallest=1, largest=17, among=[torch.float32]).map(labelled)

    def loss(logits, labels, smoothing):
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    check_operator(loss, loss, inputs=inputs)
    with pytest.raises(
        AssertionError, match=r"smallest failing case: \(float32\[., .\], int64\[.\]"
    ):
        check_operator(lambda a, b, c: loss(a, b, 2 * c), loss, inputs=inputs)


def test_no_nan_passes():
    with pytest.raises(AssertionError, match="is off by inf"):
        check_operator(lambda x: x * torch.nan, lambda x: x)
