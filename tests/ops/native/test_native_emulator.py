"""The emulated processor of conftest.py notices what it is there for (faults.c)."""

import re
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def image(bare_program: Callable[..., bytes]) -> bytes:
    return bare_program([Path(__file__).parent / "faults.c"])


@pytest.fixture
def run(image: bytes, arm: Callable, run_on: Callable[[Any], Any]) -> Any:
    """The functions of faults.c, called with tensors."""
    return run_on(arm(image)).function


@pytest.fixture
def fails() -> Callable[..., Any]:
    """Expect a test to fail: `with fails("read_at")`."""
    return lambda text: pytest.raises(pytest.fail.Exception, match=re.escape(text))


@pytest.mark.parametrize("size", [1, 3, 64, 4096, 5000])
@pytest.mark.parametrize("name", ["read_at", "write_at"])
def test_a_byte_beside_a_tensor(name: str, size: int, run: Callable, fails: Callable) -> None:
    t = torch.zeros(size, dtype=torch.uint8)
    function = run("write_at", c_void_p, c_int64)
    for i in {0, size - 1}:
        t[i] = 0
        function(t.data_ptr(), i)
        assert t[i] == 1
    t.zero_()
    with fails(name):
        run(name, c_void_p, c_int64)(t.data_ptr(), -1)
    with fails(name):
        run(name, c_void_p, c_int64)(t.data_ptr(), size)


def test_a_pointer_into_a_tensor_reaches_its_ends_and_no_further(
    run: Callable, fails: Callable
) -> None:
    t = torch.zeros(100, dtype=torch.uint8)[10:90]
    function = run("write_at", c_void_p, c_int64)
    function(t.data_ptr() + 40, -40)
    function(t.data_ptr() + 40, 39)
    assert (t[0], t[79]) == (1, 1)
    for i in (-41, 40):
        with fails("write_at"):
            function(t.data_ptr() + 40, i)
    with pytest.raises(AssertionError, match="no tensor whose address"):
        function(t.data_ptr() + 80, 0)


def test_memory_that_is_kept_freed_or_overrun(run: Callable, fails: Callable) -> None:
    with pytest.raises(AssertionError, match="keep_memory has kept memory"):
        run("keep_memory")()
    with fails("use_freed"):
        run("use_freed")()
    run("run_past_memory", c_int64)(127)
    for i in (-1, 128):
        with fails("run_past_memory"):
            run("run_past_memory", c_int64)(i)


def test_a_result_that_depends_on_the_address(run: Callable) -> None:
    with pytest.raises(AssertionError, match="depends on where its tensors lie"):
        run("tell_address", c_void_p)(torch.zeros(8, dtype=torch.uint8).data_ptr())


@pytest.mark.parametrize("name", ["dot_product", "half_sum"])
def test_instructions_of_later_processors(name: str, run: Callable, fails: Callable) -> None:
    with fails(name):
        run(name)()


def test_atomics_of_later_processors(run: Callable, fails: Callable) -> None:
    with fails("atomic_sum"):
        run("atomic_sum", c_void_p)(torch.zeros(1, dtype=torch.int32).data_ptr())


def test_arguments(image: bytes, arm: Callable) -> None:
    integers = [-1, 2, 3, 4, 5, 6, 7, 8, 9]
    expected = sum(i * n for i, n in enumerate(integers, 1)) + 3
    a, b, *rest, i = integers
    assert arm(image).call("sum_of", a, 7.5, b, *rest, 2.5, i) == expected
    assert arm(image).call("sum_of", 0, 1.0, 0, *[0] * 6, 2.0, 0) == 0


def test_a_failure_leaves_no_memory_behind(image: bytes, arm: Callable, run_on: Callable) -> None:
    emulated = run_on(arm(image))
    with pytest.raises(pytest.fail.Exception):
        emulated.function("read_at", c_void_p, c_int64)(torch.zeros(9).data_ptr(), 99)
    assert not emulated.processor.rooms
