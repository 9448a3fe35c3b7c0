"""What lies in a folder of pictures: pictures, files with captions, and what is left out, by name.

Nothing is left out silently but hidden files and what operating systems write by themselves.
"""

from __future__ import annotations

import importlib.util
import logging
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import features

from customize.errors import DataError
from customize.near_names import suggest_paths

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_SUFFIXES = (".txt", ".caption")

_ALWAYS = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp")
_OTHERS: tuple[str, ...] = (
    ".gif",
    ".bmp",
    ".heic",
    ".heif",
    ".avif",
    ".tif",
    ".tiff",
    ".jxl",
    ".jp2",
    ".svg",
)
_OTHERS += (".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf")
_SYSTEM = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"}
_MOST_NAMES = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFolder:
    """The files of a folder, each list sorted by name.

    Attributes:
        path: the folder.
        images: picture files.
        captions: files with one caption, of the suffixes .txt and .caption.
        metadata: files with a caption for each of many pictures.
        ignored: what is not read, in words: "b.heic", or "7.txt (no picture of that name)".
    """

    path: Path
    images: list[Path]
    captions: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


@cache
def image_formats() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(file suffixes, Pillow's names of the formats) of pictures that can be read here.

    HEIC needs the package pillow-heif, and AVIF a Pillow that was built with it.
    """
    suffixes, formats = [*_ALWAYS], ["JPEG", "PNG", "WEBP"]
    if importlib.util.find_spec("pillow_heif") is not None:
        from pillow_heif import register_heif_opener

        register_heif_opener()
        suffixes += [".heic", ".heif"]
        formats.append("HEIF")
    if features.check("avif"):
        suffixes.append(".avif")
        formats.append("AVIF")
    return tuple(suffixes), tuple(formats)


def list_suffixes() -> str:
    """The suffixes of readable pictures, for messages: "jpg, jpeg, png"."""
    return ", ".join(suffix[1:] for suffix in image_formats()[0])


def scan_folder(folder: Path) -> ImageFolder:
    """Sort the files of a folder by what they are. Subfolders are not searched.

    Raises:
        DataError: it cannot be read or has no pictures; or a picture or caption file is a link to
            nothing, or no regular file.
    """
    try:
        entries = sorted(folder.iterdir())
        nested = [entry for entry in entries if entry.is_dir()]
    except OSError as error:
        raise DataError(
            f"the folder of pictures cannot be read: {error.strerror}",
            where=folder,
            fix=suggest_paths(folder, f"give a folder with {list_suffixes()} files"),
        ) from None
    suffixes = image_formats()[0]
    found = ImageFolder(folder, [])
    for entry in entries:
        suffix, hidden = entry.suffix.lower(), entry.name.startswith(".")
        if entry.name.lower() in _SYSTEM or entry.name.startswith("._"):
            continue
        if entry in nested:
            if not hidden:
                found.ignored.append(f"{entry.name} (subfolders are not searched)")
        elif hidden:
            if suffix in (*suffixes, *CAPTION_SUFFIXES):
                found.ignored.append(f"{entry.name} (hidden)")
        elif suffix in suffixes:
            found.images.append(_regular(entry, "picture"))
        elif suffix in CAPTION_SUFFIXES:
            found.captions.append(_regular(entry, "caption"))
        elif entry.name in METADATA_FILES:
            found.metadata.append(_regular(entry, "file of captions"))
        else:
            found.ignored.append(entry.name + _why_not(suffix))
    if not found.images:
        others = [*(path.name for path in found.captions), *found.ignored]
        raise DataError(
            "there are no pictures in the folder"
            + (f", only {join_names(others)}" if others else ""),
            where=folder,
            fix=f"put {list_suffixes()} files directly in it",
        )
    return found


def warn_ignored(folder: Path, ignored: Sequence[str]) -> None:
    """Name what is not read."""
    if ignored:
        logger.warning("Left out in %s: %s", folder, join_names(ignored))


def match_by_name(
    files: Iterable[Path], images: Sequence[Path]
) -> tuple[dict[Path, list[Path]], list[Path]]:
    """Which picture each file belongs to by its name.

    "0.txt" and "0.png.txt" belong to "0.png". A file that no picture has exactly the name of
    belongs to the picture whose name differs only in case or in its Unicode form, if there is one.

    Returns:
        Picture -> its files; and the files of no picture, or of several with different names.
    """
    exact, folded = _index(images, str), _index(images, _folded)
    found: dict[Path, list[Path]] = {}
    unmatched = []
    for file in files:
        matches = exact.get(file.stem) or folded.get(_folded(file.stem), [])
        if not matches or len({image.stem for image in matches}) > 1:
            unmatched.append(file)
        for image in matches if file not in unmatched[-1:] else ():
            found.setdefault(image, []).append(file)
    return found, unmatched


def count_images(names: Sequence[str]) -> str:
    """How many pictures have something, in words."""
    return "1 picture has" if len(names) == 1 else f"{len(names)} pictures have"


def join_names(names: Sequence[str]) -> str:
    """Names for a message, the first ten of them."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def has_exact_name(file: Path, image: Path) -> bool:
    """Whether a file has a picture's name in the very same letters."""
    return file.stem in (image.stem, image.name)


def _index(images: Sequence[Path], form: Callable[[str], str]) -> dict[str, list[Path]]:
    """Name -> the pictures of that stem, or else the picture of that whole name."""
    stems: dict[str, list[Path]] = {}
    names: dict[str, list[Path]] = {}
    for image in images:
        stems.setdefault(form(image.stem), []).append(image)
        names.setdefault(form(image.name), []).append(image)
    return names | stems


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _regular(path: Path, kind: str) -> Path:
    if path.is_file():
        return path
    if path.is_symlink() and not path.exists():
        what, fix = f"links to {path.readlink()}, which does not exist", "mend or remove the link"
    else:
        what, fix = "is not a regular file", "remove it"
    raise DataError(f"the {kind} {path.name} {what}", where=path.parent, fix=fix)


def _why_not(suffix: str) -> str:
    if suffix in (".heic", ".heif"):
        return " (needs pip install pillow-heif)"
    if suffix == ".avif":
        return " (needs a Pillow with AVIF, 11.3 or later)"
    if suffix in _OTHERS:
        return " (save it as PNG)"
    return " (no suffix)" if not suffix else ""
