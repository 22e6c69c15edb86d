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

The format is written in `safetensors_writing.py`.
"""

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
AHEAD_BYTES = 1 << 26  # enough to keep the disk busy, little beside any model
READERS = 4  # threads that read; they wait for the disk or copy, and hold no lock of Python's
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


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor."""

    name: str
    """What it is called in the file."""
    file: str
    """Name of the file it lies in."""
    dtype: str
    """The format's code, "BF16" for example."""
    shape: tuple[int, ...]
    """Sizes."""
    offset: int
    """Where its bytes begin in the file."""
    nbytes: int
    """How many they are."""


class SafetensorsFolder:
    """The weights of a Hugging Face folder: one safetensors file, or shards and an index.

    Use it as a context manager; tensors it has given stay valid afterwards.

    Args:
        directory: the folder.

    Attributes:
        entries: {tensor's name: Entry}, in the order of the files; `rename` changes the names.

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

        entry = self.entries[name]
        if entry.file not in self._open:
            handle = safe_open(self.directory / entry.file, framework="pt", device="cpu")
            self._open[entry.file] = self._stack.enter_context(handle)
        return self._open[entry.file].get_tensor(entry.name)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in memory of its own.

        Not a copy of `tensor`: a mapped page that was read counts as the process's beside the copy,
        which for a model that is kept would be twice its size.

        Raises:
            ValueError: the file became shorter since its header was read.
        """
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self._fill(tensor, entry)
        return tensor

    def read_ahead(self, names: Iterable[str]) -> Iterator[Tensor]:
        """`read` each in turn, the next ones already while the caller works on one.

        At most `AHEAD_BYTES` are held at once, the caller's tensor included, or that one and the
        next if they are larger; but never more than twice the folder's largest tensor in float32.

        Args:
            names: in the order in which they are wanted.

        Yields:
            The tensors, in that order; let go of one before asking for the next.

        Raises:
            ValueError: as `read`.
        """
        elements = max((math.prod(entry.shape) for entry in self.entries.values()), default=0)
        most = max(AHEAD_BYTES, 2 * 4 * elements)
        held, waiting = 0, deque[tuple[Tensor, Future[None]]]()
        with ThreadPoolExecutor(READERS) as pool:
            for name in names:
                entry = self.entries[name]
                held += entry.nbytes
                while waiting and held > (most if len(waiting) == 1 else AHEAD_BYTES):
                    held -= waiting[0][0].nbytes
                    yield _finished(waiting.popleft())
                # allocated here: a thread's own arena would keep what others free
                tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
                waiting.append((tensor, pool.submit(self._fill, tensor, entry)))
                del tensor
            while waiting:
                yield _finished(waiting.popleft())

    def rename(self, files: Mapping[str, str]) -> None:
        """Call tensors by other names from here on.

        Args:
            files: {new name: name in the files}; tensors that are not listed are forgotten.
        """
        by_file = {entry.name: entry for entry in self.entries.values()}
        self.entries = {name: by_file[known] for name, known in files.items()}

    def _fill(self, tensor: Tensor, entry: Entry) -> None:
        """Read an entry's bytes into a contiguous tensor."""
        left = tensor.reshape(-1).view(torch.uint8).numpy().data
        with (self.directory / entry.file).open("rb", buffering=0) as stream:
            stream.seek(entry.offset)
            while left:
                count = stream.readinto(left)
                if not count:
                    path = self.directory / entry.file
                    raise ValueError(f"{path} ends within tensor {entry.name}")
                left = left[count:]

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


def _finished(read: tuple[Tensor, "Future[None]"]) -> Tensor:
    """The tensor, once its bytes are there."""
    tensor, done = read
    done.result()
    return tensor


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
    return Entry(name, path.name, code, shape, start + begin, end - begin), begin, end
