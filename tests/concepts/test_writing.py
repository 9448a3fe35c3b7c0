"""Writing concepts atomically."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from PIL import Image

from customize.concepts.io import file_layout, write_concept
from customize.concepts.io.file_layout import INFO_FILE as INFO
from customize.concepts.io.file_layout import LORA_FILE as LORA
from customize.concepts.io.read_concept import load_concept
from customize.concepts.io.write_concept import save_concept, write_folder, write_single_file
from customize.errors import ConceptError, StorageError
from tests.concepts.making import contents, same_tensors, small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(small(), tmp_path / "rex")


def test_concept_of_the_same_name_is_replaced(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    save_concept(small(seed=1), folder, [Image.new("RGB", (2, 2))] * 2)
    assert same_tensors(load_concept(folder), small(seed=1))
    save_concept(small(num_tokens=0), folder, [Image.new("RGB", (2, 2))])
    assert same_tensors(load_concept(folder), small(num_tokens=0))
    assert set(contents(folder)) == {LORA, INFO, "README.md", "sample-1.png", "notes.txt"}
    single = folder / "rex.safetensors"
    for seed in (0, 1):
        write_single_file(small(seed=seed), single)
        assert same_tensors(load_concept(single), small(seed=seed))


def test_folder_with_training_files_is_accepted(tmp_path: Path) -> None:
    for name in file_layout.TRAINING_FILES:
        (tmp_path / "rex" / name).mkdir(parents=True)
    assert same_tensors(load_concept(save_concept(small(), tmp_path / "rex")), small())
    assert {path.name for path in (tmp_path / "rex").iterdir()} > set(file_layout.TRAINING_FILES)


def other_concept(path: Path) -> None:
    write_folder(small(name="tom"), path)


def other_files(path: Path) -> None:
    path.mkdir()
    (path / "holiday.jpg").write_bytes(b"x")


def damaged(path: Path) -> None:
    path.mkdir()
    (path / INFO).write_text("{")


@pytest.mark.parametrize("prepare", [other_concept, other_files, damaged, Path.touch])
def test_existing_files_are_not_overwritten(tmp_path: Path, prepare) -> None:
    prepare(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(StorageError) as caught:
        save_concept(small(), tmp_path / "out")
    assert caught.value.fix
    assert contents(tmp_path) == before


def test_single_files_are_not_overwritten(tmp_path: Path) -> None:
    write_single_file(small(name="tom"), tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"x")
    before = contents(tmp_path)
    for name in ("a.safetensors", "b.safetensors", "c.bin"):
        with pytest.raises(StorageError):
            write_single_file(small(), tmp_path / name)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("single", [False, True])
def test_full_disk_changes_nothing(
    tmp_path: Path, monkeypatch, existing: bool, step: int, single: bool
) -> None:
    out = tmp_path / ("rex.safetensors" if single else "rex")
    save = write_single_file if single else write_folder
    if existing:
        save(small(), out)
    before = contents(tmp_path)
    calls = 0
    fsync = os.fsync

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > min(step, 0 if single else 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        save(small(seed=1), out)
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    save(small(seed=1), out)
    assert same_tensors(load_concept(out), small(seed=1))


def test_interrupt_changes_nothing(folder: Path, monkeypatch) -> None:
    before = contents(folder.parent)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write_concept, "write_new_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_concept(small(seed=1), folder)
    assert contents(folder.parent) == before


def test_crash_between_two_renames_is_detected(folder: Path, monkeypatch) -> None:
    replace, done = os.replace, []

    def once(source: Path, target: Path) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        save_concept(small(seed=1), folder)
    with pytest.raises(ConceptError, match="not that of the facts and tensors"):
        load_concept(folder)


def test_unwritable_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for save, name in ((write_folder, "rex"), (write_single_file, "rex.safetensors")):
        with pytest.raises(StorageError, match=r"cannot be written|folder is a file"):
            save(small(), tmp_path / "file" / name)
        with pytest.raises(StorageError, match="cannot be written"):
            save(small(), tmp_path / ("x" * 300) / name)
