"""Safetensors files of a folder, read tensor by tensor and written as a stream.

Format (one file): 8 bytes, a little-endian N; N bytes of JSON, `{name: {"dtype", "shape",
"data_offsets": [begin, end]}, "__metadata__": {text: text}}`; then the buffer that the offsets
index, without holes. A large model is several files and `model.safetensors.index.json`, whose
`weight_map` says which tensor lies in which file.

`SafetensorsFolder` reads every header and the index before any weight, so whatever is wrong with a
folder is said at once, in one line that names file and tensor. Tensors are then views of the mapped
file, which the safetensors library makes: memory that the kernel can drop, not the process's own.
Those that are kept are read into memory of their own instead. The library checks the same rules,
but file by file and with messages that name the rule alone.

`write_safetensors` takes tensors one at a time where the library's writer needs all of them in
memory: a model of 4-bit layers is written dense without ever being dense.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000  # bytes, the format's own bound
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor."""

    file: str
    """Name of the file it lies in."""
    dtype: str
    """The format's code, "BF16" for example."""
    shape: tuple[int, ...]
    """Sizes."""
    offset: int
    """Where its bytes begin in the file."""


class SafetensorsFolder:
    """The weights of a Hugging Face folder: one safetensors file, or shards and an index.

    Use it as a context manager; tensors it has given stay valid afterwards.

    Args:
        directory: the folder.

    Attributes:
        entries: {tensor's name: Entry}, in the order of the files.

    Raises:
        FileNotFoundError: no safetensors file, or a shard that the index names is not there.
        ValueError: a pickle file in their place, a damaged file, or an index that does not fit.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()
        if (self.directory / SINGLE).is_file():
            self.entries = read_header(self.directory / SINGLE)
        elif (self.directory / INDEX).is_file():
            self.entries = self._sharded()
        else:
            raise _nothing_to_read(self.directory)

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU: a view of the mapped file, not to be written to."""
        from safetensors import safe_open

        file = self.entries[name].file
        if file not in self._open:
            handle = safe_open(self.directory / file, framework="pt", device="cpu")
            self._open[file] = self._stack.enter_context(handle)
        return self._open[file].get_tensor(name)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in memory of its own.

        Not a copy of `tensor`: a mapped page that was read counts as the process's beside the copy,
        which for a model that is kept would be twice its size.

        Raises:
            ValueError: the file became shorter since its header was read.
        """
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        left = tensor.reshape(-1).view(torch.uint8).numpy().data
        with (self.directory / entry.file).open("rb", buffering=0) as stream:
            stream.seek(entry.offset)
            while left:
                count = stream.readinto(left)
                if not count:
                    raise ValueError(f"{self.directory / entry.file} ends within tensor {name}")
                left = left[count:]
        return tensor

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.tensor(name)) for name in self.entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.clear()
        self._stack.close()

    def _sharded(self) -> dict[str, Entry]:
        """All shards' tensors, each exactly where the index says."""
        weight_map = _read_index(self.directory / INDEX)
        entries: dict[str, Entry] = {}
        for file in dict.fromkeys(weight_map.values()):
            path = self.directory / file
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: {INDEX} names it as a shard")
            for name, entry in read_header(path).items():
                if name in entries:
                    raise ValueError(
                        f"tensor {name} is in both {entries[name].file} and {file} of "
                        f"{self.directory}"
                    )
                if name not in weight_map:
                    raise ValueError(f"{path} holds tensor {name}, which {INDEX} does not list")
                entries[name] = entry
        for name, file in weight_map.items():
            if name not in entries or entries[name].file != file:
                raise ValueError(f"{INDEX} says tensor {name} is in {file}, but it is not there")
        return entries


