"""The copy of the codes in tensor-core order: where each byte goes, and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_kernels.blockwise4 import Weight4
from lora_kernels.gpu.arrange4 import arrange, restore


def _weight(n: int, k: int) -> Weight4:
    codes = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8)
    return Weight4(codes, torch.empty(0), torch.empty(0), n, k, 64)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32))
def test_every_byte_is_where_the_definition_says(rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = _weight(16 * rows, 64 * columns)
    codes = weight.codes.view(16 * rows, 32 * columns)
    arranged = arrange(weight)
    assert arranged is not None
    assert arranged.is_contiguous()
    assert arranged.shape == (codes.numel(),)
    groups = arranged.view(rows, columns, 8, 4, 2, 8)
    for _ in range(50):
        n, k, g, j, h, byte = (int(torch.randint(0, size, ())) for size in groups.shape)
        expected = codes[16 * n + 8 * h + g, 32 * k + 8 * j + byte]
        assert groups[n, k, g, j, h, byte] == expected


@given(st.integers(1, 5), st.integers(1, 5))
def test_restore_is_the_inverse(rows: int, columns: int) -> None:
    n, k = 16 * rows, 64 * columns
    weight = _weight(n, k)
    arranged = arrange(weight)
    assert arranged is not None
    assert arranged.data_ptr() != weight.codes.data_ptr()
    assert torch.equal(restore(arranged, n, k), weight.codes.view(-1))


@pytest.mark.parametrize(("n", "k"), [(24, 64), (16, 96), (1, 64)])
def test_sizes_that_do_not_divide_are_not_arranged(n: int, k: int) -> None:
    assert arrange(_weight(n, k)) is None
    with pytest.raises(ValueError, match=f"for N = {n}, K = {k}"):
        restore(torch.zeros(n * k // 2, dtype=torch.uint8), n, k)


def test_restore_refuses_another_number_of_bytes() -> None:
    with pytest.raises(ValueError, match="got 100 bytes"):
        restore(torch.zeros(100, dtype=torch.uint8), 16, 64)
