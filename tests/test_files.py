"""Files are whole or absent, and a folder has one run at a time."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_core.files import (
    atomic_folder,
    atomic_write,
    folder_lock,
    latest,
    publish,
    sha256_file,
    sweep,
)


@pytest.mark.parametrize("content", [b"new", "new", lambda path: path.write_bytes(b"new")])
def test_atomic_write_replaces_and_leaves_nothing_beside(tmp_path: Path, content: object) -> None:
    (tmp_path / "file").write_bytes(b"old")
    assert atomic_write(tmp_path / "file", content) == tmp_path / "file"
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"new")]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(tmp_path / "file", fails)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent; make it first"):
        atomic_write(tmp_path / "absent" / "file", b"")


def test_atomic_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    with (
        pytest.raises(ZeroDivisionError),
        atomic_folder(tmp_path / "a" / "b") as folder,
    ):
        (folder / "x").write_text(str(1 // 0))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    with atomic_folder(tmp_path / "a" / "b") as folder:
        (folder / "y").write_text("3")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["y"]


def test_publish_and_latest(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="cannot publish step-1: it is not in"):
        publish(tmp_path, "step-1")
    for name in ("step-1", "step-2"):
        (tmp_path / name).mkdir()
        publish(tmp_path, name)
    assert latest(tmp_path) == tmp_path / "step-2"
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(ValueError, match="should hold the name of an entry beside it"):
        latest(tmp_path)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 1])
def test_sha256(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(b"x" * size).hexdigest()


def test_the_lock_holds_against_this_process_too(tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path),
        pytest.raises(ValueError, match=r"another run .* works in"),
        folder_lock(tmp_path),
    ):
        pass
    with folder_lock(tmp_path):
        pass


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom lora_core.files import folder_lock\n"
        "with folder_lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=rf"another run .process {other.pid}. works in"),
            folder_lock(tmp_path),
        ):
            pass
        other.kill()
        other.wait()
    with folder_lock(tmp_path):
        pass


def test_what_is_renamed_is_on_the_disk_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def synced(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("rename"), rename(a, b)))
    atomic_write(tmp_path / "file", "text")
    aside = f".file.{os.getpid()}.tmp"
    assert done == [aside, "rename", tmp_path.name]
    done.clear()
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "part").write_text("text")
    assert done == ["part", f".folder.{os.getpid()}.tmp", "rename", tmp_path.name]


def test_sweep_takes_what_killed_processes_left_and_nothing_else(tmp_path: Path) -> None:
    for name in (".step-00000003.123.tmp", ".run.json.7.tmp", ".mine.tmp", "run.json", ".lock"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".step-00000004.9.tmp").mkdir()
    (tmp_path / ".step-00000004.9.tmp" / "weights").write_text("half")
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", ".mine.tmp", "run.json"]
    sweep(tmp_path / "absent")
