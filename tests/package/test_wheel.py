"""The wheel, built and installed elsewhere, imports both packages and holds every data file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels.cpu.toolchain import BuildError, find_compiler

ROOT = Path(__file__).parents[2]
# the build's tools are those of the test extra, so that nothing is fetched
WHEEL_OPTIONS = ("--no-deps", "--no-build-isolation")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    # a copy, so that the build writes nothing into the checkout
    source = folder / "source"
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout.split(b"\0")
    for name in filter(None, (n.decode() for n in names)):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", *WHEEL_OPTIONS, "-w", str(folder), "."],
        cwd=source,
        check=True,
    )
    (wheel,) = folder.glob("lora_core-*.whl")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def test_both_packages_import_from_the_wheel(site: Path) -> None:
    code = "import lora_core, lora_kernels; print(lora_core.__file__, lora_kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
        cwd=site,
    )
    assert all(str(site) in path for path in done.stdout.split())


def test_every_data_file_travels(site: Path) -> None:
    for package, base in (("lora_core", ROOT), ("lora_kernels", ROOT / "kernels")):
        for path in (base / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (site / path.relative_to(base)).exists(), f"{path} is not in the wheel"


def test_importing_needs_torch_alone(site: Path) -> None:
    """With every other dependency made unimportable and no device to ask, it imports and runs."""
    code = """
import sys

def refuse(*args):
    raise AssertionError("a device was asked")

for name in ("is_available", "device_count", "current_device", "get_device_capability",
             "get_device_name", "get_device_properties", "init", "_lazy_init"):
    assert hasattr(torch.cuda, name)
    setattr(torch.cuda, name, refuse)
for name in ("safetensors", "tokenizers", "jinja2", "numpy", "tqdm", "triton", "matplotlib"):
    sys.modules[name] = None
import lora_core, lora_kernels
layer = lora_core.NF4Linear.from_linear(torch.nn.Linear(64, 8))
assert layer(torch.ones(2, 64)).shape == (2, 8)
"""
    # numpy is blocked after torch is in, since torch itself looks for it
    done = subprocess.run(
        [sys.executable, "-c", "import torch\n" + code],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
        cwd=site,
    )
    assert done.returncode == 0, done.stderr[-2000:]


NATIVE = """
import os, torch
import lora_core, lora_kernels

os.environ["LORA_KERNELS"] = "native"
line = lora_kernels.describe()["native"]
assert line.startswith("available: C for ") and os.environ["LORA_KERNELS_CACHE"] in line, line
layer = lora_core.NF4Linear.from_linear(torch.nn.Linear(256, 64))
w, x = layer.dense_weight(), torch.randn(3, 256)
y = layer(x)
os.environ["LORA_KERNELS"] = "reference"
assert torch.equal(layer.dense_weight(), w)
terms = x.abs() @ w.abs().t() + layer.bias.abs()  # what each of 257 roundings is relative to
assert ((layer(x) - y).abs() <= 2 * 257 * torch.finfo(torch.float32).eps * terms).all()
"""


def test_the_c_operators_are_built_from_the_wheel(site: Path, tmp_path: Path) -> None:
    """In a folder of its own and with a cache of its own: nothing of the checkout is used."""
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-c", NATIVE],
        env={**os.environ, "PYTHONPATH": str(site), "LORA_KERNELS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
        cwd=site,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1
