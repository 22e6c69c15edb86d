"""The machine's instruction sets, the cache's folder and the compiler: every way to fail."""

import contextlib
import ctypes
import fcntl
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_kernels.cpu import cache, machine, toolchain
from lora_kernels.cpu.toolchain import BuildError, build

CC = ""
with contextlib.suppress(BuildError):
    CC = shlex.join(toolchain.find_compiler())
needs_compiler = pytest.mark.skipif(not CC, reason="no C compiler")

AVX2 = "fpu sse2 fma avx f16c avx2"
AVX512 = AVX2 + " avx512f avx512dq avx512bw avx512vl"


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Pretend to be another CPU: the text of its /proc/cpuinfo, and what uname calls it."""

    def become(cpuinfo: str | None, name: str = "x86_64") -> None:
        path = tmp_path / "cpuinfo"
        if cpuinfo is not None:
            path.write_text(cpuinfo)
        monkeypatch.setattr(machine, "_CPUINFO", path)
        monkeypatch.setattr(platform, "machine", lambda: name)
        machine.features.cache_clear()
        machine.available.cache_clear()

    yield become
    monkeypatch.undo()
    machine.features.cache_clear()
    machine.available.cache_clear()


@pytest.mark.parametrize(
    ("cpuinfo", "name", "expected"),
    [
        (f"processor : 0\nflags\t\t: {AVX512}\n", "x86_64", ("avx512", "avx2", "portable")),
        (f"flags : {AVX512.replace(' avx512bw', '')}\n", "x86_64", ("avx2", "portable")),
        (f"flags : {AVX2.replace(' f16c', '')}\n", "x86_64", ("portable",)),
        ("processor : 0\nFeatures\t: fp asimd evtstrm\n", "aarch64", ("neon", "portable")),
        (None, "arm64", ("neon", "portable")),
        (None, "x86_64", ("portable",)),
        ("isa : rv64imafdc\n", "riscv64", ("portable",)),
    ],
)
def test_the_instruction_sets_of_a_cpu(
    cpu: Callable[..., None], cpuinfo: str | None, name: str, expected: tuple[str, ...]
) -> None:
    cpu(cpuinfo, name)
    assert machine.available() == expected
    assert machine.choose(None) == machine.choose("") == expected[0]
    assert [machine.choose(isa) for isa in expected] == list(expected)


def test_an_instruction_set_that_cannot_be(cpu: Callable[..., None]) -> None:
    cpu(f"flags : {AVX2}\n")
    with pytest.raises(
        ValueError, match=r"ISA is 'sse9'; set it to one that this CPU has \(avx2, p"
    ):
        machine.choose("sse9")
    with pytest.raises(
        ValueError, match="ISA is avx512, which this CPU lacks; it has avx2, portab"
    ):
        machine.choose("avx512")
    with pytest.raises(
        ValueError, match="ISA is neon, which this CPU lacks; it has avx2, portable"
    ):
        machine.choose("neon")


def test_a_machine_for_which_there_is_no_c(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.why_not() is None
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    for setting, value in (("byteorder", "big"), ("maxsize", 2**31 - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, setting, value)
            assert machine.why_not() == (
                "the C operators need a little-endian 64-bit CPU; this is s390x"
            )
    monkeypatch.setattr(sys, "platform", "win32")
    assert machine.why_not() == "the C operators need a POSIX system; this is Windows"


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every cache of these tests lies under tmp_path, the last resorts too."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    cache._fresh.cache_clear()
    return tmp_path / "cache"


def private(place: Path) -> Path:
    return place.parent / "temporary" / f"lora-core-{os.geteuid()}"


def test_where_libraries_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))

    def first() -> Path:
        return next(cache.folders())

    for value, folder in (("~/mine", tmp_path / "mine"), ("here", Path("here").absolute())):
        monkeypatch.setenv("LORA_KERNELS_CACHE", value)
        assert first() == folder
    monkeypatch.setenv("LORA_KERNELS_CACHE", "")
    assert first() == tmp_path / "xdg" / "lora-core"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert first() == tmp_path / ".cache" / "lora-core"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert first() == tmp_path / "Library" / "Caches" / "lora-core"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a home
    assert first() == private(tmp_path / "cache")


def test_a_folder_is_made_for_this_user_alone(place: Path) -> None:
    nested = place / "deep"
    assert cache.refusal(nested) is None
    assert nested.stat().st_mode & 0o777 == 0o700
    for mode, reason in ((0o755, None), (0o770, "other users"), (0o702, "other users")):
        nested.chmod(mode)
        assert (cache.refusal(nested) or "None").startswith(reason or "None")


def test_a_folder_that_is_none(place: Path) -> None:
    place.write_text("a file")
    assert cache.refusal(place) == "File exists"
    assert cache.refusal(place / "below") == "Not a directory"


def test_a_folder_of_another_user(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.mkdir(mode=0o700)
    link = place.parent / "link"
    link.symlink_to(place)
    assert cache.refusal(link) is None
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    assert cache.refusal(place) == "it belongs to another user"
    monkeypatch.undo()
    if mine == 0:
        os.chown(link, 12345, 12345, follow_symlinks=False)
        assert cache.refusal(link) == "it belongs to another user"
        os.chown(link, 0, 0, follow_symlinks=False)
        os.chown(place, 12345, 12345)
        assert cache.refusal(place) == "it belongs to another user"
        assert cache.refusal(link) == "it belongs to another user"


def test_a_folder_that_nothing_can_be_run_from(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=8))
    monkeypatch.setattr(os, "ST_NOEXEC", 8, raising=False)
    assert cache.refusal(place) == "nothing can be run from there"


@needs_compiler
def test_a_library_is_built_once(
    place: Path, tiny_sources: Path, script: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = place.parent / "log"
    compiler = script(f'echo run >> {log}\nexec {CC} "$@"')
    monkeypatch.setenv("CC", f"{compiler} -DEXTRA='a b'")
    built = build("portable", tiny_sources)
    assert built == build("portable", tiny_sources)
    assert log.read_text() == "run\n"
    assert built.path.parent == place
    assert built.compiler == (str(compiler), "-DEXTRA=a b")
    assert built.refused == ()
    assert sorted(p.name for p in place.iterdir()) == sorted([built.path.name, "lock"])
    numbers = (ctypes.c_float * 3)()
    assert ctypes.CDLL(str(built.path)).lora_probe(numbers, ctypes.c_int64(2)) == 0
    assert list(numbers) == [128, 128, 0]


@needs_compiler
def test_nothing_stale_is_found(
    tiny_sources: Path, script: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = script('for a; do case $a in -o) o=1;; *) [ "$o" ] && : > "$a"; o=;; esac; done')
    monkeypatch.setenv("CC", str(compiler))

    def name() -> str:
        return build("portable", tiny_sources).path.name

    names = [name()]

    def changed() -> bool:
        names.append(name())
        return names[-1] not in names[:-1]

    (tiny_sources / "notes.md").write_text("not a source")
    assert not changed()
    with (tiny_sources / "probe.c").open("a") as file:
        file.write("// more\n")
    assert changed()
    with (tiny_sources / "probe.h").open("a") as file:
        file.write("// more\n")
    assert changed()
    (tiny_sources / "probe.h").rename(tiny_sources / "renamed.h")
    assert changed()
    os.utime(compiler, (1, 1))
    assert changed()
    with compiler.open("a") as file:
        file.write("# longer\n")
    os.utime(compiler, (1, 1))
    assert changed()
    monkeypatch.setenv("CC", f"{compiler} -g")
    assert changed()
    monkeypatch.setattr(machine, "features", lambda: ("quantum",))
    assert changed()
    monkeypatch.setattr(platform, "machine", lambda: "x86_65")
    assert changed()
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 9.9")
    assert changed()
    monkeypatch.setattr(toolchain, "FLAGS", ("-O1",))
    assert changed()
    assert build("neon", tiny_sources).path.name.startswith("neon-")


RACE = """
import ctypes, os, sys
from pathlib import Path
from lora_kernels.cpu import library

