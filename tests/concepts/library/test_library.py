"""Libraries of concepts: the index, adding concepts, and checks."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from customize.concepts.io.file_layout import LAYER_INPUTS_FILE
from customize.concepts.io.write_concept import save_concept
from customize.concepts.library import library as library_module
from customize.concepts.library.index import INDEX_FILE, LibraryEntry, read_index
from customize.concepts.library.library import Library, add_to_library
from customize.concepts.library.library_check import check_library
from customize.errors import ConceptError, ConfigError, CustomizeError, StorageError
from tests.cli.making import record_of
from tests.concepts.making import small


def lora(path, rank=3, value=1.0, **metadata):
    tensors = {"unet.mid.attn1.to_q.lora_A.weight": torch.full((rank, 8), value)}
    tensors["unet.mid.attn1.to_q.lora_B.weight"] = torch.ones(8, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two concepts of disjoint slices, one a folder and one a file, and a LoRA."""
    folder = tmp_path / "library"
    save_concept(small(), folder / "rex")
    other = {"6": [0, 1], "8": [2, 3]}
    save_concept(small(1, name="tom", trigger="<tom>", slices=other), folder / "tom.safetensors")
    lora(folder / "Water Colour.safetensors", **{"modelspec.trigger_phrase": "in <wc> style"})
    return folder


def entries_by_name(library):
    return {entry.name: entry for entry in library.entries.values()}


def test_entries_describe_concepts_without_their_tensors(folder):
    entries = entries_by_name(Library(folder))
    rex, tom, water = entries["rex"], entries["tom"], entries["water-colour"]
    assert (rex.trigger, rex.class_word, rex.family, rex.rank) == ("<rex>", "dog", "sd", 2)
    assert rex.slices == {"6": [2, 3], "8": [0, 1]} and rex.basis.seed == 3
    assert rex.fingerprint == small().info.fingerprint
    tensor_files = ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors")
    assert rex.size == sum((folder / "rex" / name).stat().st_size for name in tensor_files)
    assert tom.source == "tom.safetensors" and tom.has_token_embeddings
    assert (water.trigger, water.trigger_words, water.rank) == (
        "<water-colour>",
        "in <wc> style",
        3,
    )
    assert water.trigger_tokens == {"<water-colour>", "<wc>"} and not water.has_token_embeddings


def test_index_equals_the_files(folder):
    first = Library(folder)
    assert first.num_stale_rows == 3 and first.is_index_saved
    assert read_index(folder) == first.entries
    again = Library(folder)
    assert again.num_stale_rows == 0 and again.entries == first.entries


def test_unchanged_files_are_not_read_again(folder, monkeypatch):
    Library(folder)
    save_concept(small(2, name="kit", trigger="<kit>"), folder / "kit")
    shutil.rmtree(folder / "rex")
    read = []
    real = library_module.describe_concept
    monkeypatch.setattr(
        library_module, "describe_concept", lambda *args: read.append(args[1]) or real(*args)
    )
    assert set(entries_by_name(Library(folder))) == {"kit", "tom", "water-colour"}
    assert read == ["kit"]


def test_changed_file_is_detected(folder):
    library = Library(folder)
    (entry,) = library.find_by_trigger("<REX>")
    assert library.is_unchanged(entry)
    shutil.rmtree(folder / "rex")
    save_concept(small(5, trigger="<roo>"), folder / "rex")
    assert not library.is_unchanged(entry)
    library.refresh()
    assert (
        library.find_by_trigger("<rex>") == []
        and library.find_by_trigger("<roo>")[0].source == "rex"
    )
    assert library.similar_triggers("<roos>", lambda entry: True) == ["<roo>"]
    assert library.similar_triggers("<roos>", lambda entry: entry.name != "rex") == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no database" * 100),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"sd", b"\xff\xfe")),
        lambda path: _edited(path, "PRAGMA user_version = 99"),
        lambda path: _edited(path, "DROP TABLE concepts"),
        lambda path: _edited(path, "UPDATE concepts SET slices = '{'"),
        lambda path: _edited(path, "UPDATE concepts SET slices = '[3]'"),
    ],
    ids=["missing", "empty", "other", "cut", "bytes", "version", "table", "json", "type"],
)
def test_damaged_index_is_rebuilt(folder, damage):
    before = Library(folder).entries
    damage(folder / INDEX_FILE)
    assert Library(folder).entries == before
    assert read_index(folder) == before


