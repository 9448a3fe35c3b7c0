"""Libraries with unusual file names or unreadable files: errors name these, others are read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from customize.concepts.io.write_concept import save_concept
from customize.concepts.library.index import read_index
from customize.concepts.library.library import Library, add_to_library
from customize.concepts.library.library_check import check_library
from customize.concepts.slices.allocation import slice_owners
from customize.errors import ConceptError, ConfigError
from tests.concepts.library.test_library import lora
from tests.concepts.making import small
from tests.unprivileged import run_unprivileged

ODD = os.fsdecode(b"\xff\xfe caf\xe9")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "library"
    save_concept(small(), folder / "rex")
    return folder


def test_file_names_that_are_not_unicode(folder: Path) -> None:
    lora(folder / f"{ODD}.safetensors")
    save_concept(small(1, name="tom", trigger="<tom>"), folder / f"{ODD} folder")
    first = Library(folder)
    assert first.is_index_saved
    assert {entry.source for entry in first.entries.values()} == {
        *("rex", f"{ODD}.safetensors", f"{ODD} folder")
    }
    again = Library(folder)
    assert again.num_stale_rows == 0 and again.entries == first.entries == read_index(folder)
    assert [entry.name for entry in again.find_by_trigger("<tom>")] == ["tom"]
    errors = "\n".join(check_library(folder).errors)
    assert "\\udcff" in errors
    errors.encode()  # whatever prints it


@pytest.mark.parametrize("length", [200, 231, 240, 255])
def test_long_file_names(folder: Path, length: int) -> None:
    name = "a" * (length - len(".safetensors")) + ".safetensors"
    lora(folder / name)
    save_concept(small(1, name="tom", trigger="<tom>"), folder / ("b" * length))
    entries = Library(folder).entries
    assert set(entries) == {"rex", name, "b" * length}
    assert not any(entry.error for entry in entries.values())
    other = folder.parent / "other"
    assert add_to_library(other, folder / name).name == "a" * 64
    assert add_to_library(other, folder / ("b" * length)).name == "tom"


def test_unreadable_files_are_named(folder: Path) -> None:
    os.mkfifo(folder / "fifo.safetensors")
    (folder / "dangling.safetensors").symlink_to("nowhere")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "kit").mkdir()
    os.mkfifo(folder / "kit" / "concept.json")
    (folder / "max").mkdir()
    (folder / "max" / "concept.json").symlink_to("nowhere")
    entries = Library(folder).entries
    errors = {source: entry.error for source, entry in entries.items() if entry.error}
    assert set(errors) == {
        *("fifo.safetensors", "dangling.safetensors", "loop.safetensors", "kit", "max")
    }
    assert "a FIFO" in errors["fifo.safetensors"] and "a FIFO" in errors["kit"]
    report = "\n".join(check_library(folder).errors)
    for source in errors:
        assert source in report
    with pytest.raises(ConceptError, match="a FIFO"):
        slice_owners(folder)


def test_folders_without_permission_are_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    library = tmp_path / "library"
    for number, name in enumerate(("none", "enter", "read", "fine")):
        save_concept(small(number, name=name, trigger=f"<{name}>"), library / name)
    (library / "lost+found").mkdir(mode=0)
    for name, mode in (("none", 0o000), ("enter", 0o311), ("read", 0o444)):
        (library / name).chmod(mode)
    program = """
import json, sys
from pathlib import Path
from customize import errors
from customize.concepts.io.read_concept import load_concept
from customize.concepts.library.library_check import check_library
from customize.concepts.library.library import Library
from customize.concepts.slices.allocation import slice_owners

library = Path(sys.argv[1])
messages = {source: entry.error for source, entry in Library(library).entries.items()}
for name in ("none", "enter", "read"):
    try:
        messages[f"load {name}"] = load_concept(library / name).info.name
    except errors.ConceptError as error:
        messages[f"load {name}"] = str(error)
messages["check"] = " ".join(check_library(library).errors)
for name in ("enter", "read", "none"):
    (library / name).chmod(0o755)
(library / "fine").chmod(0o444)
try:
    messages["slice owners"] = str([owner.name for owner in slice_owners(library)])
except errors.ConceptError as error:
    messages["slice owners"] = str(error)
(library / "fine").chmod(0o755)
library.chmod(0o644)
try:
    messages["library"] = str(Library(library).entries)
except errors.ConfigError as error:
    messages["library"] = str(error)
library.chmod(0o755)
print(json.dumps(messages))
"""
    messages = json.loads(run_unprivileged(program, library))
    assert messages["fine"] == ""
    for name in ("none", "enter", "read"):
        assert "Permission denied" in messages[name], messages
        assert f"library/{name}" in messages["check"]
    assert messages["load enter"] == "enter"  # its files can be opened by their names
    assert (
        "Permission denied" in messages["load none"]
        and "Permission denied" in messages["load read"]
    )
    assert (
        "Permission denied" in messages["slice owners"]
        and "library/fine" in messages["slice owners"]
    )
    assert "the library cannot be read: Permission denied" in messages["library"]
    assert "lost+found" not in messages


def test_library_that_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="Not a directory"):
        Library(tmp_path / "fifo")


def test_list_command_shows_names_that_are_not_unicode(folder: Path) -> None:
    lora(folder / f"{ODD}.safetensors")
    program = "import sys; from customize.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, "library", "list", str(folder)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert b"rex" in done.stdout and b"caf" in done.stdout
