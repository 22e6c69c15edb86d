import pytest
import torch

from lora_kernels import backend_for, dequantize4, describe, matmul4, quantize4
from lora_kernels.blockwise4 import Weight4

X = torch.ones(2, 64)
TABLE = torch.linspace(-1, 1, 16)


def weight() -> Weight4:
    return Weight4(torch.zeros(64, dtype=torch.uint8), torch.ones(2), TABLE, 2, 64, 64)


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_the_reference_answers(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", choice)
    assert backend_for(X) == "reference"
    assert choice in describe()["selected"]
    assert matmul4(X, weight()).shape == (2, 2)


def test_auto_takes_the_fastest_that_is_offered() -> None:
    assert backend_for(X, ("reference", "native")) == "native"
    assert backend_for(X, ("reference", "triton")) == "reference"


@pytest.mark.parametrize("choice", ["native", "triton"])
@pytest.mark.parametrize(
    "call",
    [
        lambda: quantize4(X, TABLE, 64),
        lambda: dequantize4(torch.zeros(64, dtype=torch.uint8), torch.ones(2), TABLE, 64, 128),
        lambda: matmul4(X, weight()),
    ],
    ids=["quantize4", "dequantize4", "matmul4"],
)
def test_a_forced_backend_that_cannot_run_raises(
    call: object, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KERNELS", choice)
    with pytest.raises(ValueError, match=f"LORA_KERNELS={choice} cannot run: no operator"):
        call()
    assert f"{choice} cannot run" in describe()["selected"]


def test_backward_obeys_the_choice_too(monkeypatch: pytest.MonkeyPatch) -> None:
    y = matmul4(X.clone().requires_grad_(), weight())
    monkeypatch.setenv("LORA_KERNELS", "native")
    with pytest.raises(ValueError, match="LORA_KERNELS=native cannot run"):
        y.sum().backward()


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", "cuda")
    with pytest.raises(ValueError, match="LORA_KERNELS is 'cuda'; set it to auto, reference"):
        backend_for(X)


def test_describe_says_why_not() -> None:
    lines = describe()
    assert list(lines) == ["selected", "reference", "native", "triton"]
    assert lines["native"].startswith("not available: no operator")