def _edited(path, *commands):
    with closing(sqlite3.connect(path)) as database:
        for command in commands:
            database.execute(command)
        database.commit()


_ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n"
_AS_VIEW = f"CREATE VIEW concepts AS SELECT o.* FROM old o, ({_ENDLESS})"


@pytest.mark.parametrize(
    "commands",
    [
        ("ALTER TABLE concepts RENAME TO old", _AS_VIEW),
        ("ALTER TABLE concepts RENAME TO old", "CREATE VIRTUAL TABLE concepts USING fts5(source)"),
        (f"CREATE TABLE more AS {_ENDLESS} LIMIT 10",),
        ("CREATE TRIGGER t AFTER INSERT ON concepts BEGIN DELETE FROM concepts; END",),
        ("CREATE INDEX more ON concepts (name)",),
        ("ALTER TABLE concepts ADD COLUMN more AS (hex(zeroblob(400000000)))",),
        (
            "ALTER TABLE concepts RENAME TO old",
            "CREATE TABLE concepts (source, stamp, name, trigger, words, own_tokens, class_word, "
            "family, base, fingerprint, rank, basis, slices, size, recorded, "
            "fault AS (hex(zeroblob(400000000))))",
            "INSERT INTO concepts SELECT source, stamp, name, trigger, words, own_tokens, "
            "class_word, family, base, fingerprint, rank, basis, slices, size, recorded FROM old",
            "DROP TABLE old",
        ),
        ("UPDATE concepts SET words = hex(zeroblob(10000000))",),
        ("UPDATE concepts SET words = zeroblob(20000000)",),
        ("PRAGMA journal_mode = WAL",),
    ],
    ids=[
        *("view", "virtual", "table", "trigger", "index", "column", "generated", "long", "blob"),
        "wal",
    ],
)
def test_hostile_index_is_rebuilt_in_seconds(folder, commands):
    before = Library(folder).entries
    _edited(folder / INDEX_FILE, *commands)
    started = time.monotonic()
    assert Library(folder).entries == before
    assert time.monotonic() - started < 5
    assert read_index(folder) == before


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_mutated_index_gives_the_same_entries(data):
    with TemporaryDirectory() as name:
        folder = Path(name)
        before = Library(_lora_folder(folder)).entries
        path = folder / INDEX_FILE
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        assert Library(folder).entries == before


def _lora_folder(folder):
    for name in ("a", "b"):
        lora(folder / f"{name}.safetensors", **{"modelspec.trigger_phrase": f"in {name} style"})
    return folder


