"""Files that are whole or absent: atomic writes, published folders, locks, hashes.

A crash may come between any two system calls. So a file is written under another name, synced and
renamed over the real one (POSIX rename is atomic), a folder likewise, and which of several folders
counts is said by one small file, `latest`, that is itself replaced atomically. Readers therefore
see the old state or the new one, never half of either. The trade-off is one `fsync` per file.
"""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

LATEST = "latest"
_CHUNK = 1 << 20  # bytes read at a time when hashing


def sync(path: Path) -> None:
    """Force a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(path: Path) -> Path:
    """A hidden sibling of `path`, of this process alone, to write before the rename."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what killed processes left half written in a folder, which the caller has locked.

    Args:
        folder: searched itself, not what is below it; it need not exist.
    """
    for path in Path(folder).glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def atomic_write(
    path: str | os.PathLike[str], content: bytes | str | Callable[[Path], object]
) -> Path:
    """Write a file so that a crash leaves the old content or the new, never a part.

    Args:
        path: the file's real name; its folder must exist.
        content: bytes, text (UTF-8), or a function that writes the file whose path it is given.

    Returns:
        `path` as a `Path`.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path.name}: no folder {path.parent}; make it first")
    aside = _aside(path)
    try:
        if callable(content):
            content(aside)
        else:
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)
    return path


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder that takes the name `path` once the block has ended without error.

    A folder already there is replaced. Between its removal and the rename there is a moment without
    either, so a folder that may never be missing is given a new name and `publish`-ed instead.

    Args:
        path: the folder's real name; parents are made.

    Yields:
        The folder to write into.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for file in aside.rglob("*"):
            sync(file)
        sync(aside)
        if path.exists():
            shutil.rmtree(path)
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync(path.parent)


def publish(folder: str | os.PathLike[str], name: str) -> None:
    """Make `folder/name` the one that counts, by replacing `folder/latest` atomically.

    Args:
        folder: where both lie.
        name: name of an entry of `folder`.

    Raises:
        FileNotFoundError: there is no such entry.
    """
    folder = Path(folder)
    if not (folder / name).exists():
        raise FileNotFoundError(f"cannot publish {name}: it is not in {folder}")
    atomic_write(folder / LATEST, name + "\n")


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The entry of `folder` last published, or None where nothing was.

    Args:
        folder: where `latest` lies.

    Returns:
        The entry's path. It may be damaged: what reads it has to check.

    Raises:
        ValueError: `latest` names something outside the folder.
    """
    file = Path(folder) / LATEST
    if not file.is_file():
        return None
    name = file.read_text(encoding="utf-8").strip()
    if not name or Path(name).name != name:
        raise ValueError(f"{file} should hold the name of an entry beside it; it holds {name!r}")
    return file.with_name(name)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def folder_lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder for one run; the kernel drops the lock when the process dies, however it dies.

    Args:
        path: the folder; it is made. The lock is `flock` on `.lock` in it, so it also holds against
            a second run in the same process. On network file systems it is as good as theirs.

    Yields:
        None, the lock being held.

    Raises:
        ValueError: another run holds it.
    """
    import fcntl

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = stream.read().strip() or "unknown"
            raise ValueError(
                f"another run (process {owner}) works in {folder}; wait for it or choose another"
            ) from None
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield
