"""The index of a library: facts about each concept, without its tensors.

The index is a hidden SQLite file in the folder. It is a cache of the concepts' files: a missing,
damaged or outdated index is rebuilt, and a row is used only while the names, sizes and modification
times of its files match.

The file is not changed in place. A new one is built in memory and renamed over the old one, so that
readers always find a complete file without locks, which network file systems may lack (SQLite's
write-ahead log does not work there). Of two concurrent writers the later one wins; missing rows are
read from the files.
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
# Limit of SQLite's steps while reading, besides one per byte; a row takes about 20, and 300 bytes.
_MAX_STEPS, _AT_A_TIME = 100_000, 1000
_CODEC = ("utf-8", "surrogatepass")
_SUFFIXES = (".json", ".safetensors")
# The stamp of files that cannot be read.
_UNREADABLE = "?"
_DOWN = re.compile(r".*(lora_A|lora_down|lora\.down)\b.*weight")
_TOKENS = re.compile(r"<[A-Za-z0-9][A-Za-z0-9_-]*>")


@dataclass(frozen=True)
class LibraryEntry:
    """One row of the index: a concept of the library.

    Attributes:
        source: Name of the concept's folder or file in the library.
        stamp: Names, sizes and modification times of its files.
        name: Name of the concept.
        trigger: Trigger in prompts; ``<name>`` for a LoRA of another program.
        trigger_words: The words that replace the trigger in the model's prompt: the trigger
            itself, or the trigger words of a LoRA.
        has_token_embeddings: Whether the trigger has token embeddings.
        class_word: Class of the concept.
        family: Name of the model family; empty for a LoRA of another program.
        base: The base model.
        fingerprint: Architecture of the base.
        rank: The largest rank of a layer.
        basis: Basis of the slices; None for the method "lora".
        slices: Input width, as text -> columns; empty for the method "lora".
        size: Size of the tensor files in bytes.
        has_layer_inputs: Whether recorded layer inputs are beside it.
        error: Why the concept cannot be read; empty if it can.
    """

    source: str
    stamp: str
    name: str
    trigger: str
    trigger_words: str
    has_token_embeddings: bool
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
        """The trigger, and triggers among the trigger words, in lower case."""
        return {token.lower() for token in (self.trigger, *_TOKENS.findall(self.trigger_words))}


def scan_stamps(library: Path) -> dict[str, str]:
    """The stamps of all visible folders and files of a library that may be concepts.

    Returns:
        Source -> stamp, sorted by source.

    Raises:
        OSError: If the folder cannot be listed.
    """
    stamps = {}
    os.stat(os.path.join(library, "."))  # fails if the folder can be listed but not entered
    with os.scandir(library) as entries:
        for entry in entries:
            stamp = "" if is_hidden(entry.name) else file_stamp(library, entry.name)
            if stamp:
                stamps[entry.name] = stamp
    return dict(sorted(stamps.items()))


def file_stamp(library: Path, source: str) -> str:
    """Names, sizes and modification times of a concept's files; empty if there is no concept.

    A folder is a concept if it has ``concept.json`` or safetensors files; other files are ignored.
    A folder that cannot be listed counts as a concept: reading it reports the problem.
    """
    path = library / source
    is_single_file = source.endswith(".safetensors") and not source.endswith(LAYER_INPUTS_FILE)
    try:
        status = _status(path)
        if stat.S_ISDIR(status.st_mode):
            names = [name for name in os.listdir(path) if name.endswith(_SUFFIXES)]
            files = {name: _status(path / name) for name in names if not name.startswith(".")}
        elif is_single_file:
            files = {source: status}
            record = path.with_suffix(f".{LAYER_INPUTS_FILE}")
            if path_exists(record):
                files[record.name] = _status(record)
        else:
            return ""
    except FileNotFoundError:  # deleted meanwhile
        return ""
    except OSError as error:
        may_be_concept = is_single_file or isinstance(error, PermissionError)
        return f"{_UNREADABLE}:{error.errno}:0" if may_be_concept else ""
    if not any(name == INFO_FILE or name.endswith(".safetensors") for name in files):
        return ""
    return "/".join(f"{name}:{s.st_size}:{s.st_mtime_ns}" for name, s in sorted(files.items()))


def _status(path: Path) -> os.stat_result:
    """The status of a file, or of a broken link."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return os.lstat(path)


def describe_concept(library: Path, source: str, stamp: str) -> LibraryEntry:
    """Make the entry of a concept from its files' facts and headers.

    Args:
        library: The library's folder.
        source: Name of the concept's folder or file.
        stamp: Result of :func:`file_stamp`.
    """
    path = library / source
    files = [part.rsplit(":", 2) for part in stamp.split("/")]
    size = sum(
        int(number)
        for name, number, _ in files
        if name.endswith(".safetensors") and not name.endswith(LAYER_INPUTS_FILE)
    )
    has_layer_inputs = any(name.endswith(LAYER_INPUTS_FILE) for name, _, _ in files)
    problem = ""
    try:
        if files[0][0] == _UNREADABLE:
            raise ConceptError(
                f"the concept cannot be read: {os.strerror(int(files[0][1]))}",
                where=path,
                fix="allow reading it, or remove it from the library",
            )
        info = _read_info(path)
    except CustomizeError as error:
        info, problem = LoraInfo(name_from_file(path.stem), "", "", 0), str(error)
    return LibraryEntry(
        source=source,
        stamp=stamp,
        name=info.name,
        trigger=info.trigger or f"<{info.name}>",
        trigger_words=info.trigger_words,
        has_token_embeddings=bool(info.trigger),
        class_word=info.class_word,
        family=info.family,
        base=info.base,
        fingerprint=info.fingerprint,
        rank=info.rank,
        basis=info.basis,
        slices={width: list(columns) for width, columns in info.slices.items()},
        size=size,
        has_layer_inputs=has_layer_inputs,
        error=problem,
    )