def load_state(directory: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the weights of a folder without holding them in memory.

    Args:
        directory: a folder with `model.safetensors`, or shards and their index.

    Yields:
        (name, tensor): a view of the mapped file, not to be written to.

    Raises:
        FileNotFoundError: see `SafetensorsFolder`.
        ValueError: see `SafetensorsFolder`.
    """
    with SafetensorsFolder(directory) as folder:
        yield from folder


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        ValueError: it is not JSON, or no object, or it has a key twice.
    """
    return _parse_object(path.read_bytes(), str(path))


def _parse_object(text: bytes, what: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"the key {key} is there twice")
            result[key] = value
        return result

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{what} must hold a JSON object; got {type(parsed).__name__}")
    return parsed


def _read_index(path: Path) -> dict[str, str]:
    """The index's `weight_map`; names of files only, nothing that leads out of the folder."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map of tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise ValueError(f"{path} maps tensor {name} to {file!r}, which is no safetensors file")
        if Path(file).name != file or "\\" in file:
            raise ValueError(f"{path} maps tensor {name} to {file!r}, outside the folder: refused")
    return weight_map


def _nothing_to_read(directory: Path) -> Exception:
    """The error for a folder without weights: what is there instead."""
    if not directory.is_dir():
        return FileNotFoundError(f"{directory} is not a folder")
    names = sorted(entry.name for entry in directory.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return ValueError(
            f"{directory} holds its weights as pickle ({pickles[0]}), which can run code when it "
            "is read: refused; convert it to safetensors"
        )
    if "adapter_model.safetensors" in names:
        return FileNotFoundError(
            f"{directory} holds an adapter, not a model: load its base and then load_adapter"
        )
    if any(name.endswith(".safetensors") for name in names):
        return FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}, only other files")
    return FileNotFoundError(f"{directory} has no {SINGLE}: no weights to load")


def read_header(path: Path) -> dict[str, Entry]:
    """Read and check one file's header against the format and the file's size."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":  # what a clone without Git LFS leaves in a large file's place
            raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`")
        length = int.from_bytes(start, "little")
        if length > _HEADER_LIMIT:
            raise ValueError(f"{path} is no safetensors file: its header would be {length} bytes")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path} is truncated: {size} bytes, of which the header alone is 8 + {length}"
            )
        header = _parse_object(stream.read(length), f"the header of {path}")
    header.pop("__metadata__", None)
    entries, spans = {}, []
    for name, told in header.items():
        entries[name], begin, end = _entry(path, name, told, 8 + length)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(f"{path}: tensor {name} begins at {begin}, should at {position}")
        position = end
    if position != size - 8 - length:
        raise ValueError(
            f"{path} is truncated or has trailing bytes: {size - 8 - length} bytes of data, "
            f"its header describes {position}"
        )
    return entries


def _entry(path: Path, name: str, told: Any, start: int) -> tuple[Entry, int, int]:
    """One tensor's entry, with where it begins and ends in the buffer, which begins at `start`."""
    try:
        code, shape, (begin, end) = told["dtype"], tuple(told["shape"]), told["data_offsets"]
        sizes = (*shape, begin, end)
        sound = isinstance(code, str) and all(type(n) is int and n >= 0 for n in sizes)
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: the header's entry of tensor {name} is malformed")
    if code in DTYPES and end - begin != math.prod(shape) * DTYPES[code].itemsize:
        raise ValueError(
            f"{path}: tensor {name} of shape {shape} and dtype {code} takes "
            f"{math.prod(shape) * DTYPES[code].itemsize} bytes, its header gives it {end - begin}"
        )
    return Entry(path.name, code, shape, start + begin), begin, end


@dataclass(frozen=True)
class Pending:
    """A tensor to write: what the header needs, and how to make it when its turn comes."""

    name: str
    """Name in the file."""
    shape: tuple[int, ...]
    """Sizes."""
    dtype: torch.dtype
    """Dtype on disk."""
    make: Callable[[], Tensor]
    """Returns the tensor, on any device."""

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Iterable[Pending]) -> None:
    """Write one safetensors file, holding one tensor in memory at a time.

    Args:
        path: the file, overwritten.
        tensors: what to write, in the order of the buffer.

    Raises:
        TypeError: a dtype that the format does not know.
        ValueError: `make` returned a tensor of another shape or dtype.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for item in tensors:
        if item.dtype not in _CODES:
            raise TypeError(f"tensor {item.name}: safetensors files here hold no {item.dtype}")
        header[item.name] = {
            "dtype": _CODES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [position, position + item.nbytes],
        }
        position += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the buffer starts on a multiple of 8
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for item in tensors:
            tensor = item.make().detach()
            if tuple(tensor.shape) != item.shape or tensor.dtype != item.dtype:
                raise ValueError(
                    f"tensor {item.name} was announced as {item.shape} {item.dtype}; "
                    f"got {tuple(tensor.shape)} {tensor.dtype}"
                )
            flat = tensor.cpu().contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy().data)
