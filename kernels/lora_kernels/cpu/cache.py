"""Where compiled libraries are kept: a folder that nobody but this user can write.

Loading a library runs code, so a folder counts only if it belongs to this user and no one else may
write to it; what is refused is passed over, and the next place is tried:

    LORA_KERNELS_CACHE, or $XDG_CACHE_HOME/lora-core, or ~/.cache/lora-core (macOS: ~/Library/…)
    lora-core-<user id> in the folder for temporary files    read-only homes, containers
    a new folder there, gone with the process                the name above was somebody else's

A file is written under another name in the same folder and renamed when it is whole, so whoever
sees the final name sees all of it. Several processes that start at once would still each compile;
a lock makes all but the first wait. It is a courtesy, not what correctness rests on: where the file
system has no locks, or the holder has stopped, everybody compiles and the last rename wins.
"""

import atexit
import contextlib
import functools
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["folders", "locked", "refusal"]

PATIENCE = 120.0  # seconds to wait for another process that compiles
_POLL = 0.02  # seconds between two looks at its lock


def folders() -> Iterator[Path]:
    """Where to look and to build, in this order.

    Returns:
        Absolute paths, which need not exist, nor be fit for use.
    """
    usual = _usual()
    if usual is not None:
        yield usual
    yield Path(tempfile.gettempdir()).absolute() / f"lora-core-{os.geteuid()}"
    yield _fresh()


def _usual() -> Path | None:
    """The place that the environment names, or the platform's habit; None without a home."""
    place = os.environ.get("LORA_KERNELS_CACHE")
    if place:
        return Path(os.path.abspath(os.path.expanduser(place)))
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(shared):  # as the XDG specification wants it
        habit = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
        shared = os.path.expanduser(habit)
    return Path(shared, "lora-core") if os.path.isabs(shared) else None


@functools.cache
def _fresh() -> Path:
    folder = tempfile.mkdtemp(prefix="lora-core-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder).absolute()


def refusal(folder: Path) -> str | None:
    """Make a folder for this user alone, or say why it may not be loaded from.

    Args:
        folder: made with mode 0700 if it is not there.

    Returns:
        None if it is fit to load from; a few words else.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        owners = {facts.st_uid, folder.lstat().st_uid}  # of the folder, and of a link to it
        flags = os.statvfs(folder).f_flag
    except OSError as error:
        return error.strerror or str(error)
    if owners != {os.geteuid()}:
        return "it belongs to another user"
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "other users can write to it"
    if flags & getattr(os, "ST_NOEXEC", 0):
        return "nothing can be run from there"
    return None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, or go on without it after `PATIENCE` seconds.

    Args:
        folder: has to be writable; a file `lock` appears in it.

    Raises:
        OSError: the folder cannot be written.
    """
    import fcntl  # not on Windows, which never comes here

    with open(folder / "lock", "a") as file:
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_POLL)
            except OSError:  # a file system without locks
                break
        try:
            yield
        finally:
            # by hand: a child that another thread forked meanwhile holds the same open file
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