def test_read_only_library_is_read(folder, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("customize.concepts.library.index.write_atomic", refuse)
    library = Library(folder)
    assert not library.is_index_saved and len(library.entries) == 3
    assert not (folder / INDEX_FILE).exists()
    assert any("cannot be written" in note for note in check_library(folder).notes)


def test_other_files_are_ignored(folder):
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.json").write_text("{}")
    (folder / "notes.txt").write_text("x")
    (folder / ".rex.partial").mkdir()
    save_concept(small(), folder / ".rex.partial" / "rex")
    assert set(entries_by_name(Library(folder))) == {"rex", "tom", "water-colour"}


def test_missing_folder_is_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").write_text("x")
        with pytest.raises(ConfigError, match="cannot be read"):
            Library(path)
    (tmp_path / "empty").mkdir()
    assert Library(tmp_path / "empty").entries == {}


def test_adding_copies_a_concept_with_its_layer_inputs(folder, tmp_path):
    library = tmp_path / "new"
    for record in (folder / "rex" / LAYER_INPUTS_FILE, folder / f"tom.{LAYER_INPUTS_FILE}"):
        record_of(small()).save(record)
    (folder / "rex" / ".checkpoints").mkdir()
    for source in ("rex", "tom.safetensors", "Water Colour.safetensors"):
        add_to_library(library, folder / source)
    made = entries_by_name(Library(library))
    assert {name: entry.has_layer_inputs for name, entry in made.items()} == {
        "rex": True,
        "tom": True,
        "water-colour": False,
    }
    assert not (library / "rex" / ".checkpoints").exists()
    hidden = {path.name for path in library.iterdir() if path.name.startswith(".")}
    assert hidden <= {INDEX_FILE, ".slices.lock"}
    for name in ("rex/concept.json", "rex/pytorch_lora_weights.safetensors", "tom.safetensors"):
        assert (library / name).read_bytes() == (folder / name).read_bytes()


def test_adding_copies_known_files_and_no_links_out_of_the_folder(folder, tmp_path):
    rex, home, library = folder / "rex", tmp_path / "home", tmp_path / "new"
    (home / ".ssh").mkdir(parents=True)
    (home / "key").write_text("KEY")
    (rex / "README.md").unlink()
    (rex / "README.md").symlink_to(home / "key")
    (rex / "sample-1.png").symlink_to(home / "key")
    (rex / "sample-4.png").symlink_to("sample-4.png")
    (rex / "pictures").symlink_to(home)
    (rex / "notes.txt").write_text("mine")
    (rex / "sample-2.png").write_bytes(b"picture")
    (rex / "sample-3.png").symlink_to("sample-2.png")
    weights = rex / "pytorch_lora_weights.safetensors"
    weights.rename(home / "weights")
    weights.symlink_to(home / "weights")  # a valid file, wherever it is
    with pytest.warns(UserWarning, match="5 of the files .* notes.txt, pictures, sample-1.png"):
        add_to_library(library, rex)
    copied = {path.name for path in (library / "rex").iterdir()}
    concept_files = {"concept.json", "learned_embeds.safetensors", weights.name}
    assert copied == concept_files | {"sample-2.png", "sample-3.png"}
    assert not any(path.is_symlink() for path in (library / "rex").iterdir())
    (folder / "tom.layer_inputs.safetensors").symlink_to(home / "key")
    (rex / LAYER_INPUTS_FILE).symlink_to(home / "key")
    for source in (rex, folder / "tom.safetensors"):
        with pytest.raises(ConceptError, match="not a safetensors file"):
            add_to_library(tmp_path / "other", source)
    assert not list((tmp_path / "other").glob("[!.]*"))


def test_links_in_the_hub_cache_are_followed(folder, tmp_path):
    blobs, snapshot = tmp_path / "models--a--rex" / "blobs", tmp_path / "models--a--rex"
    snapshot = snapshot / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((folder / "rex").iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    add_to_library(tmp_path / "new", snapshot)
    copied = {path.name for path in (tmp_path / "new" / "rex").iterdir()}
    assert copied == {path.name for path in snapshot.iterdir()} and "README.md" in copied


def test_taken_name_or_trigger_is_refused(folder, tmp_path):
    before = sorted(folder.rglob("*"))
    save_concept(small(3), tmp_path / "rex")
    save_concept(small(3, name="max", trigger="<tom>"), tmp_path / "max")
    lora(tmp_path / "rex.safetensors")
    for source in ("rex", "max", "rex.safetensors"):
        with pytest.raises(ConceptError, match="already"):
            add_to_library(folder, tmp_path / source)
    with pytest.raises(ConceptError, match="the concept does not exist"):
        add_to_library(folder, tmp_path / "none")
    (folder / "kit").mkdir()
    save_concept(small(3, name="kit", trigger="<kit>"), tmp_path / "kit")
    with pytest.raises(ConceptError, match="path in the library exists"):
        add_to_library(folder, tmp_path / "kit")
    (folder / "kit").rmdir()
    after = [path for path in sorted(folder.rglob("*")) if not path.name.startswith(".")]
    assert after == before


def test_failed_copy_leaves_no_files(folder, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    for source in ("rex", "tom.safetensors"):
        with pytest.raises(StorageError, match="disk is full"):
            add_to_library(tmp_path / "new", folder / source)
    assert [path.name for path in (tmp_path / "new").iterdir()] in ([], [".slices.lock"])


def _adding(library, source, barrier, answers):
    barrier.wait()
    try:
        answers.put(add_to_library(library, source).source)
    except CustomizeError as error:
        answers.put(error)


def test_one_of_several_processes_adds_a_name(tmp_path):
    processes = 4
    for number in range(processes):
        save_concept(small(number), tmp_path / f"{number}" / "rex")
        name = f"c{number}"
        save_concept(small(number, name=name, trigger=f"<{name}>"), tmp_path / f"{number}" / name)
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(2 * processes), context.Queue()
    library = tmp_path / "library"
    started = [
        context.Process(
            target=_adding, args=(library, tmp_path / str(number) / name, barrier, answers)
        )
        for number in range(processes)
        for name in ("rex", f"c{number}")
    ]
    for process in started:
        process.start()
    results = [answers.get(timeout=120) for _ in started]
    for process in started:
        process.join()
    refused = [result for result in results if isinstance(result, Exception)]
    assert sorted(map(str, set(results) - set(refused))) == ["c0", "c1", "c2", "c3", "rex"]
    assert len(refused) == processes - 1
    assert all("already has the concept rex" in str(error) for error in refused)
    assert set(entries_by_name(Library(library))) == {"rex", "c0", "c1", "c2", "c3"}
    assert Library(library).num_stale_rows == 0


def test_check_of_a_valid_library_reports_only_missing_records(folder):
    report = check_library(folder)
    assert len(report.errors) == 3 and all("customize record" in error for error in report.errors)
    assert any("rebuilt" in note for note in report.notes)
    assert not check_library(folder).notes


def library_errors(folder):
    return "\n".join(
        error for error in check_library(folder).errors if "customize record" not in error
    )


def test_check_reads_every_file(folder):
    path = folder / "rex" / "pytorch_lora_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    (folder / "tom.safetensors").write_bytes(b"cut")
    lora(folder / "nan.safetensors", value=float("nan"))
    lora(folder / "zero.safetensors", rank=0)
    shutil.copytree(folder / "rex", folder / "bad")
    (folder / "bad" / "concept.json").write_text("{")
    save_concept(small(7, name="kit", trigger="<kit>"), folder / "kit")
    save_concept(small(8, name="kit", trigger="<kit>"), folder / "other")
    other = (folder / "other" / "pytorch_lora_weights.safetensors").read_bytes()
    (folder / "kit" / "pytorch_lora_weights.safetensors").write_bytes(other)
    errors = library_errors(folder)
    for text in (
        "NaN",
        "rank 0",
        "tom.safetensors",
        "not valid JSON",
        "not that of the facts and tensors",
    ):
        assert text in errors, text


def test_check_reports_ambiguous_triggers(folder):
    save_concept(
        small(4, name="max", trigger="<rex>", slices={"6": [4, 5], "8": [4, 5]}), folder / "max"
    )
    lora(folder / "rex-two.safetensors", **{"modelspec.trigger_phrase": "<rex>"})
    errors = library_errors(folder)
    assert "<rex> is a trigger of both max and rex" in errors
    assert "<rex> is a trigger of both rex and rex-two.safetensors" in errors
    # Of another architecture it is offered to other pipelines.
    shutil.rmtree(folder / "max")
    (folder / "rex-two.safetensors").unlink()
    other = {"family": "sd", "denoiser": "other", "widths": {"unet": [6, 8]}}
    save_concept(small(4, name="max", trigger="<rex>", fingerprint=other), folder / "max")
    assert library_errors(folder) == ""


def test_check_reports_avoidable_collisions_and_full_widths(folder):
    assert library_errors(folder) == ""
    save_concept(
        small(4, name="max", trigger="<max>", slices={"6": [4, 5], "8": [0, 1]}), folder / "max"
    )
    report = check_library(folder)
    text = "\n".join(report.errors)
    assert "max and rex share 2 of 2 columns at width 8" in text and "width 6" not in text
    shutil.rmtree(folder / "max")
    save_concept(
        small(4, name="max", trigger="<max>", slices={"6": [4, 5], "8": [4, 5]}), folder / "max"
    )
    save_concept(
        small(4, name="ann", trigger="<ann>", slices={"6": [4, 5], "8": [6, 7]}), folder / "ann"
    )
    report = check_library(folder)
    assert library_errors(folder) == ""
    assert any("width 6 is full: 2 of 4 concepts" in note for note in report.notes)


def test_entries_compare_by_value(folder):
    a, b = Library(folder), Library(folder)
    assert a.entries == b.entries and all(isinstance(e, LibraryEntry) for e in a.entries.values())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_adding_to_a_read_only_folder_is_refused(folder, tmp_path):
    save_concept(small(3, name="kit", trigger="<kit>"), tmp_path / "kit")
    folder.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="cannot be written"):
            add_to_library(folder, tmp_path / "kit")
    finally:
        folder.chmod(0o700)
