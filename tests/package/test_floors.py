"""Imports go down only, and `lora_core` imports no triton."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {
    "lora_kernels": 0,
    "lora_core.targets": 1,
    "lora_core.device": 1,
    "lora_core.files": 1,
    "lora_core.calls": 1,
    "lora_core.quant": 2,
    "lora_core.losses": 2,
    "lora_core.data": 2,
    "lora_core.adapters": 3,
    "lora_core.models": 3,
    "lora_core.checkpoint": 4,
    "lora_core.evaluate": 4,
    "lora_core.report": 4,
    "lora_core.testing": 4,
    "lora_core.train": 5,
    "lora_core.plan": 6,
    "lora_core.tasks": 6,
    "lora_core.objectives": 7,
    "lora_core.runs": 8,
    "lora_core.compare": 9,
    "lora_core.cli": 10,
}


def room(module: str) -> str:
    return module if module == "lora_kernels" else ".".join(module.split(".")[:2])


def imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def upward(module: str, source: str) -> list[str]:
    """The imports of `source`, living in `module`, that do not go down."""
    here = room(module)
    found = []
    for target in imports(source):
        if target.split(".")[0] not in ("lora_core", "lora_kernels"):
            continue
        there = "lora_kernels" if target.startswith("lora_kernels") else room(target)
        if there == here:
            continue
        if there not in FLOORS or FLOORS[there] >= FLOORS[here]:
            found.append(target)
    return found


def modules() -> list[tuple[str, Path]]:
    found = []
    for base, package in ((ROOT, "lora_core"), (ROOT / "kernels", "lora_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts)
            found.append((name.removesuffix(".__init__"), path))
    return found


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_go_down(name: str, path: Path) -> None:
    if name in ("lora_core", "lora_core.__main__"):  # the roof: re-exports, and the entry point
        return
    first = "lora_kernels" if name.startswith("lora_kernels") else room(name)
    assert first in FLOORS, f"{name} stands on no floor: add it to FLOORS"
    module = "lora_kernels" if first == "lora_kernels" else name
    assert upward(module, path.read_text()) == []


def test_the_walk_sees_an_arrow_that_goes_up() -> None:
    assert upward("lora_core.quant.nf4", "from lora_core.adapters.lora import LoRA") == [
        "lora_core.adapters.lora"
    ]
    assert upward("lora_core.quant.nf4", "import lora_core.losses") == ["lora_core.losses"]
    assert upward("lora_core.train.loop", "from lora_core.losses import masked_cross_entropy") == []


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_triton_stays_in_the_kernels(name: str, path: Path) -> None:
    if name.startswith("lora_core"):
        assert "triton" not in {target.split(".")[0] for target in imports(path.read_text())}


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_init_holds_imports_and_a_sorted_all(name: str, path: Path) -> None:
    if path.name != "__init__.py":
        return
    body = ast.parse(path.read_text()).body[1:]  # after the docstring
    for node in body:
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in (
            "__all__",
            "__version__",
        )
        assert isinstance(node, ast.Import | ast.ImportFrom) or is_all, ast.unparse(node)
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert names == sorted(names, key=by_kind)


def by_kind(name: str) -> tuple[int, str]:
    """Constants, classes, functions: the order that the linter keeps `__all__` in."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_there_is_no_utils() -> None:
    assert [name for name, _ in modules() if name.endswith("utils")] == []
