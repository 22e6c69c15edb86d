"""The code tables: NF4 derived and published, its rivals, and tables of the user's."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.quant import bin_masses, codebook, nf4_values, quantize_4bit
from lora_core.quant.codebook import CODEBOOKS

# the published float32 table, bit for bit
PUBLISHED = [
    *("bf800000", "bf3239b1", "bf066b30", "beca32a0", "be91a24d", "be3d353f", "bdba7871"),
    *("00000000", "3da2faff", "3e24cae3", "3e7c04dd", "3ead033a", "3ee1a4b8", "3f1007ab"),
    *("3f3913b3", "3f800000"),
]


def bits(values: list[float]) -> list[str]:
    return [struct.pack(">f", v).hex() for v in values]


def test_nf4_is_the_published_table_and_is_derived_exactly() -> None:
    assert bits(codebook("nf4").values) == PUBLISHED
    assert bits(nf4_values().tolist()) == PUBLISHED


def test_another_offset_gives_another_table() -> None:
    assert bits(nf4_values(0.96).tolist()) != PUBLISHED
    for offset in (0.5, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"between 0\.5 and 1, both excluded"):
            nf4_values(offset)


def test_fp4_is_sign_exponent_mantissa() -> None:
    """Bit patterns s ee m: normal numbers are 2^e (1 + m/2); bitsandbytes' subnormal is 0.0625."""
    for code, value in enumerate(codebook("fp4").values):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        magnitude = {0: 0.0625 * mantissa, 1: 8 + 4 * mantissa, 2: 4 + 2 * mantissa}
        expected = magnitude.get(exponent, 2 + mantissa) / 12
        assert value == (-expected if sign else expected)


def test_e3m0_is_powers_of_two_and_int4_even_steps() -> None:
    e3m0 = codebook("fp4_e3m0").values
    assert e3m0[:8] == (0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
    assert e3m0[8:] == tuple(-v for v in e3m0[:8])
    assert [round(v * 7) for v in codebook("int4").values] == list(range(-8, 8))
    q = quantize_4bit(torch.randn(4096), code="int4")
    assert {*(q.packed >> 4).tolist(), *(q.packed & 15).tolist()} <= set(range(1, 16))


@pytest.mark.parametrize("name", sorted(CODEBOOKS))
def test_every_table_holds_both_ends_and_zero(name: str) -> None:
    assert {-1.0, 0.0, 1.0} <= set(codebook(name).table().tolist())


@given(st.lists(st.floats(-1, 1, width=32), min_size=16, max_size=16, unique=True))
def test_any_ascending_table_is_used_as_it_is(values: list[float]) -> None:
    table = torch.tensor(sorted(values))
    book = codebook(table)
    assert book.name == "custom"
    assert torch.equal(book.table(), table)
    assert codebook(book) is book
    result = quantize_4bit(torch.linspace(-1, 1, 64), code=table, double_quant=False).dequantize()
    assert set(result.tolist()) <= set(table.tolist())


def test_tables_that_are_none() -> None:
    with pytest.raises(ValueError, match="one of nf4, fp4, fp4_e3m0, int4; got 'nf3'"):
        codebook("nf3")
    with pytest.raises(TypeError, match=r"a name or a tensor \(16,\); got list"):
        codebook([0.0] * 16)
    with pytest.raises(ValueError, match=r"float tensor \(16,\); got torch.float32 \(8,\)"):
        codebook(torch.linspace(-1, 1, 8))
    with pytest.raises(ValueError, match=r"float tensor \(16,\); got torch.int64 \(16,\)"):
        codebook(torch.arange(16))
    descending, equal = torch.linspace(1, -1, 16), torch.zeros(16)
    infinite = torch.cat((torch.linspace(-1, 1, 15), torch.tensor([torch.inf])))
    for table in (descending, equal, infinite):
        with pytest.raises(ValueError, match="must be finite and strictly ascending"):
            codebook(table)


def test_a_default_device_does_not_catch_the_table() -> None:
    with torch.device("meta"):
        assert codebook("nf4").table().device.type == "cpu"


@pytest.mark.parametrize("name", sorted(CODEBOOKS))
@pytest.mark.parametrize("block", [32, 64, 1024])
def test_bin_masses_are_what_quantizing_normal_numbers_gives(name: str, block: int) -> None:
    masses = bin_masses(name, block)
    assert abs(float(masses.sum()) - 1) < 1e-9
    n = 1 << 20
    q = quantize_4bit(torch.randn(n), code=name, block_size=block)
    counts = torch.bincount(torch.cat((q.packed >> 4, q.packed & 15)).int(), minlength=16)
    # binomial: six standard deviations, and the quadrature's own error
    bound = 6 * (masses * (1 - masses) / n).sqrt() + 1e-5
    assert bool(((counts / n - masses).abs() <= bound).all())
