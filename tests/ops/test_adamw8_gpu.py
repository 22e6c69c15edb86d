"""The Triton step with 8-bit moments in the interpreter, against the definition bit for bit."""

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_kernels.adamw8 import Moments8, adamw8_, no_moments
from lora_kernels.gpu import adamw8 as gpu

SETTINGS: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
SETTINGS |= {"weight_decay": 0.1}
MARGIN = 64  # bytes beside a tensor


class Arena:
    """Tensors in one piece of memory, apart from each other, and which bytes of it are theirs."""

    def __init__(self, size: int = 1 << 20) -> None:
        self.memory = torch.full((size,), 0xA5, dtype=torch.uint8)
        self.own = np.zeros(size, bool)
        self.end = 0

    def put(self, tensor: Tensor, odd: int = 0) -> Tensor:
        """A copy of a tensor, `odd` bytes off a multiple of 64."""
        start = self.end + odd
        size = tensor.numel() * tensor.element_size()
        self.end = -(-(start + size + MARGIN) // 64) * 64
        self.own[start : start + size] = True
        place = self.memory[start : start + size].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor)

    def untouched(self) -> bool:
        """Whether nothing was written beside the tensors."""
        return bool((self.memory.numpy()[~self.own] == 0xA5).all())


@pytest.fixture
def arena() -> Arena:
    return Arena()


@pytest.fixture(autouse=True)
def _within_bounds(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the place of the fixture that knows a kernel's arguments: here they are addresses."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder, launch = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store
    tables: list[tuple[int, int]] = []

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        tables[:] = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in given]
        launch(self, *args, **kwargs)

    def check(pointers: Any, mask: Any) -> None:
        let = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        width = pointers.get_element_ty().primitive_bitwidth // 8
        base = arena.memory.data_ptr()
        for at in map(int, pointers.data[let]):
            if not any(low <= at and at + width <= high for low, high in tables):
                assert 0 <= at - base < len(arena.own), "an address of nothing"
                assert arena.own[at - base : at - base + width].all(), "a byte is no tensor's"

    def loaded(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *more)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *more)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(builder, "create_masked_load", loaded)
    monkeypatch.setattr(builder, "create_masked_store", stored)
    yield
    assert arena.untouched()


def drawn(shape: tuple[int, ...]) -> Tensor:
    g = torch.randn(shape) * 10 ** (2 * torch.randn(shape))
    return g * (torch.rand(shape) > 0.2)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("sizes", "odd", "aligned"),
    [
        ([(16,), (64, 20), (256,), (1040,)], 0, True),
        ([(3,), (0,), (257,), (20, 77), (1,)], 0, False),
        ([(256,), (48,)], 4, False),
    ],
)
def test_a_step_in_the_interpreter_is_the_definition(
    arena: Arena,
    sizes: list[tuple[int, ...]],
    odd: int,
    aligned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(3)
    theirs = [torch.randn(shape) for shape in sizes]
    their_moments = [no_moments(p) for p in theirs]
    ours = [arena.put(p, odd) for p in theirs]
    our_moments = [Moments8(*map(arena.put, state)) for state in their_moments]
    noted = []
    constants = gpu._constants
    monkeypatch.setattr(gpu, "_constants", lambda a: noted.append(a) or constants(a))
    for step in (1, 2, 3):
        grads = [drawn(shape) for shape in sizes]
        monkeypatch.setenv("LORA_KERNELS", "reference")
        adamw8_(theirs, grads, their_moments, step=step, **SETTINGS)
        monkeypatch.setenv("LORA_KERNELS", "triton")
        adamw8_(ours, [arena.put(g) for g in grads], our_moments, step=step, **SETTINGS)
    assert noted == [aligned] * 3
    assert all(map(torch.equal, ours, theirs))
    for one, other in zip(our_moments, their_moments, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_write_beside_a_tensor_would_be_seen(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table's last column is the number of elements: one too many, and the check must bite."""
    sent = gpu._sent

    def longer(numbers: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
        return sent(
            [[*row[:-1], row[-1] + 1] for row in numbers] if dtype == torch.int64 else numbers,
            dtype,
            device,
        )

    monkeypatch.setattr(gpu, "_sent", longer)
    monkeypatch.setenv("LORA_KERNELS", "triton")
    p, g = arena.put(torch.randn(30)), arena.put(torch.randn(30))
    moments = Moments8(*map(arena.put, no_moments(p)))
    with pytest.raises(Exception, match="a byte is no tensor's"):
        adamw8_([p], [g], [moments], step=1, **SETTINGS)


def test_the_gate_compiles_what_is_launched(monkeypatch: pytest.MonkeyPatch, arena: Arena) -> None:
    launches = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: launches.append(options)

    listed = gpu.variants()
    monkeypatch.setattr(gpu, "_kernel", Recorder())
    monkeypatch.setenv("LORA_KERNELS", "triton")
    for n in (64, 65):
        p = torch.zeros(n)
        adamw8_([p], [torch.ones(n)], [no_moments(p)], step=1, **SETTINGS)
    for options, variant in zip(launches, listed, strict=True):
        constants = {k: v for k, v in options.items() if k.isupper()}
        assert constants == variant.constants
        assert options["num_warps"] == variant.warps
        assert options["enable_fp_fusion"] is variant.fp_fusion is False


def test_programs_of_many_tensors() -> None:
    tensor_of, first_of = gpu._programs((1, 0, 1024, 1025, 5000), torch.device("cpu"))
    assert tensor_of.tolist() == [0, 2, 3, 3, 4, 4, 4, 4, 4]
    assert first_of.tolist() == [0, 0, 0, 4, 0, 4, 8, 12, 16]
