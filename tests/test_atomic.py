"""Atomic writing, and deletion of partial files left by killed processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from customize import atomic
from customize.atomic import atomic_file, delete_leftovers, partial_folder, write_atomic

PROGRAM = """
import sys, time
from pathlib import Path
from customize.atomic import atomic_file, partial_folder

kind, path = sys.argv[1], Path(sys.argv[2])
with partial_folder(path) if kind == "folder" else atomic_file(path) as partial:
    if kind == "folder":
        (partial / "part").write_bytes(b"x" * 1000)
    else:
        partial.write(b"x" * 1000)
        partial.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_MIN_LEFTOVER_AGE", 0.0)


def writer(kind: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, kind, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_are_deleted_only_after_their_writer_has_ended(tmp_path: Path, kind: str) -> None:
    process = writer(kind, tmp_path / "rex")
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".rex.") and atomic.is_partial(partial.name)
    write_atomic(tmp_path / "tom", b"1")
    assert partial.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.exists()
    write_atomic(tmp_path / "tom", b"2")
    assert [path.name for path in tmp_path.iterdir()] == ["tom"]


def test_partial_files_of_this_process_are_not_deleted(tmp_path: Path) -> None:
    with partial_folder(tmp_path / "a") as folder, atomic_file(tmp_path / "b") as file:
        delete_leftovers(tmp_path)
        write_atomic(tmp_path / "c", b"c")
        (folder / "part").write_bytes(b"")
        file.write(b"b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


def test_only_partial_names_are_deleted(tmp_path: Path) -> None:
    names = ["a.partial", ".a.partial", ".a.0123abcd.partial.txt", "0123abcd.partial", ".hidden"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / ".fifo.0123abcd.partial")
    (tmp_path / ".link.0123abcd.partial").symlink_to(tmp_path)
    (tmp_path / ".old.0123abcd.partial").mkdir()
    (tmp_path / ".old.0123abcd.partial" / "weights").write_bytes(b"x" * 100)
    before = {path.name for path in tmp_path.iterdir()}
    delete_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before - {".old.0123abcd.partial"}
    delete_leftovers(tmp_path / "none")


def test_a_recent_leftover_is_not_deleted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(atomic, "_MIN_LEFTOVER_AGE", 60.0)
    (tmp_path / ".a.0123abcd.partial").write_bytes(b"x")
    delete_leftovers(tmp_path)
    assert (tmp_path / ".a.0123abcd.partial").exists()
    os.utime(tmp_path / ".a.0123abcd.partial", (1, 1))
    delete_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "a" * 255, "é" * 127, os.fsdecode(b"\xff" * 255)])
def test_any_valid_file_name_is_written(tmp_path: Path, name: str) -> None:
    write_atomic(tmp_path / name, b"1")
    write_atomic(tmp_path / name, b"2")
    assert (tmp_path / name).read_bytes() == b"2" and len(list(tmp_path.iterdir())) == 1


def test_new_does_not_replace_a_file(tmp_path: Path, monkeypatch) -> None:
    write_atomic(tmp_path / "a", b"1", new=True)

    def refuse(*args: object) -> None:
        raise OSError(1, "Operation not permitted")

    for link in (os.link, refuse):  # some file systems have no links
        monkeypatch.setattr(os, "link", link)
        with pytest.raises(FileExistsError):
            write_atomic(tmp_path / "a", b"2", new=True)
        write_atomic(tmp_path / f"b{link is refuse}", b"2", new=True)
    assert (tmp_path / "a").read_bytes() == b"1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "bFalse", "bTrue"]


def test_an_error_leaves_the_target_unchanged(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"1")
    for target in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(KeyboardInterrupt), atomic_file(target) as file:
            file.write(b"2")
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), partial_folder(tmp_path / "c"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"1"
