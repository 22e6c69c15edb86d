import contextlib
from collections.abc import Callable

import pytest
import torch
import triton

from lora_kernels import backend_for, dequantize4, describe, dispatch, matmul4, quantize4
from lora_kernels.blockwise4 import Weight4
from lora_kernels.cpu import library

X = torch.ones(2, 64)
TABLE = torch.linspace(-1, 1, 16)
EVERYTHING = ("reference", "native", "triton")


@pytest.fixture(autouse=True)
def _auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever backend the other tests are run with."""
    monkeypatch.delenv("LORA_KERNELS", raising=False)
    monkeypatch.delenv("LORA_KERNELS_ISA", raising=False)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "why_not", lambda: "no C compiler: none is on the PATH")


@pytest.fixture
def a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "why_not", lambda: None)
    monkeypatch.setattr(library, "describe", lambda: "C for avx2, built by gcc 1.2.3")


def weight() -> Weight4:
    return Weight4(torch.zeros(64, dtype=torch.uint8), torch.ones(2), TABLE, 2, 64, 64)


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_the_reference_answers(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", choice)
    assert backend_for(X) == "reference"
    assert choice in describe()["selected"]
    assert matmul4(X, weight()).shape == (2, 2)


@pytest.mark.usefixtures("no_library")
def test_auto_without_a_library_takes_the_reference() -> None:
    assert backend_for(X, EVERYTHING) == "reference"  # the interpreter has to be asked for


@pytest.mark.usefixtures("a_library")
def test_auto_takes_the_fastest_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_for(X, EVERYTHING) == "native"
    assert backend_for(X.to("meta"), EVERYTHING) == "reference"
    monkeypatch.setattr(dispatch, "_why_absent", lambda backend, device: None)
    assert backend_for(X, ("reference", "triton")) == "reference"
    monkeypatch.setattr(dispatch, "_PREFERENCE", {"cpu": ("triton", "reference")})
    assert backend_for(X, EVERYTHING) == "triton"
    assert backend_for(X) == "reference"


CALLS = {
    "quantize4": lambda: quantize4(X, TABLE, 64),
    "dequantize4": lambda: dequantize4(
        torch.zeros(64, dtype=torch.uint8), torch.ones(2), TABLE, 64, 128
    ),
    "matmul4": lambda: matmul4(X, weight()),
}


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_forced_backend_that_cannot_run_raises(
    call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KERNELS", "native")
    with pytest.raises(ValueError, match="LORA_KERNELS=native cannot run: "):
        call()
    assert "native cannot run" in describe()["selected"]
    monkeypatch.setenv("LORA_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="LORA_KERNELS=triton cannot run: no GPU for it: kernels"):
        call()
    assert "triton cannot run" in describe()["selected"]


@pytest.mark.usefixtures("no_library")
def test_the_librarys_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", "native")
    why = "LORA_KERNELS=native cannot run: no C compiler: none is on the PATH; set LORA_KERNELS="
    with pytest.raises(ValueError, match=why):
        backend_for(X, EVERYTHING)
    with pytest.raises(ValueError, match="cannot run: it is for CPU tensors, not meta"):
        backend_for(X.to("meta"), EVERYTHING)


@pytest.mark.parametrize("choice", ["auto", "native", "reference"])
def test_nothing_is_compiled_for_an_operator_without_c(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_now() -> None:
        raise AssertionError("it would compile now")

    monkeypatch.setattr(library, "why_not", compile_now)
    monkeypatch.setenv("LORA_KERNELS", choice)
    if choice == "native":
        with pytest.raises(ValueError, match="cannot run: this operator has no native implement"):
            backend_for(X, ("reference", "triton"))
        with pytest.raises(AssertionError, match="compile now"):
            backend_for(X, EVERYTHING)
    else:
        assert backend_for(X, ("reference", "triton")) == "reference"


def test_every_reason_against_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", "triton")
    with pytest.raises(ValueError, match="cannot run: no Triton kernels run on meta"):
        backend_for(X.to("meta"), ("reference", "triton"))
    with pytest.raises(ValueError, match="cannot run: this operator has no triton implementation"):
        backend_for(X)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="cannot run: the package triton is not installed"):
        backend_for(X, ("reference", "triton"))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    reason = dispatch._why_absent("triton", torch.device("cuda", 0))
    assert reason == "NVIDIA T4 has compute capability 7.5, below 8.0"
    dispatch._too_old.cache_clear()


@pytest.mark.parametrize("no_compiler", [True, False])
def test_triton_that_does_not_start(no_compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def get_current_target(self) -> None:
            if no_compiler:
                raise RuntimeError("Failed to find C compiler. Please …\nand more")

    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    reason = dispatch._why_absent("triton", torch.device("cuda", 0))
    if no_compiler:
        assert reason == "Triton does not start: Failed to find C compiler. Please …"
    else:
        assert reason is None
    for cached in (dispatch._too_old, dispatch._does_not_start):
        cached.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_backward_obeys_the_choice_too(monkeypatch: pytest.MonkeyPatch) -> None:
    y = matmul4(X.clone().requires_grad_(), weight())
    monkeypatch.setenv("LORA_KERNELS", "native")
    with pytest.raises(ValueError, match="LORA_KERNELS=native cannot run"):
        y.sum().backward()


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", "cuda")
    with pytest.raises(ValueError, match="LORA_KERNELS is 'cuda'; set it to auto, reference"):
        backend_for(X)


@pytest.mark.usefixtures("no_library")
def test_describe_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe()["triton"].startswith("available: triton 3.")  # in the interpreter
    monkeypatch.delenv("TRITON_INTERPRET")
    lines = describe()
    assert lines["triton"].startswith("not available: no GPU for it")
    assert list(lines) == ["selected", "reference", "native", "triton"]
    assert lines["native"] == "not available: no C compiler: none is on the PATH"
    assert lines["selected"] == "reference (LORA_KERNELS=auto: nothing faster is available)"


@pytest.mark.usefixtures("a_library")
def test_describe_says_what_c_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe()["native"] == "available: C for avx2, built by gcc 1.2.3"
    assert describe()["selected"] == "native (LORA_KERNELS=auto: on cpu)"
    monkeypatch.setenv("LORA_KERNELS", "native")
    assert describe()["selected"] == "native (LORA_KERNELS=native)"


@pytest.mark.usefixtures("a_library")
def test_describe_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors still take C there, though it is not what runs on the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "_too_old", lambda device: "NVIDIA T4 is too old")
    lines = describe()
    assert lines["native"] == "available: C for avx2, built by gcc 1.2.3"
    assert lines["triton"] == "not available: NVIDIA T4 is too old"
    assert lines["selected"] == "reference (LORA_KERNELS=auto: nothing faster is available)"


def test_an_operator_works_outside_of_autocast_whoever_calls_it() -> None:
    assert isinstance(dispatch.inside(X), contextlib.nullcontext)  # nothing is there to switch off
    with torch.autocast("cpu", torch.bfloat16):
        with dispatch.inside(X):
            assert not torch.is_autocast_enabled("cpu")
            assert (X @ X.T).dtype == torch.float32
        assert (X @ X.T).dtype == torch.bfloat16