def _read_info(path: Path) -> ConceptInfo | LoraInfo:
    if path_exists(path / INFO_FILE):
        return read_info(path)
    if os.path.isdir(path):
        tensors = [p for p in list_folder(path) if p.suffix == ".safetensors"]
        name, files = path.name, [p for p in tensors if not p.name.endswith(LAYER_INPUTS_FILE)]
    else:
        name, files = path.stem, [path]
    rank, metadata = 0, dict[str, str]()
    for file in files:
        shapes, metadata = _read_header(file)
        if INFO_HEADER in metadata:
            return parse_header_info(metadata, file)
        merged = parse_merge_info(metadata)
        if merged is not None:
            return merged_lora_info(name, merged, subjects_from_header(metadata, file))
        downs = [shape[0] for key, shape in shapes.items() if _DOWN.fullmatch(key) and shape]
        rank = max([rank, *downs])
    facts = FileMetadata.from_header(metadata, None, path)
    return LoraInfo(name_from_file(name), "", facts.base, rank, facts.words)


def _read_header(path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The shapes of a ``.safetensors`` file's tensors by name, and its metadata.

    Raises:
        ConceptError: If the file is missing, or its header is invalid.
    """
    try:
        return read_safetensors_header(path)
    except OSError as error:
        raise ConceptError(
            f"the file cannot be read: {error.strerror or error}",
            where=path,
            fix="get an unchanged copy, or allow reading it",
        ) from error
    except ValueError as error:
        raise ConceptError(
            f"the file is damaged, or is not a safetensors file: {str(error)[:MAX_NAME]}",
            where=path,
            fix="get an unchanged copy",
        ) from error


# A field of LibraryEntry -> its column, where the names differ.
_COLUMN_NAMES = {
    "trigger_words": "words",
    "has_token_embeddings": "own_tokens",
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
    """Read the index; empty if it is missing, damaged or of another version.

    An entry is valid while its stamp equals that of its files.

    Returns:
        Source -> entry.
    """
    path = library / INDEX_FILE
    try:
        data = read_bytes(path, _MAX_BYTES)
        if not data.startswith(b"SQLite format 3\0"):
            return {}
        return {entry.source: entry for entry in map(_parse_row, _read_rows(data))}
    except (OSError, sqlite3.Error, ValueError, TypeError, RecursionError, MemoryError):
        return {}


def _read_rows(data: bytes) -> list[tuple[Any, ...]]:
    """The rows of an untrusted database, with limits.

    A view or generated column could compute endlessly, and pages that refer to one another could
    give endless rows.

    Raises:
        sqlite3.Error: If the database is damaged.
        ValueError: If the database has another version, schema or checksum, or too much content.
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
            raise ValueError("the schema of the index is unknown")
        rows, budget = [], 2 * len(data)
        for row in database.execute(f"SELECT {', '.join(_COLUMNS)} FROM concepts"):
            budget -= sum(len(value) for value in row if isinstance(value, str | bytes))
            if budget < 0:
                raise ValueError("the rows of the index are larger than its file")
            rows.append(row)
        if database.execute("PRAGMA application_id").fetchone() != (_checksum(rows),):
            raise ValueError("the index is damaged")
        return rows


def write_index(library: Path, entries: Iterable[LibraryEntry]) -> None:
    """Replace the index atomically.

    Raises:
        OSError: If the index cannot be written, for example in a read-only folder.
    """
    with closing(sqlite3.connect(":memory:")) as database:
        rows = [_format_row(entry) for entry in entries]
        database.execute(f"PRAGMA user_version = {_VERSION}")
        database.execute(f"PRAGMA application_id = {_checksum(rows)}")
        database.execute(_TABLE)
        # As bytes, because file names may not be valid Unicode, which sqlite3 requires of str.
        placeholders = ", ".join("CAST(? AS TEXT)" if _is_text(name) else "?" for name in _COLUMNS)
        names = ", ".join(_COLUMNS)
        database.executemany(f"INSERT INTO concepts ({names}) VALUES ({placeholders})", rows)
        database.commit()
        data = database.serialize()
    write_atomic(library / INDEX_FILE, data)


def _format_row(entry: LibraryEntry) -> list[Any]:
    values = {name: getattr(entry, name) for name in _FIELDS}
    values["basis"] = None if entry.basis is None else entry.basis.model_dump()
    values |= {name: json.dumps(values[name]) for name in _JSON}
    return [v.encode(*_CODEC) if isinstance(v, str) else v for v in values.values()]


def _parse_row(row: tuple[Any, ...]) -> LibraryEntry:
    values = dict(zip(_FIELDS, row, strict=True))
    values |= {name: json.loads(values[name]) for name in _JSON}
    entry = _ENTRY.validate_python(values)
    if entry.basis is not None:
        check_slices(entry.slices, entry.rank, entry.basis)
    return entry


def _checksum(rows: Iterable[Iterable[Any]]) -> int:
    """CRC-32 of all values as a signed 32-bit integer, as SQLite's header stores it."""
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
