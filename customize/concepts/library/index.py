"""The index of a library: what is known of each concept without reading its tensors.

It is one hidden SQLite file in the folder, and the concepts' files are the truth: an index that is
missing, damaged or of another version is made anew from them, and each row is used only as long as
the names, sizes and times of its files are those that it notes.

The file is never changed in place. A new one is made in memory and renamed over the old one, so
that readers find a whole one at any time, without locks, which network file systems may not have
(SQLite's write-ahead log cannot work there at all). Of two that write at once the later one stays;
what it doesn't know of is read from the files.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
import zlib
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from customize.atomic import write_atomic
from customize.concepts.concept_info import MAX_NAME, BasisInfo, ConceptInfo, check_slices
from customize.concepts.formats.file_metadata import FileMetadata
from customize.concepts.formats.lora_file import name_from_file
from customize.concepts.formats.merged_lora import merged_lora_info, parse_merge_info
from customize.concepts.io.file_layout import INFO_FILE, INFO_HEADER, LAYER_INPUTS_FILE
from customize.concepts.io.find_files import is_hidden, list_folder
from customize.concepts.io.read_concept import parse_header_info, read_info
from customize.concepts.tokens.subjects import subjects_from_header
from customize.concepts.types import LoraInfo
from customize.errors import ConceptError, CustomizeError
from customize.safe_read import path_exists, read_bytes, read_safetensors_header

INDEX_FILE = ".library.sqlite"
_VERSION = 2
_MAX_BYTES = 256 * 2**20
_MAX_ROW = 16 * 2**20
# SQLite's steps that reading may take beside one a byte; a row of ours has about 20, and 300 bytes.
_MAX_STEPS, _AT_A_TIME = 100_000, 1000
_CODEC = ("utf-8", "surrogatepass")
_SUFFIXES = (".json", ".safetensors")
# In the place of names, sizes and times that cannot be had.
_UNREADABLE = "?"
_DOWN = re.compile(r".*(lora_A|lora_down|lora\.down)\b.*weight")
_TOKENS = re.compile(r"<[A-Za-z0-9][A-Za-z0-9_-]*>")


@dataclass(frozen=True)
class LibraryEntry:
    """One row: what a library knows of one concept.

    Attributes:
        source: the concept's folder or file, by its name in the library.
        stamp: names, sizes and times of its files.
        name: of the concept.
        trigger: what calls it in a prompt. A LoRA from elsewhere is called ``<name>``.
        words: what a prompt then says to the model: the trigger, or what a LoRA's file names.
        own_tokens: whether the trigger is a token of its own, which a LoRA's is not.
        class_word, family, base, fingerprint: as :class:`ConceptInfo` has them; a LoRA from
            elsewhere says no family, and which model it fits is known when it is read.
        rank: the largest of its layers'.
        basis, slices: of the method "orthogonal".
        size: bytes of its tensors' files.
        recorded: whether a record of its layers' inputs lies beside it.
        fault: why it cannot be read; empty where nothing is known to be wrong.
    """

    source: str
    stamp: str
    name: str
    trigger: str
    trigger_words: str
    has_own_tokens: bool
    class_word: str
    family: str
    base: str
    fingerprint: Mapping[str, Any]
    rank: int
    basis: BasisInfo | None
    slices: Mapping[str, list[int]]
    size: int
    has_layer_inputs: bool
    error: str

    @property
    def trigger_tokens(self) -> set[str]:
        """All that calls it in a prompt, in lower case: the trigger, and tokens among its words."""
        return {each.lower() for each in (self.trigger, *_TOKENS.findall(self.trigger_words))}


def scan_stamps(library: Path) -> dict[str, str]:
    """Source -> stamp, for all that may be a concept in a library's folder; what is hidden isn't.

    Raises:
        OSError: the folder cannot be looked into.
    """
    found = {}
    os.stat(os.path.join(library, "."))  # who may not enter it gets names, but reaches no file
    with os.scandir(library) as entries:
        for entry in entries:
            stamp = "" if is_hidden(entry.name) else file_stamp(library, entry.name)
            if stamp:
                found[entry.name] = stamp
    return dict(sorted(found.items()))


def file_stamp(library: Path, source: str) -> str:
    """Names, sizes and times of a concept's files; empty where nothing there is one.

    A folder counts that has ``concept.json`` or safetensors files in it; what else is there, such
    as pictures or the checkpoints of a run, does not. A folder that may not be looked into counts
    as well, as it may hold a concept: reading it tells what is wrong.
    """
    path = library / source
    single = source.endswith(".safetensors") and not source.endswith(LAYER_INPUTS_FILE)
    try:
        status = _status(path)
        if stat.S_ISDIR(status.st_mode):
            names = [name for name in os.listdir(path) if name.endswith(_SUFFIXES)]
            own = {name: _status(path / name) for name in names if not name.startswith(".")}
        elif single:
            own = {source: status}
            record = path.with_suffix(f".{LAYER_INPUTS_FILE}")
            if path_exists(record):
                own[record.name] = _status(record)
        else:
            return ""
    except FileNotFoundError:  # it went just now
        return ""
    except OSError as error:
        counts = single or isinstance(error, PermissionError)
        return f"{_UNREADABLE}:{error.errno}:0" if counts else ""
    if not any(name == INFO_FILE or name.endswith(".safetensors") for name in own):
        return ""
    return "/".join(f"{name}:{s.st_size}:{s.st_mtime_ns}" for name, s in sorted(own.items()))


def _status(path: Path) -> os.stat_result:
    """That of the file itself, or of a link that leads nowhere."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return os.lstat(path)