sources, many = Path(sys.argv[1]), int(sys.argv[2])
ready, start = os.pipe(), os.pipe()
for _ in range(many):
    if os.fork() == 0:
        os.close(start[1])
        os.write(ready[1], b"x")
        os.read(start[0], 1)  # until the parent lets all of them go
        from lora_kernels.cpu import toolchain

        toolchain.SOURCES = sources
        assert library.why_not() is None, library.why_not()
        numbers = (ctypes.c_float * 3)()
        library.function("lora_probe", ctypes.c_void_p, ctypes.c_int64)(numbers, 3)
        os._exit(0 if min(numbers) >= 128 else 1)
for _ in range(many):
    os.read(ready[0], 1)
os.close(start[1])
assert [os.wait()[1] for _ in range(many)] == [0] * many
"""


@needs_compiler
@pytest.mark.parametrize("many", [2, 8])
def test_processes_that_start_at_once_build_once(
    many: int, place: Path, tiny_sources: Path, script: Callable
) -> None:
    log = place.parent / "log"
    # it writes a file that is no library at first, as compilers do, and takes its time
    compiler = script(
        f"""echo run >> {log}
for a; do case $a in -o) o=1;; *) [ "$o" ] && echo half > "$a"; o=;; esac; done
sleep 0.3
exec {CC} "$@" """
    )
    done = subprocess.run(
        [sys.executable, "-c", RACE, str(tiny_sources), str(many)],
        env={**os.environ, "CC": str(compiler)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert log.read_text() == "run\n"
    assert len(list(place.glob("*.so"))) == 1


@needs_compiler
@pytest.mark.parametrize("locks", ["none", "held"])
def test_a_build_does_not_hang_on_a_lock(
    locks: str, place: Path, tiny_sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.mkdir(mode=0o700)
    monkeypatch.setattr(cache, "PATIENCE", 0.05)
    with open(place / "lock", "a") as other:
        if locks == "held":
            fcntl.flock(other, fcntl.LOCK_EX)
        else:

            def flock(file: object, operation: int) -> None:
                raise OSError(38, "Function not implemented")

            monkeypatch.setattr(fcntl, "flock", flock)
        assert build("portable", tiny_sources).path.parent == place


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux' list of open files")
def test_a_lock_is_given_back_though_a_forked_child_holds_its_file(place: Path) -> None:
    place.mkdir(mode=0o700)
    with cache.locked(place):
        open_files = {
            os.path.realpath(f"/proc/self/fd/{n}"): n for n in os.listdir("/proc/self/fd")
        }
        childs = os.dup(int(open_files[str(place / "lock")]))
    with open(place / "lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(childs)


@needs_compiler
def test_a_place_that_cannot_be_used_gives_way_to_a_private_one(
    place: Path, tiny_sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.write_text("a file where the folder should be")
    built = build("portable", tiny_sources)
    assert built.path.parent == private(place)
    assert built.path.parent.stat().st_mode & 0o777 == 0o700
    assert built.refused == (f"{place}: File exists",)
    # a folder in which nothing can be made: the lock's place is taken
    place.unlink()
    (place / "lock").mkdir(parents=True)
    place.chmod(0o700)
    assert build("portable", tiny_sources).refused == (f"{place}: Is a directory",)
    # the private one may have been made by somebody else
    at_exit: list[Callable[[], object]] = []
    monkeypatch.setattr(cache.atexit, "register", lambda *a, **k: at_exit.append(partial(*a, **k)))
    private(place).chmod(0o777)
    built = build("portable", tiny_sources)
    fresh = built.path.parent
    assert fresh.parent == place.parent / "temporary"
    assert fresh != private(place)
    assert fresh.stat().st_mode & 0o777 == 0o700
    assert built.refused[1] == f"{private(place)}: other users can write to it"
    assert build("portable", tiny_sources) == built  # not a new folder for each
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(BuildError, match=r"no folder to build in \(.*: it belongs to another user"):
        build("portable", tiny_sources)
    (clean,) = at_exit
    clean()
    assert not fresh.exists()


def test_a_library_that_is_there_is_not_written_to(
    place: Path, tiny_sources: Path, script: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that was filled once and is read-only now."""
    compiler = script('for a; do case $a in -o) o=1;; *) [ "$o" ] && : > "$a"; o=;; esac; done')
    monkeypatch.setenv("CC", str(compiler))
    built = build("portable", tiny_sources)
    (place / "lock").unlink()
    (place / "lock").mkdir()
    assert build("portable", tiny_sources) == built


