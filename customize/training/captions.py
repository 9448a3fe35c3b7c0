"""The captions of training pictures: a text file beside each, metadata.jsonl, or a template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from customize.errors import DataError
from customize.safe_read import MAX_TABLE, present, read_text
from customize.training.settings import mentions

METADATA = "metadata.jsonl"
# Words after which a thing's name has an article: "a photo of a dog", but "a photo of my dog".
_BEFORE_ARTICLE = (
    *("of", "and", "or", "with", "without", "in", "on", "at", "by", "near", "beside", "behind"),
    *("under", "over", "from", "to", "for", "like", "as", "is", "between", "than", "versus"),
)


def read_captions(
    folder: Path,
    paths: Sequence[Path],
    pictures: Sequence[Path],
    *,
    template: str | None,
    trigger: str | None,
    forbidden: Sequence[str],
) -> dict[Path, str]:
    """Picture -> its caption, one line of text.

    Args:
        paths: those to caption.
        pictures: all in the folder, which metadata.jsonl may name.
        template, trigger, forbidden: see :func:`customize.training.data.read_folder`.

    Raises:
        DataError: a caption is missing, unreadable, lacks the trigger or has what is forbidden.
    """
    listed = _read_metadata(folder / METADATA, {path.name for path in pictures})
    beside = {entry.stem: entry for entry in folder.iterdir() if entry.suffix.lower() == ".txt"}
    everywhere = None if template is None else template.replace("{}", trigger or "")
    captions = {}
    for path in paths:
        text = _read_text(beside[path.stem]) if path.stem in beside else listed.get(path.name)
        text = everywhere if text is None else text
        captions[path] = "" if text is None else " ".join(text.split())
    empty = [path.name for path, text in captions.items() if not text]
    if empty:
        raise DataError(
            f"{count(empty)} no caption: {listing(empty)}",
            where=folder,
            fix=f"put a .txt file beside each, list them in {METADATA}, or give a caption template",
        )
    lacking = [p.name for p, text in captions.items() if trigger and not mentions(text, trigger)]
    if lacking:
        raise DataError(
            f"{count(lacking)} a caption without the trigger {trigger}: {listing(lacking)}",
            where=folder,
            fix=f"write {trigger} where the subject is named, as in 'a photo of {trigger}'",
        )
    for each in forbidden:
        having = [path.name for path, text in captions.items() if mentions(text, each)]
        if not having:
            continue
        raise DataError(
            f"{count(having)} a caption with the trigger {each}: {listing(having)}",
            where=folder,
            fix="name the class there; class pictures show it without the concept",
        )
    return captions


def class_caption(text: str, trigger: str, class_word: str) -> str:
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


def count(names: Sequence[str]) -> str:
    """How many pictures have something, in words."""
    return "1 picture has" if len(names) == 1 else f"{len(names)} pictures have"


def listing(names: Sequence[str]) -> str:
    """Names for a message."""
    return ", ".join(names)


def _read_metadata(path: Path, pictures: set[str]) -> dict[str, str]:
    """Captions by file name; none where there is no such file."""
    captions: dict[str, str] = {}
    if not present(path):
        return captions
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = text = None
        problem = None
        if not isinstance(name, str) or not isinstance(text, str):
            problem = 'is not {"file_name": "...", "text": "..."}'
        elif name in captions:
            problem = f"lists {name} again"
        elif name not in pictures:
            problem = f"names {name}, which is no picture in the folder"
        elif not _is_text(text):
            problem = f"gives {name} half a character, an escape from \\ud800 to \\udfff"
        if problem:
            raise DataError(f"line {number} {problem}", where=path, fix="correct the line")
        captions[name] = text
    return captions


def _is_text(text: str) -> bool:
    """Whether a string from JSON can be written; escapes there may be halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(path: Path) -> str:
    try:
        return read_text(path, MAX_TABLE)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(
            f"the captions cannot be read: {reason}", where=path, fix="save it as UTF-8 text"
        ) from None