def describe_concept(library: Path, source: str, stamp: str) -> LibraryEntry:
    """The row of a concept, from what its files say beside their tensors."""
    path = library / source
    files = [part.rsplit(":", 2) for part in stamp.split("/")]
    size = sum(
        int(number)
        for name, number, _ in files
        if name.endswith(".safetensors") and not name.endswith(LAYER_INPUTS_FILE)
    )
    recorded = any(name.endswith(LAYER_INPUTS_FILE) for name, _, _ in files)
    fault = ""
    try:
        if files[0][0] == _UNREADABLE:
            raise ConceptError(
                f"it cannot be looked into: {os.strerror(int(files[0][1]))}",
                where=path,
                fix="allow reading and entering it, or take it out",
            )
        info = _info(path)
    except CustomizeError as error:
        info, fault = LoraInfo(name_from_file(path.stem), "", "", 0), str(error)
    return LibraryEntry(
        source=source,
        stamp=stamp,
        name=info.name,
        trigger=info.trigger or f"<{info.name}>",
        trigger_words=info.trigger_words,
        has_own_tokens=bool(info.trigger),
        class_word=info.class_word,
        family=info.family,
        base=info.base,
        fingerprint=info.fingerprint,
        rank=info.rank,
        basis=info.basis,
        slices={width: list(own) for width, own in info.slices.items()},
        size=size,
        has_layer_inputs=recorded,
        error=fault,
    )


def _info(path: Path) -> ConceptInfo | LoraInfo:
    if path_exists(path / INFO_FILE):
        return read_info(path)
    if os.path.isdir(path):
        own = [p for p in list_folder(path) if p.suffix == ".safetensors"]
        name, files = path.name, [p for p in own if not p.name.endswith(LAYER_INPUTS_FILE)]
    else:
        name, files = path.stem, [path]
    rank, metadata = 0, dict[str, str]()
    for file in files:
        shapes, metadata = _header(file)
        if INFO_HEADER in metadata:
            return parse_header_info(metadata, file)
        merged = parse_merge_info(metadata)
        if merged is not None:
            return merged_lora_info(name, merged, subjects_from_header(metadata, file))
        downs = [shape[0] for key, shape in shapes.items() if _DOWN.fullmatch(key) and shape]
        rank = max([rank, *downs])
    facts = FileMetadata.from_header(metadata, None, path)
    return LoraInfo(name_from_file(name), "", facts.base, rank, facts.words)


