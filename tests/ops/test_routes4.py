"""Which route a product takes, and the one that expands W slice by slice."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core.quant.double_quant import dynamic_map
from lora_core.quant.nf4 import quantize_4bit
from lora_kernels import Weight4, matmul4
from lora_kernels.gpu import routes4, tuned
from lora_kernels.gpu.tuned import DEFAULT, Crossover, crossover

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", "triton")


@pytest.fixture
def tuned_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "tuned.json"
    read = tuned.read_tuned
    monkeypatch.setattr(tuned, "read_tuned", lambda: read(path))
    crossover.cache_clear()
    yield path
    crossover.cache_clear()
    read.cache_clear()


def make(n: int, k: int, block: int = 64) -> tuple[Weight4, Tensor]:
    q = quantize_4bit(torch.randn(n, k), block_size=block, double_quant=True)
    nested = (q.scale_absmax, q.scale_offset, dynamic_map())
    return Weight4(q.packed, q.scales, q.code.table(), n, k, block, *nested), q.dequantize()


# --- the choice ----------------------------------------------------------------------------------


def of_size(n: int, k: int, block: int = 64) -> Weight4:
    """No data: the choice looks at sizes alone."""
    empty = torch.empty(0, dtype=torch.uint8)
    return Weight4(empty, empty, torch.empty(0), n, k, block)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(1, "planes"), (4, "planes"), (5, "halves"), (128, "halves"), (129, "dense")],
)
def test_more_rows_move_on_to_the_next_route(rows: int, expected: str) -> None:
    large = of_size(4096, 14336)
    assert routes4.route(rows, large, torch.bfloat16, CPU) == expected
    small = of_size(1024, 4096)  # splitting x into digits would cost more than it saves
    assert routes4.route(rows, small, torch.float16, CPU) == expected.replace("planes", "halves")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_expand(dtype: torch.dtype) -> None:
    assert routes4.route(1, of_size(4096, 4096), dtype, CPU) == "dense"


def test_rows_that_are_no_whole_blocks_expand() -> None:
    assert routes4.route(1, of_size(4096, 4100), torch.bfloat16, CPU) == "dense"
    assert routes4.route(1, of_size(0, 64), torch.bfloat16, CPU) == "dense"


def test_what_was_measured_goes_before_the_default(tuned_file: Path) -> None:
    entry = {"planes": 8, "halves": 64, "dx": 32, "source": "a run"}
    tuned_file.write_text(json.dumps({"Some GPU": {"4096x4096/bfloat16": entry}}))
    assert crossover("Some GPU", 4096, 4096, torch.bfloat16) == Crossover(8, 64, 32)
    assert crossover("Some GPU", 4096, 4096, torch.float16) == DEFAULT
    assert crossover("Other GPU", 4096, 4096, torch.bfloat16) == DEFAULT
    assert crossover(None, 4096, 4096, torch.bfloat16) == DEFAULT


def test_measured_tiles_change_the_default_one(tuned_file: Path) -> None:
    tiles = {"halves": {"16": {"warps": 8}, "64": {"splits": 2}}}
    entry = {"planes": 8, "halves": 64, "dx": 32, "tiles": tiles}
    tuned_file.write_text(json.dumps({"Some GPU": {"4096x4096/bfloat16": entry}}))
    tuned.tile_fields.cache_clear()
    where = ("Some GPU", 4096, 4096, torch.bfloat16)
    assert tuned.tile_fields(*where, "halves", 16) == {"warps": 8}
    assert tuned.tile_fields(*where, "halves", 17) == {"splits": 2}
    assert tuned.tile_fields(*where, "halves", 65) == {}
    assert tuned.tile_fields(*where, "dx", 1) == {}
    tuned.tile_fields.cache_clear()


def test_no_table_is_the_default(tuned_file: Path) -> None:
    assert not tuned_file.exists()
    assert crossover("Some GPU", 4096, 4096, torch.bfloat16) == DEFAULT


def test_the_shipped_table_is_sound() -> None:
    for shapes in tuned.read_tuned().values():
        for shape, entry in shapes.items():
            size, dtype = shape.split("/")
            assert all(int(part) > 0 for part in size.split("x"))
            assert hasattr(torch, dtype)
            assert 0 <= entry["planes"] <= entry["halves"]
            assert entry["dx"] >= 0


# --- every route gives the product ---------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["planes", "halves", "dense"])
def test_every_route_gives_the_product(
    way: str, dtype: torch.dtype, as_accurate_as: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes4, "route", lambda *_: way)
    weight, w = make(40, 192)
    x, bias = torch.randn(3, 192).to(dtype), torch.randn(40)
    y = matmul4(x[:, None], weight, bias)[:, 0]
    theirs = torch.nn.functional.linear(x, w.to(dtype), bias.to(dtype))
    truth = torch.nn.functional.linear(x.double(), w.double(), bias.double())
    as_accurate_as(y, theirs, truth)


@pytest.mark.parametrize("limit", [0, 64])
def test_both_ways_back_give_dx(
    limit: int, as_accurate_as: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes4, "crossover", lambda *_: DEFAULT._replace(dx=limit))
    weight, w = make(40, 192)
    x = torch.zeros(3, 192, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(3, 40).bfloat16()
    (dx,) = torch.autograd.grad(matmul4(x, weight), x, dy)
    as_accurate_as(dx, dy @ w.bfloat16(), dy.double() @ w.double())


@pytest.mark.parametrize(
    ("way", "module", "name"),
    [
        ("planes", routes4.planes4, "multiply"),
        ("halves", routes4.matmul4, "multiply"),
        ("dx", routes4.matmul4, "multiply_dx"),
    ],
)
def test_a_measured_tile_reaches_the_kernel(
    way: str, module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    tiles: list[Any] = []
    run = getattr(module, name)
    monkeypatch.setattr(routes4, "tile_fields", lambda *args: asked.append(args) or {"splits": 2})
    monkeypatch.setattr(module, name, lambda *args: tiles.append(args[-1]) or run(*args))
    weight, w = make(64, 1024)
    if way == "dx":
        dy = torch.randn(3, 64).half()
        ours, theirs = routes4.multiply_dx(dy, weight), dy.double() @ w.double()
    else:
        x = torch.randn(3, 1024).half()
        ours, theirs = (
            routes4.fused_multiply(way, x, weight, None, None)[0],
            x.double() @ w.T.double(),
        )
    assert [tile.splits for tile in tiles] == [2]
    assert asked == [(None, 64, 1024, torch.float16, way, 3)]
    assert (ours - theirs).abs().max() < 0.01 * theirs.abs().max()


@pytest.mark.parametrize(("rows", "fused"), [(1, True), (64, True), (65, False)])
def test_many_rows_of_dy_expand(rows: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []
    for place, name in ((routes4, "dense_dx"), (routes4.matmul4, "multiply_dx")):
        monkeypatch.setattr(place, name, lambda *args, name=name: ways.append(name) or args[0])
    weight, _ = make(8, 64)
    routes4.multiply_dx(torch.ones(rows, 8).bfloat16(), weight)
    routes4.multiply_dx(torch.ones(rows, 8), weight)  # float32 always
    assert ways == ["multiply_dx" if fused else "dense_dx", "dense_dx"]


def test_the_gpu_is_named_for_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    assert routes4._name(torch.device("cuda:7")) == "GPU of cuda:7"
    assert routes4._name(CPU) is None
    routes4._name.cache_clear()


@pytest.mark.parametrize("way", ["planes", "halves", "dense", "dx"])
def test_columns_of_x_may_lie_apart(way: str) -> None:
    weight, _ = make(64, 128)
    x = torch.randn(3, 64 if way == "dx" else 128).half()
    apart = x.t().contiguous().t()

    def run(x: Tensor) -> Tensor:
        if way == "dx":
            return routes4.multiply_dx(x, weight)
        if way == "dense":
            return routes4.dense_multiply(x, weight, None)
        return routes4.fused_multiply(way, x, weight, None, None)[0]

    assert (run(apart) - run(x)).abs().max() <= 2.0**-9 * run(x).abs().max()


@pytest.mark.parametrize("way", ["planes", "halves", "dense"])
def test_tensors_with_gaps(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes4, "route", lambda *_: way)
    weight, _ = make(40, 128)
    x, bias = torch.randn(3, 128).bfloat16(), torch.randn(40)
    apart = {
        name: torch.stack((t, t), -1)[..., 0]
        for name, t in weight._asdict().items()
        if isinstance(t, Tensor)
    }
    y = matmul4(x, weight, bias)
    assert torch.equal(matmul4(x, weight, torch.stack((bias, bias), 1)[:, 0]), y)
    assert torch.equal(matmul4(x, weight._replace(**apart), bias), y)


# --- slices --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows_a_slice", [1, 7, 16, 40, 41])
def test_slices_of_rows_add_up_to_the_product(
    rows_a_slice: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch, as_accurate_as: Any
) -> None:
    weight, w = make(40, 128)
    x, bias = torch.randn(5, 128).half(), torch.randn(40) if has_bias else None
    monkeypatch.setattr(routes4, "SLICE_BYTES", rows_a_slice * 128 * 2)
    y = routes4.dense_multiply(x, weight, bias)
    theirs = torch.nn.functional.linear(x, w.half(), None if bias is None else bias.half())
    exact = None if bias is None else bias.double()
    as_accurate_as(y, theirs, torch.nn.functional.linear(x.double(), w.double(), exact))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("columns_a_slice", [1, 64, 130, 192])
def test_slices_of_columns_add_up_to_dx(
    columns_a_slice: int, monkeypatch: pytest.MonkeyPatch, as_accurate_as: Any
) -> None:
    weight, w = make(40, 192)
    dy = torch.randn(5, 40).half()
    monkeypatch.setattr(routes4, "SLICE_BYTES", columns_a_slice * 40 * 2)
    as_accurate_as(routes4.dense_dx(dy, weight), dy @ w.half(), dy.double() @ w.double())


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_allocated_twice(backward: bool, live_bytes: Any) -> None:
    weight, _ = make(40, 64)
    x = torch.randn(1000, 40 if backward else 64).half()
    with live_bytes:
        y = routes4.dense_dx(x, weight) if backward else routes4.dense_multiply(x, weight, None)
    assert live_bytes.peak < 1.2 * y.nbytes  # of one slice the product is the result


def test_a_slice_is_no_larger_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes4, "SLICE_BYTES", 16 * 128 * 2)
    weight, _ = make(40, 128)
    slices = [w.shape for _, _, w in routes4._slices(weight, 40, 128, torch.empty(0).half(), 0)]
    assert slices == [(16, 128), (16, 128), (8, 128)]
    slices = [w.shape for _, _, w in routes4._slices(weight, 128, 40, torch.empty(0).half(), 1)]
    assert slices == [(40, 64), (40, 64)]  # a column slice is at least a block
