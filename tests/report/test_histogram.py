"""Weights by the bins of a 4-bit code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import LoRAConfig, add_adapter, merge_adapters
from lora_core.quant import NF4Linear, bin_masses, codebook, quantize_model
from lora_core.report import model_bins, weight_bins
from lora_core.report.histogram import CELLS

Make = Callable[..., Any]


def by_hand(weight: Tensor, code: str, block: int) -> list[int]:
    """Nearest level of each w / absmax, one at a time."""
    levels = sorted(set(codebook(code).table().tolist()))
    counts = [0] * len(levels)
    flat = weight.flatten().tolist()
    for start in range(0, len(flat), block):
        part = flat[start : start + block]
        scale = max(map(abs, part)) or 1.0
        for w in part:
            counts[min(range(len(levels)), key=lambda i: abs(w / scale - levels[i]))] += 1
    return counts


@pytest.mark.parametrize("code", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("shape", [(8, 64), (5, 33), (1, 1), (3, 7)])
def test_counts_are_those_of_the_definition(code: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    found = weight_bins(weight, code, 32)
    assert list(found.counts) == by_hand(weight, code, 32)
    assert found.total == weight.numel()
    assert list(found.levels) == sorted(set(found.levels))
    assert len(found.edges) == len(found.levels) - 1
    assert found.fine is not None
    assert sum(found.fine) == weight.numel()
    assert len(found.fine) == CELLS


def test_the_fine_cells_are_where_the_weights_are() -> None:
    weight = torch.full((64,), 0.5)
    weight[0] = -1.0  # the block's largest magnitude
    fine = weight_bins(weight).fine
    assert fine is not None
    assert fine[0] == 1
    assert fine[int(0.75 * CELLS)] == 63
    assert sum(weight_bins(torch.zeros(64)).fine or ()) == 64


def test_normal_weights_fill_the_bins_as_computed() -> None:
    found = weight_bins(torch.randn(4096, 64))
    expected = bin_masses("nf4", 64).tolist()  # ascending, as nf4's codes are
    assert found.shares == pytest.approx(expected, abs=0.0015)
    assert max(found.shares) - min(found.shares) > 0.02  # not equal use


def test_a_layer_in_4_bits_is_counted_by_its_codes() -> None:
    for shape in ((64, 8), (33, 5)):
        linear = nn.Linear(*shape)
        packed = NF4Linear.from_linear(linear, block_size=32)
        found = weight_bins(packed, "int4", 64)  # its own code and block size count
        assert (found.code, found.block_size, found.fine) == ("nf4", 32, None)
        assert found.counts == weight_bins(linear, "nf4", 32).counts


def test_a_large_weight_is_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 33)
    whole = weight_bins(weight, block_size=32)
    monkeypatch.setattr("lora_core.report.histogram._CHUNK", 128)
    assert weight_bins(weight, block_size=32) == whole


def test_a_model_is_the_sum_of_its_layers(small_decoder: Make) -> None:
    model = small_decoder(num_hidden_layers=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    inner = [m for n, m in linears.items() if n != "lm_head"]
    total = sum(m.weight.numel() for m in inner)
    before = model_bins(model, block_size=32)
    assert (before.layers, before.total) == (len(inner), total)
    assert list(before.counts) == [
        sum(c) for c in zip(*(weight_bins(m, "nf4", 32).counts for m in inner), strict=True)
    ]
    add_adapter(model, LoRAConfig(r=2))  # adapters are no weights of the base
    assert model_bins(model, block_size=32) == before
    merge_adapters(model)
    assert model_bins(model, block_size=32) == before


def test_layers_left_dense_by_quantizing_are_left_out(small_decoder: Make) -> None:
    model = small_decoder()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    dense = model_bins(model, block_size=32)
    skipped = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("q_proj"))
    quantize_model(model, skip=["q_proj"], block_size=32)
    found = model_bins(model)
    assert found.fine is None
    assert found.total == dense.total - skipped


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no linear layer whose weights could be counted"):
        model_bins(nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"bins of \('nf4', 64\) and of \('int4', 64\) cannot"):
        _ = weight_bins(torch.ones(4)) + weight_bins(torch.ones(4), "int4")
    with pytest.raises(ValueError, match="is nan in float32; 4-bit codes need finite values"):
        weight_bins(torch.tensor([float("nan")]))
    with pytest.raises(TypeError, match="has no dense weight"):
        weight_bins(nn.Dropout())