@needs_compiler
@pytest.mark.parametrize("isa", machine.available())
def test_a_product_does_not_merge_with_a_sum(isa: str, tiny_sources: Path) -> None:
    """Rounded twice, as the definition rounds; (1 + e)² - (1 + 2e) is e² if rounded once."""
    (tiny_sources / "sum.c").write_text(
        '#include "probe.h"\nLORA_EXPORT void lora_sum(float *p) { p[3] = p[0] * p[1] - p[2]; }\n'
    )
    e = 2.0**-12
    numbers = (ctypes.c_float * 4)(1 + e, 1 + e, 1 + 2 * e, 9)
    ctypes.CDLL(str(build(isa, tiny_sources).path)).lora_sum(numbers)
    assert numbers[3] == 0


@needs_compiler
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_library_that_lost_its_end_is_made_again(share: float, tiny_sources: Path) -> None:
    path = build("portable", tiny_sources).path
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    (path.parent / "building-killed").mkdir()  # what a process that was killed leaves
    (path.parent / "building-killed" / "library.so").write_bytes(whole[:100])
    assert build("portable", tiny_sources).path == path
    assert path.read_bytes() == whole


@needs_compiler
def test_a_library_is_for_this_user_alone_to_change(place: Path, tiny_sources: Path) -> None:
    """Others may be able to enter the folder, and the umask may let them write to its files."""
    place.mkdir()
    place.chmod(0o755)
    before = os.umask(0)
    try:
        path = build("portable", tiny_sources).path
    finally:
        os.umask(before)
    assert path.parent == place
    assert path.stat().st_mode & 0o777 == 0o700
    path.write_bytes(bytes(path.stat().st_size))  # as others could, if it were
    path.chmod(0o722)
    again = build("portable", tiny_sources).path
    assert again.stat().st_mode & 0o777 == 0o700
    assert again.read_bytes().startswith((b"\x7fELF", b"\xcf\xfa\xed\xfe"))


