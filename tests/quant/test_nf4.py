"""NF4Tensor: sizes, slices and errors; the codes themselves are tested in tests/ops."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from lora_core.quant import NF4Tensor, double_quant, nf4, quantize_4bit, quantize_nf4
from lora_core.quant.codebook import CODEBOOKS, codebook
from lora_core.quant.double_quant import shared_map
from lora_core.quant.nf4 import shared_table


@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    block=st.sampled_from([32, 64, 4096]),
    double_quant=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_sizes_shapes_and_dtypes(
    shape: list[int], block: int, double_quant: bool, dtype: torch.dtype
) -> None:
    w = torch.randn(shape).to(dtype)
    q = quantize_4bit(w, block_size=block, double_quant=double_quant)
    n = w.numel()
    blocks = math.ceil(n / block)
    groups = math.ceil(blocks / 256)
    expected = (n + 1) // 2 + (blocks + 4 * groups + 4 if double_quant else 4 * blocks)
    assert q.nbytes == expected
    assert q.bits_per_param == (8 * expected / n if n else 0)
    assert (q.shape, q.dtype) == (w.shape, dtype)
    assert (q.absmax.dtype, q.absmax.shape) == (torch.float32, (blocks,))
    back = q.dequantize()
    assert (back.shape, back.dtype) == (w.shape, dtype)
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_the_paper_s_bits_per_parameter() -> None:
    w = torch.randn(1024, 1024)
    assert quantize_nf4(w, double_quant=False).bits_per_param == 4.5
    assert round(quantize_nf4(w).bits_per_param, 3) == 4.127


# mean absolute error on N(0, 1): figures of bitsandbytes' own tests, mean and standard deviation
@pytest.mark.parametrize(
    ("block", "mean", "deviation"), [(32, 0.067746, 6.9e-5), (64, 0.072798, 7.4e-5)]
)
def test_the_error_on_normal_weights(block: int, mean: float, deviation: float) -> None:
    w = torch.randn(1024, 1024)
    errors = {
        dq: float((quantize_nf4(w, block, dq).dequantize() - w).abs().mean())
        for dq in (False, True)
    }
    assert abs(errors[False] - mean) < 7 * deviation
    assert errors[False] <= errors[True] < errors[False] + 2e-4


def test_nf4_is_the_best_of_the_four_on_normal_weights() -> None:
    """By squared error, as it is by perplexity in the QLoRA paper's table 2."""
    w = torch.randn(512, 512)
    error = {
        name: float((quantize_4bit(w, name).dequantize() - w).square().mean()) for name in CODEBOOKS
    }
    assert min(error, key=error.__getitem__) == "nf4"


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("start", "stop"), [(0, 24), (5, 11), (7, 7), (23, 24)])
def test_a_slice_of_rows_is_a_weight(double_quant: bool, start: int, stop: int) -> None:
    q = quantize_nf4(torch.randn(24, 192), 64, double_quant)
    part = q.rows(start, stop)
    assert torch.equal(part.dequantize(), q.dequantize()[start:stop])
    assert torch.equal(part.absmax, q.absmax[start * 3 : stop * 3])
    assert part.packed.untyped_storage().data_ptr() == q.packed.untyped_storage().data_ptr()
    if not double_quant:  # the slice is what quantizing the rows alone gives
        w = torch.randn(24, 192)
        alone = quantize_nf4(w[start:stop], 64, False)
        whole = quantize_nf4(w, 64, False).rows(start, stop)
        assert torch.equal(whole.packed, alone.packed)
        assert torch.equal(whole.absmax, alone.absmax)


def test_rows_that_cannot_be_taken() -> None:
    with pytest.raises(ValueError, match=r"multiple of the block \(64\); this is \(4, 96\)"):
        quantize_nf4(torch.randn(4, 96)).rows(0, 2)
    with pytest.raises(ValueError, match="rows 2 to 5 are not within 0 to 4"):
        quantize_nf4(torch.randn(4, 128)).rows(2, 5)


def test_a_plain_object_that_pickles_and_moves() -> None:
    q = quantize_nf4(torch.randn(8, 64, dtype=torch.bfloat16))
    assert isinstance(q, NF4Tensor)
    assert not isinstance(q, torch.Tensor)
    for copy in (pickle.loads(pickle.dumps(q)), q.to("cpu")):
        assert torch.equal(copy.dequantize(), q.dequantize())
    assert q.to("meta").scales.device.type == "meta"


def test_quantizing_needs_no_graph_and_leaves_the_weight() -> None:
    w = torch.nn.Parameter(torch.randn(4, 64))
    before = w.detach().clone()
    q = quantize_nf4(w)
    assert not q.absmax.requires_grad
    assert not q.dequantize().requires_grad
    assert torch.equal(w, before)


def test_what_is_not_finite_is_named() -> None:
    w = torch.randn(4, 64)
    w[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"^layers\.0\.weight\[2, 3\] is nan"):
        quantize_4bit(w, name="layers.0.weight")
    with pytest.raises(ValueError, match=r"^w\[2, 3\] is nan"):
        quantize_nf4(w)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_flag_instead_of_an_error(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("LORA_KERNELS", backend)
    flag = torch.zeros(1, dtype=torch.int32)
    w = torch.randn(4, 64)
    q = quantize_4bit(w, flag=flag)
    assert torch.equal(q.packed, quantize_4bit(w).packed)
    assert not flag
    quantize_4bit(torch.full((4, 64), 3e38), flag=flag)  # the scales' sum is beyond float32
    assert flag
    quantize_4bit(torch.full((4, 64), 3e38), double_quant=False, flag=flag.zero_())
    assert not flag
    w[3, 63] = torch.nan
    quantize_4bit(w, double_quant=False, check_finite=False)
    quantize_4bit(w, double_quant=False, flag=flag)
    assert flag


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_workspace_takes_the_dense_tensor(
    monkeypatch: pytest.MonkeyPatch, backend: str, double_quant: bool
) -> None:
    monkeypatch.setenv("LORA_KERNELS", backend)
    q = quantize_nf4(torch.randn(5, 33), double_quant=double_quant)
    workspace = torch.full((200,), torch.nan, dtype=torch.bfloat16)
    dense = q.dequantize(torch.bfloat16, out=workspace[:165])
    assert dense.data_ptr() == workspace.data_ptr()
    assert torch.equal(dense, q.dequantize(torch.bfloat16))
    assert workspace[165:].isnan().all()
    with pytest.raises(ValueError, match=r"out must be contiguous, 165 elements of torch\.float32"):
        q.dequantize(out=workspace[:165])


def test_one_table_a_device() -> None:
    cpu, book = torch.device("cpu"), codebook("fp4")
    assert shared_table(book, cpu) is shared_table(book, cpu)
    assert torch.equal(shared_table(book, cpu), book.table())
    with FakeTensorMode(allow_non_fake_inputs=True):  # what a tracer makes is not kept
        fake = torch.device("cuda", 3)
        assert shared_table(book, fake) is not shared_table(book, fake)
        assert shared_map(fake) is not shared_map(fake)


def test_tables_placed_in_inference_mode_serve_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are shared: one model evaluated first must not spoil another's training."""
    monkeypatch.setattr(nf4, "_placed", {})
    monkeypatch.setattr(double_quant, "_placed", {})
    double_quant._dynamic_map.cache_clear()
    with torch.inference_mode():
        quantize_nf4(torch.randn(64, 64)).dequantize()
    cpu = torch.device("cpu")
    assert not shared_map(cpu).is_inference()
    assert not shared_table(codebook("nf4"), cpu).is_inference()
