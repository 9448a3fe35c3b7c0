"""The captions of training pictures: a text file beside each, a metadata file, or a template."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from customize.errors import DataError
from customize.safe_read import MAX_TABLE_BYTES, read_bytes
from customize.training.data.image_folder import (
    METADATA_FILES,
    ImageFolder,
    count_images,
    has_exact_name,
    join_names,
    match_by_name,
)
from customize.training.field_values import contains_trigger

_COLUMNS = ("file_name", "text")
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark this one begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Words after which a thing's name has an article: "a photo of a dog", but "a photo of my dog".
_BEFORE_ARTICLE = (
    *("of", "and", "or", "with", "without", "in", "on", "at", "by", "near", "beside", "behind"),
    *("under", "over", "from", "to", "for", "like", "as", "is", "between", "than", "versus"),
)


@dataclass(frozen=True)
class CaptionSet:
    """The captions of some pictures.

    Attributes:
        texts: picture -> one line of text.
        templated: the pictures whose caption is the template.
        unused: caption files that were not read, with the reason, in words.
    """

    texts: dict[Path, str]
    templated: set[Path] = field(default_factory=set)
    unused: list[str] = field(default_factory=list)


def read_captions(
    folder: ImageFolder,
    paths: Sequence[Path],
    *,
    template: str | None,
    trigger: str | None,
    forbidden: Sequence[str],
) -> CaptionSet:
    """Read the captions of pictures.

    Of several files for one picture, those whose name is exactly the picture's come first, then
    .txt before .caption, then metadata.jsonl and metadata.csv, then the template.

    Args:
        paths: those to caption, of the pictures in the folder.
        template, trigger, forbidden: see
            :func:`customize.training.data.dataset.read_training_images`.

    Raises:
        DataError: a caption is missing, ambiguous or unreadable, lacks the trigger or has what is
            forbidden.
    """
    beside, unmatched = match_by_name(folder.captions, folder.images)
    unused = [f"{file.name} (no picture of that name)" for file in unmatched]
    listed: dict[str, str] = {}
    metadata = sorted(folder.metadata, key=lambda file: METADATA_FILES.index(file.name))
    for file in metadata:
        rows = _read_metadata(file, {path.name for path in folder.images})
        if rows is None:
            unused.append(f"{file.name} (has no columns {' and '.join(_COLUMNS)})")
            continue
        other = [name for name in rows.keys() & listed.keys() if _differ(rows[name], listed[name])]
        if other:
            unused.append(
                f"{file.name} for {join_names(sorted(other))} ({metadata[0].name} is used)"
            )
        listed = rows | listed

    result = CaptionSet({}, unused=unused)
    for path in paths:
        text = listed.get(path.name)
        if path in beside:
            own, more = _own_text(path, beside[path])
            unused += more
            if text is not None and _differ(text, own):
                unused.append(f"the metadata of {path.name} ({path.stem}.txt or .caption is used)")
            text = own
        if text is None and template is not None:
            text = template.replace("{}", trigger or "")
            result.templated.add(path)
        result.texts[path] = "" if text is None else " ".join(text.split())
    _check(folder.path, result.texts, trigger, forbidden)
    return result


def _own_text(picture: Path, files: Sequence[Path]) -> tuple[str, list[str]]:
    """A picture's caption from the files beside it, and those of other text, in words.

    Raises:
        DataError: one cannot be read, or there are two that nothing puts into an order.
    """

    def rank(file: Path) -> tuple[bool, bool, bool]:
        return (
            not has_exact_name(file, picture),
            file.suffix.lower() != ".txt",
            file.stem != picture.stem,
        )

    files = sorted(files, key=rank)
    texts = [_read_text(file) for file in files]
    others = [file for file, text in zip(files, texts, strict=True) if _differ(text, texts[0])]
    for other in others:
        if rank(other) == rank(files[0]):
            raise DataError(
                f"{files[0].name} and {other.name} are different captions of {picture.name}",
                where=picture.parent,
                fix="keep one of them",
            )
    return texts[0], [f"{other.name} ({files[0].name} is used)" for other in others]


def _check(
    folder: Path, captions: dict[Path, str], trigger: str | None, forbidden: Sequence[str]
) -> None:
    empty = [path.name for path, text in captions.items() if not text]
    if empty:
        raise DataError(
            f"{count_images(empty)} no caption: {join_names(empty)}",
            where=folder,
            fix="put a .txt file with text beside each, list them in metadata.jsonl or "
            "metadata.csv, or give a caption template",
        )
    lacking = [
        p.name for p, text in captions.items() if trigger and not contains_trigger(text, trigger)
    ]
    if lacking:
        raise DataError(
            f"{count_images(lacking)} a caption without the trigger {trigger}: "
            f"{join_names(lacking)}",
            where=folder,
            fix=f"write {trigger} where the subject is named, as in 'a photo of {trigger}'",
        )
    for word in forbidden:
        having = [path.name for path, text in captions.items() if contains_trigger(text, word)]
        if not having:
            continue
        raise DataError(
            f"{count_images(having)} a caption with the trigger {word}: {join_names(having)}",
            where=folder,
            fix="name the class there; class pictures show it without the concept",
        )


def _differ(a: str, b: str) -> bool:
    return a.split() != b.split()


def replace_trigger(text: str, trigger: str, class_word: str) -> str:
    """A text with the class word in the trigger's place: what it says to who doesn't know the
    concept.

    "a photo of <rex>" becomes "a photo of a dog". Where the class word follows the trigger already
    the trigger goes: "a photo of a <rex> dog" becomes the same.
    """
    named = rf"(?P<doubled>\s+{re.escape(class_word)}\b)?"
    pattern = re.compile(re.escape(trigger) + named, re.IGNORECASE)

    def replaced(match: re.Match[str]) -> str:
        before = match.string[: match.start()].split()
        bare = not before or before[-1].lower().rstrip() in _BEFORE_ARTICLE
        bare = bare or before[-1][-1] in ",.:;!?-"
        return f"a {class_word}" if bare else class_word

    return pattern.sub(replaced, text)


def _read_metadata(path: Path, pictures: set[str]) -> dict[str, str] | None:
    """Captions by file name; None for a table without captions.

    Raises:
        DataError: a row is malformed, names no picture or names one again.
    """
    captions: dict[str, str] = {}
    rows = _json_rows(path) if path.suffix == ".jsonl" else _csv_rows(path)
    if rows is None:
        return None
    for number, name, text, problem in rows:
        if problem is None:
            if name in captions:
                problem = f"lists {name} again"
            elif name not in pictures:
                problem = f"names {name}, which is no picture in the folder"
            elif not _is_text(text):
                problem = f"gives {name} half a character, an escape from \\ud800 to \\udfff"
        if problem:
            raise DataError(f"line {number} {problem}", where=path, fix="correct the line")
        captions[name] = text
    return captions


# Line number, file name, text, and what is wrong with the line.
_Row = tuple[int, str, str, str | None]


def _json_rows(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = text = None
        if isinstance(name, str) and isinstance(text, str):
            yield number, name, text, None
        else:
            yield number, "", "", 'is not {"file_name": "...", "text": "..."}'


def _csv_rows(path: Path) -> Iterator[_Row] | None:
    """The rows below the header of a table with commas, semicolons or tabs between the columns;
    None where it lacks the columns."""
    lines = _read_text(path).split("\n")
    for delimiter in ",;\t":
        header = next(csv.reader(lines[:1], delimiter=delimiter), [])
        columns = [column.strip() for column in header]
        if set(_COLUMNS) <= set(columns):
            return _csv_cells(lines, columns, delimiter)
    return None


def _csv_cells(lines: Sequence[str], columns: Sequence[str], delimiter: str) -> Iterator[_Row]:
    # With their ends: a text in quotes may have several lines.
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    at = [columns.index(column) for column in _COLUMNS]
    try:
        next(reader)
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            problem = None
            if len(row) != len(columns):
                problem = (
                    f"has {len(row)} columns and the header {len(columns)}: text with a "
                    f"{'tab' if delimiter == chr(9) else repr(delimiter)} in it needs quotes"
                )
                row += [""] * len(columns)
            yield reader.line_num, row[at[0]].strip(), row[at[1]], problem
    except csv.Error as error:
        yield reader.line_num, "", "", f"is not valid CSV: {error}"


def _is_text(text: str) -> bool:
    """Whether a string from JSON can be written; escapes there may be halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in what its byte order mark says."""
    try:
        data = read_bytes(path, MAX_TABLE_BYTES)
        named = (name for mark, name in _ENCODINGS.items() if data.startswith(mark))
        text = data.decode(next(named, "utf-8-sig"))
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(
            f"the captions cannot be read: {reason}", where=path, fix="save it as UTF-8 text"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