def test_there_is_no_compiler(
    tiny_sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(
        BuildError, match=r"^no C compiler: none of cc, gcc, clang is on the PATH, an"
    ):
        build("portable", tiny_sources)
    monkeypatch.setenv("CC", "tcc -w")
    with pytest.raises(
        BuildError, match=r"^no C compiler: .*CC is 'tcc -w', which is not on the PA"
    ):
        build("portable", tiny_sources)
    monkeypatch.setenv("CC", "cc 'half")
    with pytest.raises(BuildError, match='variable CC is "cc \'half": No closing quotation'):
        build("portable", tiny_sources)


def test_the_compilers_in_order(
    monkeypatch: pytest.MonkeyPatch, script: Callable, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "scripts"))
    monkeypatch.delenv("CC", raising=False)
    for name in ("clang", "gcc", "cc"):
        path = script("", name)
        assert toolchain.find_compiler() == (str(path),)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "scripts")
    assert toolchain.find_compiler() == (str(tmp_path / "scripts/cc"),)
    monkeypatch.setenv("CC", "clang --target=x -O1")
    assert toolchain.find_compiler() == (str(tmp_path / "scripts/clang"), "--target=x", "-O1")


def test_the_offer_to_install_xcode_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(toolchain, "_XCODE", ("/nowhere",))
    with pytest.raises(BuildError, match="no C compiler"):
        toolchain.find_compiler()
    monkeypatch.setattr(toolchain, "_XCODE", ("/",))
    assert toolchain.find_compiler() == ("/usr/bin/cc",)