def _header(path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The shapes of a ``.safetensors`` file's tensors by their names, and its metadata.

    Raises:
        ConceptError: it is missing, or no such file as far as its header says.
    """
    try:
        return read_safetensors_header(path)
    except OSError as error:
        raise ConceptError(
            f"the file cannot be read: {error.strerror or error}",
            where=path,
            fix="get the file anew, or allow reading it",
        ) from error
    except ValueError as error:
        raise ConceptError(
            f"the file is damaged or no safetensors file: {str(error)[:MAX_NAME]}",
            where=path,
            fix="get the file anew",
        ) from error


# A field of LibraryEntry -> its column, where the names differ.
_COLUMN_NAMES = {
    "trigger_words": "words",
    "has_own_tokens": "own_tokens",
    "has_layer_inputs": "recorded",
    "error": "fault",
}
_FIELDS = [field.name for field in fields(LibraryEntry)]
_COLUMNS = [_COLUMN_NAMES.get(name, name) for name in _FIELDS]
_JSON = ("fingerprint", "basis", "slices")
_ENTRY = TypeAdapter(LibraryEntry)
_TABLE = (
    "CREATE TABLE concepts (source TEXT PRIMARY KEY, stamp TEXT, name TEXT, trigger TEXT, "
    "words TEXT, own_tokens INTEGER, class_word TEXT, family TEXT, base TEXT, "
    "fingerprint TEXT, rank INTEGER, basis TEXT, slices TEXT, size INTEGER, "
    "recorded INTEGER, fault TEXT)"
)
_SCHEMA = [
    ("table", "concepts", "concepts", _TABLE),
    ("index", "sqlite_autoindex_concepts_1", "concepts", None),
]


def read_index(library: Path) -> dict[str, LibraryEntry]:
    """Source -> row, as the index has them; none where it is missing, damaged or another version's.

    Whether they hold still is told by their stamps.
    """
    path = library / INDEX_FILE
    try:
        data = read_bytes(path, _MAX_BYTES)
        if not data.startswith(b"SQLite format 3\0"):
            return {}
        return {entry.source: entry for entry in map(_entry, _rows(data))}
    except (OSError, sqlite3.Error, ValueError, TypeError, RecursionError, MemoryError):
        return {}


def _rows(data: bytes) -> list[tuple[Any, ...]]:
    """The rows of a database, which anybody may have made: of our table alone, in bounds.

    A view or generated column computes without end what takes a few bytes to ask for, and pages
    that refer to one another give rows without end.

    Raises:
        sqlite3.Error, ValueError: it is damaged, of another version, or not as we write it.
    """
    with closing(sqlite3.connect(":memory:")) as database:
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_ROW)
        database.deserialize(data)
        database.text_factory = _text
        steps = iter(range((_MAX_STEPS + len(data)) // _AT_A_TIME))
        database.set_progress_handler(lambda: next(steps, None) is None, _AT_A_TIME)
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "query_only = ON"):
            database.execute(f"PRAGMA {pragma}")
        if database.execute("PRAGMA user_version").fetchone() != (_VERSION,):
            raise ValueError("the index is of another version")
        schema = database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master")
        if schema.fetchmany(len(_SCHEMA) + 1) != _SCHEMA:
            raise ValueError("the index has other tables than ours")
        found, left = [], 2 * len(data)
        for row in database.execute(f"SELECT {', '.join(_COLUMNS)} FROM concepts"):
            left -= sum(len(value) for value in row if isinstance(value, str | bytes))
            if left < 0:
                raise ValueError("the index has more in its rows than in its file")
            found.append(row)
        if database.execute("PRAGMA application_id").fetchone() != (_checksum(found),):
            raise ValueError("the index is damaged")
        return found


def write_index(library: Path, entries: Iterable[LibraryEntry]) -> None:
    """Put a new index in the place of an older one, whole or not at all.

    Raises:
        OSError: it cannot be written, as in a folder that is only to be read.
    """
    with closing(sqlite3.connect(":memory:")) as database:
        rows = [_row(entry) for entry in entries]
        database.execute(f"PRAGMA user_version = {_VERSION}")
        database.execute(f"PRAGMA application_id = {_checksum(rows)}")
        database.execute(_TABLE)
        # As bytes: a file's name need not be Unicode, which the module's own text must be.
        places = ", ".join("CAST(? AS TEXT)" if _is_text(name) else "?" for name in _COLUMNS)
        names = ", ".join(_COLUMNS)
        database.executemany(f"INSERT INTO concepts ({names}) VALUES ({places})", rows)
        database.commit()
        data = database.serialize()
    write_atomic(library / INDEX_FILE, data)


def _row(entry: LibraryEntry) -> list[Any]:
    values = {name: getattr(entry, name) for name in _FIELDS}
    values["basis"] = None if entry.basis is None else entry.basis.model_dump()
    values |= {name: json.dumps(values[name]) for name in _JSON}
    return [v.encode(*_CODEC) if isinstance(v, str) else v for v in values.values()]


def _entry(row: tuple[Any, ...]) -> LibraryEntry:
    values = dict(zip(_FIELDS, row, strict=True))
    values |= {name: json.loads(values[name]) for name in _JSON}
    entry = _ENTRY.validate_python(values)
    if entry.basis is not None:
        check_slices(entry.slices, entry.rank, entry.basis)
    return entry


def _checksum(rows: Iterable[Iterable[Any]]) -> int:
    """Of all values, as a signed number of 32 bits, which SQLite's header has room for."""
    total = 0
    for row in rows:
        for value in row:
            data = value.encode(*_CODEC) if isinstance(value, str) else value
            text = data if isinstance(data, bytes) else str(int(data)).encode()
            total = zlib.crc32(text + b"\0", total)
    return total - 2**31


def _text(data: bytes) -> str:
    return data.decode(*_CODEC)


def _is_text(column: str) -> bool:
    return f"{column} TEXT" in _TABLE
