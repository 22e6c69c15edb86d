"""Compile the C sources beside this file into one shared library, once.

    sources, flags, compiler, CPU  ->  key  ->  <cache>/<instruction set>-<key>-<bytes>.so

A library is found again by a name that holds everything it was made of: each source's name and
bytes, the flags, the instruction set, the compiler (where it really lies, its size and time) and
the CPU's features. So nothing stale is ever loaded, no version number has to be kept, and machines
that share a home folder do not share code that one of them cannot run. Its size is in the name as
well: loading a library that lost its end is not an error but the end of the process (SIGBUS). Old
libraries, of some 100 KB each, stay until somebody empties the cache.

The sources include no header of PyTorch or Python: pointers and sizes come in through ctypes.
Building takes a couple of seconds, where `torch.utils.cpp_extension.load_inline` takes 45; it needs
no matching headers, no ninja, no C++, and one library serves every version of both. The price is
that nothing checks the arguments but the Python that passes them.

Nothing here runs at import, and nothing is printed: a failure is a `BuildError` with one line.
"""

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from lora_kernels.cpu import cache, machine

__all__ = ["SOURCES", "BuildError", "Built", "build", "find_compiler", "version_of"]

SOURCES = Path(__file__).parent
# no -ffast-math: results are bit-equal to the definition, so no product may merge with a sum either
FLAGS = (
    *("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno"),
    *("-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"),
)
TIMEOUT = 300.0  # seconds for one run of the compiler
_XCODE = ("/Library/Developer/CommandLineTools", "/Applications/Xcode.app")


class BuildError(RuntimeError):
    """There is no library: its text is one line that says why."""


class Built(NamedTuple):
    """A library on disk.

    Attributes:
        path: the shared library.
        compiler: the command that compiled it, its first word an absolute path.
        refused: the better places that could not be used, each with the reason.
    """

    path: Path
    compiler: tuple[str, ...]
    refused: tuple[str, ...]


def build(isa: str, sources: Path) -> Built:
    """Find the library of an instruction set, or compile it.

    Args:
        isa: a key of `machine.FLAGS`.
        sources: the folder of the C files.

    Returns:
        The library, whole.

    Raises:
        BuildError: no compiler, one that fails, no sources, or no place to write to.
    """
    compiler = find_compiler()
    files = sorted(sources.glob("*.c"))
    if not files:
        raise BuildError(f"there is no C source in {sources}")
    flags = (*FLAGS, *machine.FLAGS[isa])
    name = f"{isa}-{_key(isa, compiler, flags, sources)}"
    refused: list[str] = []
    for folder in cache.folders():
        reason = cache.refusal(folder)
        if reason is None:
            try:
                path = _find(folder, name) or _make(folder, name, (*compiler, *flags), files)
                return Built(path, compiler, tuple(refused))
            except OSError as error:  # of the folder: the compiler's are BuildErrors
                reason = error.strerror or str(error)
        refused.append(f"{folder}: {reason}")
    raise BuildError(f"no folder to build in ({'; '.join(refused)})")


def find_compiler() -> tuple[str, ...]:
    """The C compiler: `CC`, else the first of cc, gcc and clang on the path.

    Returns:
        The command, its first word an absolute path; `CC` may bring options with it.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get("CC", "")
    try:
        words = shlex.split(chosen)
    except ValueError as error:
        raise BuildError(f"the environment variable CC is {chosen!r}: {error}") from None
    for name in words[:1] or ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path is not None and not _only_offers_xcode(path):
            return (os.path.abspath(path), *words[1:])
    if words:
        raise BuildError(
            f"no C compiler: the environment variable CC is {chosen!r}, which is not on the PATH"
        )
    raise BuildError("no C compiler: none of cc, gcc, clang is on the PATH, and CC is not set")


def _only_offers_xcode(path: str) -> bool:
    """Whether running macOS' own `cc` would open a window that offers to install the tools."""
    mine = sys.platform == "darwin" and path.startswith("/usr/bin/")
    return mine and not any(map(os.path.exists, _XCODE))


def _key(isa: str, compiler: tuple[str, ...], flags: tuple[str, ...], sources: Path) -> str:
    """A name for everything that the library is made of."""
    binary = os.path.realpath(compiler[0])
    facts = os.stat(binary)
    made_of = [
        *(isa, platform.system(), platform.machine(), _c_library(), machine.features()),
        *(compiler, binary, facts.st_size, facts.st_mtime_ns, flags),
        *((path.name, path.read_bytes()) for path in sorted(sources.glob("*.[ch]"))),
    ]
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]


def _c_library() -> str:
    """The C library's version: what was linked with a newer one may not load."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):  # another C library
        return ""


def _find(folder: Path, name: str) -> Path | None:
    """A library that is there, has all its bytes and is for this user alone to change."""
    for path in folder.glob(f"{name}-*.so"):
        facts = path.stat()
        others = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if path.stem == f"{name}-{facts.st_size}" and not others:
            return path
    return None


def _make(folder: Path, name: str, command: tuple[str, ...], files: list[Path]) -> Path:
    """Compile, unless another process has done so just now."""
    with cache.locked(folder):
        return _find(folder, name) or _compile(folder, name, command, files)


def _compile(folder: Path, name: str, command: tuple[str, ...], files: list[Path]) -> Path:
    """Run the compiler, and give the library its name when it is whole and on disk."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as work:
        made = Path(work, "library.so")
        # sources by name, from their own folder, so that messages are short; the compiler's own
        # temporary files go where ours do, as /tmp may be read-only
        names = [path.name for path in files]
        _run((*command, "-o", str(made), *names), cwd=files[0].parent, scratch=work)
        if not made.exists():
            raise BuildError(f"{command[0]} ended well, but made no library")
        made.chmod(0o700)  # whatever the umask: others may be able to enter the folder
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        target = folder / f"{name}-{made.stat().st_size}.so"
        os.replace(made, target)
    return target


def _run(command: tuple[str, ...], cwd: Path, scratch: str) -> str:
    """Run a compiler to its end; gives back what it printed."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", "TMPDIR": scratch},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error.strerror or error}") from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} did not finish in {TIMEOUT:.0f} s") from None
    if done.returncode != 0:
        said = _first_error(done.stdout) or f"it ended with code {done.returncode}"
        raise BuildError(f"{command[0]} failed: {said}")
    return done.stdout


def _first_error(output: str) -> str:
    """The line that tells most: the first with an error in it, else the first that is not empty."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[0]


def version_of(compiler: tuple[str, ...]) -> str:
    """What a compiler calls itself, in two words if it is gcc or clang.

    Args:
        compiler: a command.

    Returns:
        Such as "gcc 12.2.0"; the first line of what it prints for `--version` else.
    """
    try:
        scratch = tempfile.gettempdir()
        printed = _run((*compiler, "--version"), cwd=Path(scratch), scratch=scratch)
    except BuildError:  # it is gone, or knows no --version
        printed = ""
    lines = printed.splitlines()
    first = lines[0].strip() if lines else ""
    words = first.split()
    if "clang" in first and "version" in words[:-1]:
        return f"clang {words[words.index('version') + 1]}"
    if any("Free Software Foundation" in line for line in lines):
        return f"gcc {words[-1]}"
    return first or "an unknown compiler"
