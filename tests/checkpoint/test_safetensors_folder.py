"""Tensors of a folder in memory of their own: what the mapped file holds, nothing of it kept."""

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_core.checkpoint.safetensors_folder import DTYPES, SafetensorsFolder

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
