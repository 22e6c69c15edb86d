"""The strategies draw what they say, the bounds are the textbook's, and hypothesis is optional."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.testing import dtypes, operands, ranks, scales, shapes, sizes, weights
from lora_core.testing.bounds import allowance, exceeds, gamma
from lora_core.testing.strategies import KINDS, Weight


@given(sizes(3, 65), shapes(dims=2, smallest=1, largest=9), ranks(5), scales(-2, 2), dtypes())
def test_what_is_drawn_is_in_range(size, shape, rank, scale, dtype):
    assert 3 <= size <= 65
    assert 1 <= len(shape) <= 2
    assert all(1 <= n <= 9 for n in shape)
    assert 1 <= rank <= 5
    assert scale in (0.25, 0.5, 1.0, 2.0, 4.0)
    assert dtype in (torch.float32, torch.bfloat16, torch.float16)


@given(weights(dims=3, largest=33))
def test_a_weight_is_as_described(weight):
    w = weight.tensor()
    assert w.shape == weight.shape
    assert w.dtype == weight.dtype
    assert torch.equal(w, weight.tensor())
    assert w.isfinite().all()


def test_the_kinds_of_weights():
    made = {kind: Weight((1000,), kind, torch.float32, 2.0, 5).tensor() for kind in KINDS}
    assert not made["zeros"].any()
    assert (made["constant"] == 2.0).all()
    assert not made["zero blocks"][:500].any()
    assert made["zero blocks"][500:].all()
    assert made["outliers"].abs().max() > 20 * made["normal"].abs().max()
    assert torch.equal(made["ties"] * 32, (made["ties"] * 32).round())
    assert made["ties"].unique().numel() < 130


@given(operands("m k", "k n", "", among=[torch.bfloat16]))
def test_named_dimensions_agree(drawn):
    a, b, c = drawn.tensors()
    assert a.shape[1] == b.shape[0]
    assert c.shape == ()
    assert {t.dtype for t in (a, b, c)} == {torch.bfloat16}
    assert (a @ b).shape == (a.shape[0], b.shape[1])


def test_empty_tensors_are_drawn():
    seen = []

    @settings(max_examples=25, derandomize=True)
    @given(operands("m k", "k n"))
    def look(drawn):
        seen.extend(t.numel() for t in drawn.tensors())

    look()
    assert 0 in seen
    assert max(seen) > 64


def test_no_size_in_range():
    with pytest.raises(ValueError, match="no size lies between 40 and 50; the sizes are"):
        sizes(40, 50)


def test_gamma():
    assert gamma(3, 0.1) == pytest.approx(0.3 / 0.7, rel=1e-15)
    with pytest.raises(ValueError, match=r"10 roundings of 1.0e-01 each leave nothing to promise"):
        gamma(10, 0.1)


@given(st.integers(0, 2**31 - 1), st.sampled_from([1, 7, 64, 500]))
def test_a_dot_product_stays_within_gamma(seed, n):
    """The bound holds in any order of summation, the worst of which is one after the other."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, generator=generator).to(torch.float32) for _ in range(2))
    total = torch.zeros(())
    for term in a * b:
        total = total + term
    bound = allowance(n, torch.float32, 0) * (a.double().abs() @ b.double().abs())
    assert exceeds(total, a.double() @ b.double(), bound) is None


def test_exceeds_names_the_worst_element():
    got, wanted = torch.tensor([[1.0, 2.0], [3.5, 4.0]]), torch.tensor([[1.0, 2.25], [3.0, 4.0]])
    assert exceeds(got, wanted, torch.full((2, 2), 0.5)) is None
    fault = exceeds(got, wanted, torch.full((2, 2), 0.1))
    assert fault == "is 3.5 at (1, 0) instead of 3: off by 0.5, allowed 0.1"
    assert "is nan at (0,)" in exceeds(torch.tensor([torch.nan]), torch.ones(1), torch.ones(1))
    assert exceeds(got, wanted[0], got) == "has shape (2, 2) instead of (2,)"


def test_without_hypothesis_the_import_works_and_the_check_says_what_to_install():
    script = """
import sys
sys.modules["hypothesis"] = sys.modules["hypothesis.strategies"] = None
from lora_core.testing import check_operator
try:
    check_operator(abs, abs)
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "hypothesis, which is not installed; pip install lora-core[test]" in done.stdout
