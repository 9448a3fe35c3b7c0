"""Artwork of stickers: a folder of pictures of the same subjects by several hands.

``metadata.json`` lists hands and subjects; ``HAND/ID.png`` are square pictures with transparency.
`make stickers` installs emoji sets in this format; a folder of one's own drawings works as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from customize.cache_folder import cache_folder
from customize.errors import DataError
from customize.safe_read import read_bytes, read_json

METADATA = "metadata.json"
MAX_METADATA_BYTES, MAX_PICTURE_BYTES = 2**24, 2**22

# Fainter shadows do not count as part of a picture.
_VISIBLE_ALPHA = 24
_INSTALL = "run `make stickers`, or pass the folder of the artwork"


@dataclass(frozen=True)
class Hand:
    """An artist's set of pictures.

    Attributes:
        name: Its folder, and its word in captions.
        title: Name of the set.
        author: Who is credited.
        license: SPDX identifier.
        url: Where the set is published.
        held_out: Whether no base is trained on it, so that it is a new style.
    """

    name: str
    title: str
    author: str
    license: str
    url: str
    held_out: bool = False


@dataclass(frozen=True)
class Subject:
    """What a picture shows.

    Attributes:
        id: The name of its files.
        name: Lower-case words, such as "tiger face".
        synonyms: Other names.
        keywords: Single words that go with it.
        group: Such as "animals-nature".
        subgroup: Such as "animal-mammal".
        version: Of the emoji standard that introduced it; common subjects have low ones.
    """

    id: str
    name: str
    synonyms: tuple[str, ...]
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    version: float


@dataclass(frozen=True, eq=False)
class Artwork:
    """Hands and subjects of a folder; each hand has a picture of each subject."""

    folder: Path
    hands: tuple[Hand, ...]
    subjects: tuple[Subject, ...]
    _pictures: dict[tuple[str, str], Image.Image] = field(default_factory=dict, repr=False)

    def picture(self, subject: str, hand: str) -> Image.Image:
        """The picture of a subject by a hand, RGBA, cropped to what is visible.

        Args:
            subject: Its id.
            hand: Its name.

        Raises:
            DataError: The file is missing, unreadable or empty.
        """
        if (subject, hand) not in self._pictures:
            self._pictures[subject, hand] = _read_picture(self.folder / hand / f"{subject}.png")
        return self._pictures[subject, hand]


def artwork_folder() -> Path:
    """The folder in which `make stickers` installs artwork."""
    return cache_folder() / "stickers"


def read_artwork(folder: Path | None = None) -> Artwork:
    """Read the metadata of artwork; pictures are read when they are drawn.

    Args:
        folder: None: that of `make stickers`.

    Raises:
        DataError: The folder has no artwork, or its metadata is malformed.
    """
    folder = artwork_folder() if folder is None else folder
    path = folder / METADATA
    try:
        content = read_json(path, MAX_METADATA_BYTES)
    except FileNotFoundError as error:
        raise DataError(
            "the artwork of the stickers is missing", where=path, fix=_INSTALL
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"the metadata is unreadable: {error}", where=path, fix=_INSTALL) from error
    try:
        hands = tuple(_hand(entry) for entry in content["hands"])
        subjects = tuple(_subject(entry) for entry in content["subjects"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"the metadata is malformed: {reason}", where=path, fix=_INSTALL) from error
    for names, kind in (([h.name for h in hands], "hand"), ([s.id for s in subjects], "subject")):
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated or not names:
            problem = f"the {kind} {repeated[0]} is listed twice" if repeated else f"no {kind}"
            raise DataError(f"the metadata is malformed: {problem}", where=path, fix=_INSTALL)
    return Artwork(folder, hands, subjects)


def attribution(artwork: Artwork) -> str:
    """Markdown that credits the hands that a base is trained on."""
    lines = ["# Attribution", "", "Trained on pictures composed of artwork by others:", ""]
    for hand in artwork.hands:
        if not hand.held_out:
            lines.append(f"- {hand.title} by {hand.author} ({hand.license}): {hand.url}")
    lines += ["", "The pictures were scaled and composed on coloured grounds.", ""]
    return "\n".join(lines)


def _text(value: Any, *, file_name: bool = False) -> str:
    if not isinstance(value, str) or (file_name and Path(value).name != value):
        raise ValueError(f"{value!r} is not a {'file name' if file_name else 'text'}")
    return value


def _hand(entry: dict[str, Any]) -> Hand:
    texts = {key: _text(entry[key]) for key in ("title", "author", "license", "url")}
    return Hand(
        name=_text(entry["name"], file_name=True),
        **texts,
        held_out=bool(entry.get("held_out", False)),
    )


def _subject(entry: dict[str, Any]) -> Subject:
    return Subject(
        id=_text(entry["id"], file_name=True),
        name=_text(entry["name"]),
        synonyms=tuple(_text(each) for each in entry["synonyms"]),
        keywords=tuple(_text(each) for each in entry["keywords"]),
        group=_text(entry["group"]),
        subgroup=_text(entry["subgroup"]),
        version=float(entry["version"]),
    )


def _read_picture(path: Path) -> Image.Image:
    try:
        content = BytesIO(read_bytes(path, MAX_PICTURE_BYTES))
        picture = Image.open(content, formats=("PNG",)).convert("RGBA")
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"the picture is unreadable: {error}", where=path, fix=_INSTALL) from error
    visible = np.asarray(picture.getchannel("A")) >= _VISIBLE_ALPHA
    if not visible.any():
        raise DataError("the picture is empty", where=path, fix=_INSTALL)
    rows, columns = (np.flatnonzero(visible.any(axis=axis)) for axis in (1, 0))
    return picture.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
