"""What the launchers launch is what the ahead-of-time gate compiles."""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lora_kernels.gpu
from lora_core.quant.double_quant import dynamic_map
from lora_core.quant.nf4 import quantize_4bit
from lora_kernels import Weight4, lora_linear4, matmul4, quantize4
from lora_kernels.gpu import routes4
from lora_kernels.gpu.variant import Variant

# what the interpreter decides otherwise than a GPU
ELSEWHERE = {"ASM", "PAIRS"}


@functools.cache  # before anything stands in a kernel's place
def listed() -> list[Variant]:
    found = []
    for info in pkgutil.iter_modules(lora_kernels.gpu.__path__):
        module = importlib.import_module(f"lora_kernels.gpu.{info.name}")
        found += module.variants() if hasattr(module, "variants") else []
    return found


class Recorder:
    """Stands where a kernel stood, notes the constants of each launch, and launches it."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            self.launches.append((self.kernel, options))
            return self.kernel[grid](*args, **options)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    monkeypatch.setenv("LORA_KERNELS", "triton")
    noted: list[tuple[Any, dict[str, Any]]] = []
    kernels = {id(variant.kernel): variant.kernel for variant in listed()}
    for info in pkgutil.iter_modules(lora_kernels.gpu.__path__):
        module = importlib.import_module(f"lora_kernels.gpu.{info.name}")
        for name, value in vars(module).copy().items():
            if id(value) in kernels:
                monkeypatch.setattr(module, name, Recorder(value, noted))
    return noted


def agrees(variant: Variant, kernel: Any, options: dict[str, Any]) -> bool:
    """Whether a launch compiles this variant, as far as the launch says."""
    constants = {k: v for k, v in options.items() if k.isupper() and k not in ELSEWHERE}
    expected = {k: v for k, v in variant.constants.items() if k.isupper() and k not in ELSEWHERE}
    return (
        variant.kernel is kernel
        and constants == expected
        and options.get("num_warps", 4) == variant.warps
        and options.get("num_stages", 1) == variant.stages
        and options.get("enable_fp_fusion", True) == variant.fp_fusion
    )


def weight() -> Weight4:
    q = quantize_4bit(torch.randn(64, 1024))
    nested = (q.scale_absmax, q.scale_offset, dynamic_map())
    return Weight4(q.packed, q.scales, q.code.table(), 64, 1024, 64, *nested)


def step(rows: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes4, "route", lambda *_: way)
    x = torch.randn(rows, 1024).bfloat16().requires_grad_()
    down = torch.randn(1, 16, 1024).requires_grad_()
    up = torch.randn(1, 64, 16).requires_grad_()
    w = weight()
    matmul4(x, w).sum().backward()
    lora_linear4(x, w, None, down, up, 2.0).sum().backward()


@pytest.mark.parametrize(
    ("rows", "way"),
    [(1, "planes"), (4, "planes"), (8, "planes"), (16, "halves"), (40, "halves"), (65, "dense")],
)
def test_a_step_launches_what_the_gate_compiles(
    rows: int, way: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step(rows, way, monkeypatch)
    assert launches
    variants = listed()
    for kernel, options in launches:
        assert any(agrees(v, kernel, options) for v in variants), (kernel, options)


def test_quantize_launches_what_the_gate_compiles(launches: list[Any]) -> None:
    quantize4(torch.randn(64, 1024).bfloat16(), torch.linspace(-1, 1, 16), 64)
    assert launches
    for kernel, options in launches:
        assert any(agrees(v, kernel, options) for v in listed()), (kernel, options)


def test_a_launch_with_another_tile_would_be_seen(
    launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step(1, "planes", monkeypatch)
    kernel, options = next(entry for entry in launches if "STRIPS" in entry[1])
    assert any(agrees(v, kernel, options) for v in listed())
    for changed in ({"STRIPS": 7}, {"num_warps": 8}, {"enable_fp_fusion": True}):
        assert not any(agrees(v, kernel, options | changed) for v in listed())
