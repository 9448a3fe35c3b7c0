"""Locks on folders, between threads, processes and dead processes."""

import subprocess
import sys
import threading

import pytest

from customize.concepts.io.folder_lock import lock_folder
from customize.errors import StorageError

HOLD = """
import sys, time
from pathlib import Path
from customize.concepts.io.folder_lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def refused(folder):
    with (
        pytest.raises(StorageError, match="another run writes to this folder"),
        lock_folder(folder),
    ):
        pass


def test_another_process_is_refused_until_the_first_dies(tmp_path):
    folder = tmp_path / "a" / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        refused(folder)
        (tmp_path / "link").symlink_to(tmp_path / "a")
        refused(tmp_path / "link" / "out")
        with lock_folder(tmp_path / "a" / "other"):
            pass
        process.kill()
    assert (tmp_path / "a" / ".out.lock").exists()  # of the dead process, and taken over
    with lock_folder(folder):
        refused(folder)
    assert list((tmp_path / "a").iterdir()) == []


def test_another_thread_is_refused(tmp_path):
    results = []
    with lock_folder(tmp_path / "out"):
        thread = threading.Thread(target=lambda: results.append(refused(tmp_path / "out")))
        thread.start()
        thread.join()
    assert results == [None]


def test_unused_parent_folders_are_removed(tmp_path):
    with pytest.raises(KeyError), lock_folder(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with lock_folder(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "b" / "out").mkdir()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_unwritable_path_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(StorageError, match="cannot be written"),
        lock_folder(tmp_path / "file" / "a"),
    ):
        pass
