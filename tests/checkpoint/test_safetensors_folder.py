"""Tensors of a folder in memory of their own: what the mapped file holds, nothing of it kept."""

import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_core.checkpoint import safetensors_folder
from lora_core.checkpoint.safetensors_folder import DTYPES, Entry, SafetensorsFolder

SHAPES = [(), (0, 3), (1,), (7, 5)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_read_is_the_mapped_tensor_in_other_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randint(0, 2, s).to(dtype) for i, s in enumerate(SHAPES)}
    save_file(tensors, tmp_path / "model.safetensors")
    with SafetensorsFolder(tmp_path) as folder:
        for name, tensor in tensors.items():
            own = folder.read(name)
            assert own.dtype == dtype
            assert torch.equal(own, tensor)
            assert torch.equal(folder.tensor(name), tensor)
            own.zero_()
            assert torch.equal(folder.read(name), tensor)


def test_reading_leaves_no_mapped_pages_behind(tmp_path: Path) -> None:
    save_file({"big": torch.rand(8 << 20)}, tmp_path / "model.safetensors")  # 32 MB

    def mapped() -> int:
        """Bytes of this process's mapped files that are resident."""
        text = Path("/proc/self/status").read_text()
        return int(text.partition("RssFile:")[2].split()[0]) * 1024

    with SafetensorsFolder(tmp_path) as folder:
        before = mapped()
        own = folder.read("big")
        assert mapped() - before < own.nbytes / 4
        total = folder.tensor("big").sum()  # and the measure sees pages of a mapped file
        assert mapped() - before > own.nbytes / 2
    assert own.sum() == total
    gc.collect()


def test_a_file_cut_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    with SafetensorsFolder(tmp_path) as folder:
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match="ends within tensor a"):
            folder.read("a")


@pytest.mark.parametrize("ahead", [1, 50_000, 1 << 26])
def test_reading_ahead_keeps_order_and_bound(
    ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_folder, "AHEAD_BYTES", ahead)
    sizes = [10, 0, 5000, 5000, 1, 4000, 7000, 2, 3, 2]
    tensors = {f"t{i}": torch.randn(n, dtype=torch.float64) for i, n in enumerate(sizes)}
    save_file(tensors, tmp_path / "model.safetensors")
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = number = 0
    real = SafetensorsFolder._fill

    def counted(self: SafetensorsFolder, tensor: torch.Tensor, entry: Entry) -> None:
        nonlocal most, number
        alive.add(tensor)
        real(self, tensor, entry)
        held = [t.nbytes for t in list(alive)]
        most, number = max(most, sum(held)), max(number, len(held))

    monkeypatch.setattr(SafetensorsFolder, "_fill", counted)
    names = sorted(tensors, reverse=True)
    with SafetensorsFolder(tmp_path) as folder:
        reader = folder.read_ahead(names)
        for name in names:
            tensor = next(reader)
            assert torch.equal(tensor, tensors[name])
            del tensor
        assert next(reader, None) is None
    # 56,000 bytes, the largest, are two of its size in float32: none beside it
    assert most <= max(ahead, 56_000)
    assert ahead > 1 or number <= 2  # the caller's and the next
    assert list(folder.read_ahead([])) == []


@pytest.mark.parametrize("ahead", [1, 1 << 26])
def test_the_next_tensor_is_read_while_the_caller_works(
    ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_folder, "AHEAD_BYTES", ahead)
    tensors = {f"t{i}": torch.randn(100) for i in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    real, begun = folder._fill, threading.Event()

    def noted(tensor: torch.Tensor, entry: Entry) -> None:
        if entry.name == "t1":
            begun.set()
        real(tensor, entry)

    folder._fill = noted  # type: ignore[method-assign]
    reader = folder.read_ahead(tensors)
    next(reader)
    assert begun.wait(10)


def test_an_error_of_a_reading_thread_reaches_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000), "b": torch.ones(1000)}, path)
    with SafetensorsFolder(tmp_path) as folder:
        reader = folder.read_ahead(["a", "b"])
        path.write_bytes(path.read_bytes()[:-1])
        assert torch.equal(next(reader), torch.ones(1000))
        with pytest.raises(ValueError, match="ends within tensor b"):
            next(reader)


def test_tensors_by_other_names(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.zeros(1)}, tmp_path / "model.safetensors")
    with SafetensorsFolder(tmp_path) as folder:
        folder.rename({"x": "b", "a": "a"})
        assert list(folder.entries) == ["x", "a"]
        assert folder.tensor("x") == folder.read("x") == 0