FAILURES = {
    "echo 'In file included from a.c:1:' >&2; echo 'a.h:1:2: error: not today' >&2; exit 1": (
        "failed: a.h:1:2: error: not today"
    ),
    "echo; echo '  killed by the weather'; echo more; exit 3": "failed: killed by the weather",
    "exit 4": "failed: it ended with code 4",
    "true": "ended well, but made no library",
    "sleep 5": "did not finish in 0 s",
}


@pytest.mark.parametrize(("text", "reason"), FAILURES.items(), ids=FAILURES.values())
def test_a_compiler_that_fails(
    text: str,
    reason: str,
    place: Path,
    tiny_sources: Path,
    script: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler = script(text)
    monkeypatch.setenv("CC", str(compiler))
    if "sleep" in text:
        monkeypatch.setattr(toolchain, "TIMEOUT", 0.1)
    with pytest.raises(BuildError) as error:
        build("portable", tiny_sources)
    assert str(error.value) == f"{compiler} {reason}"
    assert [p.name for p in place.iterdir()] == ["lock"]


def test_what_a_compiler_is_started_with(
    place: Path, tiny_sources: Path, script: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """English messages, nothing to read, and a place for its temporary files that is our own."""
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("CC", str(script('echo "error: $LC_ALL $TMPDIR $(cat)."; exit 1')))
    with pytest.raises(BuildError, match=rf"failed: error: C {place}/building-\w+ \.$"):
        build("portable", tiny_sources)


def test_a_compiler_that_does_not_run(
    tiny_sources: Path, script: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = script("")
    compiler.write_text("#!/no/such/shell\n")
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(BuildError, match="compiler does not run: No such file or directory"):
        build("portable", tiny_sources)


@needs_compiler
def test_a_source_that_does_not_compile(tiny_sources: Path) -> None:
    (tiny_sources / "broken.c").write_text('#include "missing.h"\nint f(void) { return 1 }\n')
    with pytest.raises(BuildError, match=r"failed: broken.c:1:10: fatal error: .*missing.h"):
        build("portable", tiny_sources)


def test_there_are_no_sources(tmp_path: Path, script: Callable, monkeypatch: Any) -> None:
    monkeypatch.setenv("CC", str(script("")))
    with pytest.raises(BuildError, match=f"there is no C source in {tmp_path}"):
        build("portable", tmp_path)


VERSIONS = {
    "gcc 12.2.0": "cc (Debian 12.2.0-14) 12.2.0\nCopyright (C) 2022 Free Software Foundation, Inc.",
    "clang 19.1.7": "Debian clang version 19.1.7 (3+b1)\nTarget: x86_64-pc-linux-gnu",
    "clang 15.0.0": "Apple clang version 15.0.0 (clang-1500.3.9.4)\nTarget: arm64-apple-darwin",
    "tcc version 0.9.27 (x86_64 Linux)": "tcc version 0.9.27 (x86_64 Linux)",
    "an unknown compiler": "",
}


@pytest.mark.parametrize(("short", "printed"), VERSIONS.items(), ids=VERSIONS)
def test_what_a_compiler_calls_itself(short: str, printed: str, script: Callable) -> None:
    assert toolchain.version_of((str(script(f"cat <<'END'\n{printed}\nEND")),)) == short
    gone = script("exit 1", "gone")
    assert toolchain.version_of((str(gone),)) == "an unknown compiler"
