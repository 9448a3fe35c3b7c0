"""Listing of a folder's images, caption files and ignored files.

Ignored files are reported by name, except hidden files and files of operating systems.
"""

from __future__ import annotations

import importlib.util
import logging
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image, features

from customize.errors import DataError
from customize.near_names import suggest_paths

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_SUFFIXES = (".txt", ".caption")

_SUPPORTED_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp")
_CONVERTIBLE_SUFFIXES: tuple[str, ...] = (
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
_CONVERTIBLE_SUFFIXES += (".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf")
_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"}
_MAX_NAMES = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFolder:
    """The files of a folder, each list sorted by name.

    Attributes:
        path: The folder.
        images: Image files.
        captions: Files with one caption, with the suffixes .txt and .caption.
        metadata: Files with the captions of many images.
        ignored: Ignored files with the reason: "b.heic", or "7.txt (no image of that name)".
    """

    path: Path
    images: list[Path]
    captions: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


@cache
def image_formats() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the file suffixes and Pillow's format names of readable images.

    HEIC needs the package pillow-heif, and AVIF a Pillow built with AVIF.
    """
    suffixes, formats = [*_SUPPORTED_SUFFIXES], ["JPEG", "PNG", "WEBP"]
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
    """Return the suffixes of readable images for messages: "jpg, jpeg, png"."""
    return ", ".join(suffix[1:] for suffix in image_formats()[0])


def scan_folder(folder: Path) -> ImageFolder:
    """List the files of a folder by kind, without subfolders.

    Raises:
        DataError: The folder is unreadable or has no images; or an image or caption file is a
            dangling link, or not a regular file.
    """
    try:
        entries = sorted(folder.iterdir())
        nested = [entry for entry in entries if entry.is_dir()]
    except OSError as error:
        raise DataError(
            f"the folder of images cannot be read: {error.strerror}",
            where=folder,
            fix=suggest_paths(folder, f"give a folder with {list_suffixes()} files"),
        ) from None
    suffixes = image_formats()[0]
    result = ImageFolder(folder, [])
    for entry in entries:
        suffix, hidden = entry.suffix.lower(), entry.name.startswith(".")
        if entry.name.lower() in _SYSTEM_FILES or entry.name.startswith("._"):
            continue
        if entry in nested:
            if not hidden:
                result.ignored.append(f"{entry.name} (subfolders are not searched)")
        elif hidden:
            if suffix in (*suffixes, *CAPTION_SUFFIXES):
                result.ignored.append(f"{entry.name} (hidden)")
        elif suffix in suffixes:
            result.images.append(_check_regular(entry, "image"))
        elif suffix in CAPTION_SUFFIXES:
            result.captions.append(_check_regular(entry, "caption"))
        elif entry.name in METADATA_FILES:
            result.metadata.append(_check_regular(entry, "file of captions"))
        else:
            result.ignored.append(entry.name + _explain_ignored(suffix))
    if not result.images:
        others = [*(path.name for path in result.captions), *result.ignored]
        raise DataError(
            "there are no images in the folder"
            + (f", only {join_names(others)}" if others else ""),
            where=folder,
            fix=f"put {list_suffixes()} files directly in it",
        )
    return result


def warn_ignored(folder: Path, ignored: Sequence[str]) -> None:
    """Log a warning with the names of ignored files."""
    if ignored:
        logger.warning("Left out in %s: %s", folder, join_names(ignored))


def match_by_name(
    files: Iterable[Path], images: Sequence[Path]
) -> tuple[dict[Path, list[Path]], list[Path]]:
    """Match caption or mask files to images by name.

    "0.txt" and "0.png.txt" match "0.png". A file without an exact match is matched ignoring case
    and Unicode form.

    Args:
        files: The files to match.
        images: The images.

    Returns:
        Image -> its files; and the files that match no image, or images with different names.
    """
    exact, folded = _index_by_name(images, str), _index_by_name(images, _fold)
    matched: dict[Path, list[Path]] = {}
    unmatched = []
    for file in files:
        matches = exact.get(file.stem) or folded.get(_fold(file.stem), [])
        if not matches or len({image.stem for image in matches}) > 1:
            unmatched.append(file)
        for image in matches if file not in unmatched[-1:] else ():
            matched.setdefault(image, []).append(file)
    return matched, unmatched


def count_images(names: Sequence[str]) -> str:
    """Return "1 image has" or "N images have"."""
    return "1 image has" if len(names) == 1 else f"{len(names)} images have"


def join_names(names: Sequence[str]) -> str:
    """Join up to ten names for a message."""
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def has_exact_name(file: Path, image: Path) -> bool:
    """Whether a file has exactly an image's name, with or without the image's suffix."""
    return file.stem in (image.stem, image.name)


def _index_by_name(images: Sequence[Path], form: Callable[[str], str]) -> dict[str, list[Path]]:
    """Map each stem to its images, and each full name to its image; stems take precedence."""
    stems: dict[str, list[Path]] = {}
    names: dict[str, list[Path]] = {}
    for image in images:
        stems.setdefault(form(image.stem), []).append(image)
        names.setdefault(form(image.name), []).append(image)
    return names | stems


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _check_regular(path: Path, kind: str) -> Path:
    if path.is_file():
        return path
    if path.is_symlink() and not path.exists():
        problem, fix = (
            f"links to {path.readlink()}, which does not exist",
            "mend or remove the link",
        )
    else:
        problem, fix = "is not a regular file", "remove it"
    raise DataError(f"the {kind} {path.name} {problem}", where=path.parent, fix=fix)


def _explain_ignored(suffix: str) -> str:
    if suffix in (".heic", ".heif"):
        return " (needs pip install pillow-heif)"
    if suffix == ".avif":
        return " (needs a Pillow with AVIF, 11.3 or later)"
    if suffix in _CONVERTIBLE_SUFFIXES:
        return " (save it as PNG)"
    return " (no suffix)" if not suffix else ""


def write_images(folder: Path, images: Iterable[Image.Image], captions: Iterable[str]) -> None:
    """Write images and their captions as `0.png`, `0.txt` and so on, for training.

    Args:
        folder: Is created if it is missing.
        images: The images.
        captions: One for each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index, (image, text) in enumerate(zip(images, captions, strict=True)):
        image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(text + "\n")
