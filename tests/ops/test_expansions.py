"""What a recomputation expands serves the backward pass of the same layer, and nothing else."""

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_kernels import Weight4, expand4, expansions, matmul4
from lora_kernels.gpu import routes4
from lora_kernels.lora_linear import lora_linear4

MakeWeight = Callable[..., Weight4]


@pytest.fixture(params=["reference", "triton"])
def expands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A log of the expansions, by whatever function; of a GPU's routes the dense one alone."""
    monkeypatch.setenv("LORA_KERNELS", request.param)
    monkeypatch.setattr(routes4, "route", lambda *_: "dense")
    monkeypatch.setattr(routes4, "_fusable", lambda *_: False)
    log: list[str] = []

    def counted(name: str, module: Any) -> None:
        run = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            log.append(name)
            return run(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted("expand4", expansions)
    counted("dequantize4", expansions)
    counted("expand4_slice", routes4)
    if request.param == "reference":
        # the package's attribute of this name is the function
        counted("expand4", sys.modules["lora_kernels.matmul4"])
    return log


def layers(make_weight: MakeWeight, lora: bool, count: int = 3) -> list[Callable[[Tensor], Tensor]]:
    """Layers of two products each."""
    made = []
    for number in range(count):
        up = make_weight(48, 64, 32, seed=2 * number)
        down = make_weight(64, 48, 32, seed=2 * number + 1)
        pair = [torch.randn(2, 64, requires_grad=True), torch.randn(48, 2, requires_grad=True)]

        def layer(x: Tensor, up=up, down=down, pair=pair) -> Tensor:  # type: ignore[no-untyped-def]
            h = lora_linear4(x, up, None, *pair, 0.1) if lora else matmul4(x, up)
            return x + matmul4(h.tanh(), down)

        made.append(layer)
    return made


def run(made: list[Callable[[Tensor], Tensor]], x: Tensor, contexts: Any) -> Tensor:
    for layer in made:
        x = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    return x


def plain() -> Any:
    return torch.utils.checkpoint.noop_context_fn()


@pytest.mark.parametrize(("lora", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_three_expansions_become_two_and_the_gradient_stays(
    expands: list[str], make_weight: MakeWeight, lora: bool, dtype: torch.dtype
) -> None:
    made = layers(make_weight, lora)
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    counts, gradients = [], []
    for contexts in (plain, expansions.checkpoint_contexts):
        expands.clear()
        x.grad = None
        run(made, x, contexts).square().sum().backward()
        counts.append(len(expands))
        gradients.append(x.grad)
    assert counts == [3 * 6, 2 * 6]
    assert torch.equal(*gradients)


def test_a_weight_in_slices_is_kept_whole(
    make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KERNELS", "triton")
    monkeypatch.setattr(routes4, "SLICE_BYTES", 10 * 128 * 2)
    weight = make_weight(37, 128, 64)
    x, dy = torch.randn(3, 128).half(), torch.randn(3, 37).half()
    expected = x @ expand4(weight, x.dtype).t()
    shelf = expansions.Shelf()
    with shelf:
        y = routes4.dense_multiply(x, weight, None)
    assert shelf.nbytes == 37 * 128 * 2
    torch.testing.assert_close(y, expected)
    monkeypatch.setattr(routes4, "_slices", None)  # the gradient expands nothing
    torch.testing.assert_close(routes4.dense_dx(dy, weight), dy @ expand4(weight, dy.dtype))
    assert shelf.nbytes == 0


def test_nothing_is_kept_outside_of_a_recomputation(make_weight: MakeWeight) -> None:
    weight = make_weight(8, 32, 32)
    shelf = expansions.Shelf()
    with shelf:
        pass
    assert torch.equal(expansions.expanded(weight, torch.float32), expand4(weight, torch.float32))
    assert expansions.room(weight, torch.float32) is None
    assert shelf.nbytes == 0


def test_it_is_given_out_once_and_for_its_own_weight_and_dtype(make_weight: MakeWeight) -> None:
    weight, other = make_weight(8, 32, 32), make_weight(8, 32, 32)
    shelf = expansions.Shelf()
    with shelf:
        dense = expansions.expanded(weight, torch.float32)
    assert expansions.taken(other, torch.float32) is None
    assert expansions.taken(weight, torch.bfloat16) is None
    assert expansions.taken(weight, torch.float32) is dense
    assert expansions.taken(weight, torch.float32) is None


def test_codes_written_to_in_between_are_expanded_again(make_weight: MakeWeight) -> None:
    weight = make_weight(8, 32, 32)
    shelf = expansions.Shelf()
    with shelf:
        expansions.expanded(weight, torch.float32)
    weight.codes.zero_()
    assert expansions.taken(weight, torch.float32) is None


def test_the_oldest_make_room_and_what_is_too_large_is_not_kept(make_weight: MakeWeight) -> None:
    small = [make_weight(8, 32, 32, seed=i) for i in range(3)]
    large = make_weight(24, 32, 32)
    shelf = expansions.Shelf(limit=2 * 8 * 32 * 4)
    with shelf:
        for weight in (small[0], large, small[1], small[2]):
            expansions.expanded(weight, torch.float32)
    assert shelf.nbytes == shelf.limit
    found = [expansions.taken(weight, torch.float32) is not None for weight in (*small, large)]
    assert found == [False, True, True, False]


@pytest.mark.usefixtures("expands")
def test_nothing_outlives_the_backward_pass(
    make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer's gradient for x is not wanted, so nobody takes what it left."""
    made, left, alive = layers(make_weight, False), [], []
    put = expansions.Shelf.put

    def seen(shelf: expansions.Shelf, weight: Weight4, dense: Tensor) -> None:
        put(shelf, weight, dense)
        left.append(weakref.ref(dense))
        alive.append(sum(ref() is not None for ref in left))

    monkeypatch.setattr(expansions.Shelf, "put", seen)
    x, bias = torch.randn(5, 64), torch.zeros(64, requires_grad=True)
    made[0] = lambda x, first=made[0]: first(x) + bias
    loss = run(made, x, expansions.checkpoint_contexts).sum()
    gc.disable()
    try:
        loss.backward()
        assert len(left) >= 4
        assert max(alive) == 2  # of one layer at a time
        assert not any(ref() is not None for ref in left)
    finally:
        gc.enable()


@pytest.mark.usefixtures("expands")
def test_an_exception_in_backward_leaves_nothing(make_weight: MakeWeight) -> None:
    made = layers(make_weight, False, count=1)
    x = torch.randn(5, 64, requires_grad=True)

    def fails(_: Tensor) -> None:
        raise ZeroDivisionError

    def forward() -> None:
        y = run(made, x, expansions.checkpoint_contexts)
        y.register_hook(lambda grad: grad)
        x.register_hook(fails)
        y.sum().backward()

    with pytest.raises(ZeroDivisionError):
        forward()
    gc.collect()
    shelf = expansions._HERE.shelf
    assert shelf is None or shelf() is None


def test_backward_twice_recomputes_twice(expands: list[str], make_weight: MakeWeight) -> None:
    made, x = layers(make_weight, False), torch.randn(5, 64, requires_grad=True)
    loss = run(made, x, expansions.checkpoint_contexts).sum()
    loss.backward(retain_graph=True)
    first, x.grad = x.grad, None
    expands.clear()
    loss.backward()
    assert torch.equal(first, x.grad)
    assert len(expands) == 6


def test_the_next_recomputation_clears_what_the_last_one_left(make_weight: MakeWeight) -> None:
    weight, first, second = make_weight(8, 32, 32), expansions.Shelf(), expansions.Shelf()
    with first:
        expansions.expanded(weight, torch.float32)
    assert first.nbytes > 0
    with second:
        assert first.nbytes == 0
