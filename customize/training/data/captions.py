"""Captions of training images from text files, metadata files or a template."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from customize.errors import DataError
from customize.image_folder import (
    METADATA_FILES,
    ImageFolder,
    count_images,
    has_exact_name,
    join_names,
    match_by_name,
)
from customize.safe_read import MAX_TABLE_BYTES, read_bytes
from customize.training.field_values import contains_trigger

_COLUMNS = ("file_name", "text")
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose BOM is a prefix of this one
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Words after which a class word needs an article: "a photo of a dog", but "a photo of my dog".
_WORDS_BEFORE_ARTICLE = (
    *("of", "and", "or", "with", "without", "in", "on", "at", "by", "near", "beside", "behind"),
    *("under", "over", "from", "to", "for", "like", "as", "is", "between", "than", "versus"),
)


@dataclass(frozen=True)
class CaptionSet:
    """Captions of images.

    Attributes:
        texts: Image -> one line of text.
        templated: Images whose caption is from the template.
        unused: Ignored caption files, with the reason.
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
    """Read the captions of images.

    The order of precedence is: files with exactly the image's name, .txt files, .caption files,
    metadata.jsonl, metadata.csv, the template.

    Args:
        folder: The image folder.
        paths: The images to caption.
        template: Caption template with {} for the trigger, or None.
        trigger: Word that captions must contain, or None.
        forbidden: Words that captions must not contain.

    Raises:
        DataError: A caption is missing, ambiguous or unreadable, lacks the trigger or contains a
            forbidden word.
    """
    beside, unmatched = match_by_name(folder.captions, folder.images)
    unused = [f"{file.name} (no image of that name)" for file in unmatched]
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
            caption, ignored = _read_caption_files(path, beside[path])
            unused += ignored
            if text is not None and _differ(text, caption):
                unused.append(f"the metadata of {path.name} ({path.stem}.txt or .caption is used)")
            text = caption
        if text is None and template is not None:
            text = template.replace("{}", trigger or "")
            result.templated.add(path)
        result.texts[path] = "" if text is None else " ".join(text.split())
    _check_captions(folder.path, result.texts, trigger, forbidden)
    return result


def _read_caption_files(picture: Path, files: Sequence[Path]) -> tuple[str, list[str]]:
    """Read an image's caption from its files; also return the ignored files with the reason.

    Raises:
        DataError: A file is unreadable, or two files of the same precedence differ.
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


def _check_captions(
    folder: Path, captions: dict[Path, str], trigger: str | None, forbidden: Sequence[str]
) -> None:
    empty = [path.name for path, text in captions.items() if not text]
    if empty:
        raise DataError(
            f"{count_images(empty)} no caption: {join_names(empty)}",
            where=folder,
            fix="put a .txt file with text beside each, list them in metadata.jsonl or "
            "metadata.csv, or set a caption template",
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
        names = [path.name for path, text in captions.items() if contains_trigger(text, word)]
        if not names:
            continue
        raise DataError(
            f"{count_images(names)} a caption with the trigger {word}: {join_names(names)}",
            where=folder,
            fix="name the class there; class images show it without the concept",
        )


def _differ(a: str, b: str) -> bool:
    return a.split() != b.split()


def replace_trigger(text: str, trigger: str, class_word: str) -> str:
    """Replace the trigger in a text with the class word.

    "a photo of <rex>" becomes "a photo of a dog". If the class word follows the trigger, the
    trigger is removed: "a photo of a <rex> dog" becomes the same.
    """
    doubled = rf"(?P<doubled>\s+{re.escape(class_word)}\b)?"
    pattern = re.compile(re.escape(trigger) + doubled, re.IGNORECASE)

    def replace(match: re.Match[str]) -> str:
        before = match.string[: match.start()].split()
        needs_article = not before or before[-1].lower().rstrip() in _WORDS_BEFORE_ARTICLE
        needs_article = needs_article or before[-1][-1] in ",.:;!?-"
        return f"a {class_word}" if needs_article else class_word

    return pattern.sub(replace, text)


def _read_metadata(path: Path, pictures: set[str]) -> dict[str, str] | None:
    """Read file name -> caption; None for a table without caption columns.

    Raises:
        DataError: A row is malformed, or names an unknown or repeated image.
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
                problem = f"names {name}, which is not an image in the folder"
            elif not _is_text(text):
                problem = f"has a lone surrogate for {name}, an escape from \\ud800 to \\udfff"
        if problem:
            raise DataError(f"line {number} {problem}", where=path, fix="correct the line")
        captions[name] = text
    return captions


# Line number, file name, text, and the problem with the line.
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
    """Read the rows of a table separated by commas, semicolons or tabs.

    Returns:
        The rows below the header; None if the header lacks the columns.
    """
    lines = _read_text(path).split("\n")
    for delimiter in ",;\t":
        header = next(csv.reader(lines[:1], delimiter=delimiter), [])
        columns = [column.strip() for column in header]
        if set(_COLUMNS) <= set(columns):
            return _csv_cells(lines, columns, delimiter)
    return None


def _csv_cells(lines: Sequence[str], columns: Sequence[str], delimiter: str) -> Iterator[_Row]:
    # With line ends, because quoted text may have several lines.
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    indices = [columns.index(column) for column in _COLUMNS]
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
            yield reader.line_num, row[indices[0]].strip(), row[indices[1]], problem
    except csv.Error as error:
        yield reader.line_num, "", "", f"is not valid CSV: {error}"


def _is_text(text: str) -> bool:
    """Whether a string from JSON is valid Unicode, without lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(path: Path) -> str:
    """Read a text file in UTF-8, or in the encoding of its byte order mark."""
    try:
        data = read_bytes(path, MAX_TABLE_BYTES)
        encodings = (name for mark, name in _ENCODINGS.items() if data.startswith(mark))
        text = data.decode(next(encodings, "utf-8-sig"))
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(
            f"the captions cannot be read: {reason}", where=path, fix="save it as UTF-8 text"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
