"""Groups of training images: a folder of folders, or a metadata file.

In a folder of folders, each folder is a group, with captions as in concept training: a .txt file
beside an image, or a metadata file in the folder. A metadata file has a line for each image::

    {"group": "rex", "image": "rex/1.png", "caption": ["a dog on a beach", "a dog"]}
    {"group": "7", "image": "7/a.png", "caption": "a cup", "attribute": "colour"}
    {"group": "8", "image": "8/t.png", "caption": "a car",
     "references": [{"image": "7/a.png", "attribute": "colour"}, {"image": "9/b.png"}]}

Paths are relative to the file. ``attribute`` is what the other images of a group take from this
one. ``references`` are the images of a target instead of the other images of its group, each with
the attribute that the target takes from it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from customize.errors import DataError
from customize.image_folder import (
    image_formats,
    join_names,
    list_suffixes,
    scan_folder,
    warn_ignored,
)
from customize.near_names import suggest_paths
from customize.references.encoder_inputs import check_aspect
from customize.references.images import MAX_ATTRIBUTE_LENGTH, is_attribute
from customize.safe_read import MAX_TABLE_BYTES, read_bytes
from customize.text import quote
from customize.training.data import dataset
from customize.training.data.captions import read_captions

_KEYS = {"group", "image", "caption", "attribute", "references"}


@dataclass(frozen=True, eq=False)
class GroupImage:
    """One image of a group.

    Attributes:
        sample: The image, with the first of its captions.
        captions: Its captions, of which one is drawn each time.
        group: Name of its group.
        attribute: What the other images of the group take from it; "": everything.
        references: Path and attribute of each reference; None: the other images of the group.
    """

    sample: dataset.TrainingImage
    captions: tuple[str, ...]
    group: str
    attribute: str = ""
    references: tuple[tuple[Path, str], ...] | None = None


@dataclass(frozen=True, eq=False)
class ImageGroups:
    """All images of a data set.

    Attributes:
        images: In the order of groups and files.
        references: For each image the number and attribute of all its possible references.
    """

    images: list[GroupImage]
    references: list[list[tuple[int, str]]]

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return len({image.group for image in self.images})


def read_image_groups(path: Path, caption: str | None) -> ImageGroups:
    """Read groups from a folder of folders or a metadata file, and check all images.

    Args:
        path: The folder, or a .jsonl file.
        caption: Caption of images without one; None: every image needs one.

    Raises:
        DataError: The folder or file is unreadable or has no groups, a line is malformed, or an
            image or caption is invalid.
    """
    images = _read_metadata(path, caption) if os.path.isfile(path) else _read_folders(path, caption)
    positions = {image.sample.path: number for number, image in enumerate(images)}
    groups: dict[str, list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(image.group, []).append(number)
    references = []
    for number, image in enumerate(images):
        if image.references is None:
            others = [other for other in groups[image.group] if other != number]
            references.append([(other, images[other].attribute) for other in others])
        else:
            references.append([(positions[file], name) for file, name in image.references])
    return ImageGroups(images, references)


def _read_folders(path: Path, caption: str | None) -> list[GroupImage]:
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise DataError(
            f"the folder of groups cannot be read: {error.strerror}",
            where=path,
            fix=suggest_paths(path, "give a folder with a folder of images for each group"),
        ) from None
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not folders:
        raise DataError(
            "there are no groups in the folder",
            where=path,
            fix=f"put a folder of {list_suffixes()} files for each group into it",
        )
    suffixes = image_formats()[0]
    loose = [entry.name for entry in entries if entry.suffix.lower() in suffixes]
    images, unused = [], []
    for folder in folders:
        files = scan_folder(folder)
        captions = read_captions(files, files.images, template=caption, trigger=None, forbidden=())
        unused += [f"{folder.name}/{name}" for name in (*captions.unused, *files.ignored)]
        for file in files.images:
            text = captions.texts[file]
            images.append(GroupImage(_read_sample(file, text), (text,), folder.name))
    warn_ignored(path, [*(f"{name} (in no group's folder)" for name in loose), *unused])
    return images


def _read_metadata(path: Path, caption: str | None) -> list[GroupImage]:
    try:
        text = read_bytes(path, MAX_TABLE_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(
            f"the metadata cannot be read: {reason}", where=path, fix="save it as UTF-8 text"
        ) from None
    images: dict[Path, GroupImage] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            image = _parse_row(json.loads(line), path.parent, caption)
            if image.sample.path in images:
                raise ValueError("names an image again")
        except (ValueError, RecursionError) as error:
            problem = "is not a JSON object" if _is_json_error(error) else str(error)
            raise DataError(
                f"line {number} {problem}", where=path, fix="correct the line"
            ) from None
        images[image.sample.path] = image
    if not images:
        raise DataError("the metadata has no lines", where=path, fix="list the images in it")
    for image in images.values():
        unknown = [file.name for file, _ in image.references or () if file not in images]
        if unknown:
            raise DataError(
                f"references of {image.sample.path.name} are not listed: {join_names(unknown)}",
                where=path,
                fix="give each a line of its own",
            )
    return list(images.values())


def _is_json_error(error: Exception) -> bool:
    return isinstance(error, json.JSONDecodeError | RecursionError)


def _parse_row(row: Any, folder: Path, caption: str | None) -> GroupImage:
    """Convert a line of a metadata file, and read its image.

    Raises:
        ValueError: The line is malformed; the message follows "line 3".
        DataError: The image is unreadable.
    """
    if not isinstance(row, dict):
        raise ValueError('is not {"group": ..., "image": ..., "caption": ...}')
    unknown = sorted(map(str, row.keys() - _KEYS))
    if unknown:
        raise ValueError(f"has unknown keys: {', '.join(map(quote, unknown))}")
    group = row.get("group")
    if isinstance(group, int) and not isinstance(group, bool):
        group = str(group)
    if not isinstance(group, str) or not group.strip():
        raise ValueError("names no group")
    file = _resolve(folder, row.get("image"))
    captions = _parse_captions(row.get("caption"), caption, file.name)
    references = row.get("references")
    if references is not None:
        if not isinstance(references, list) or not references:
            raise ValueError("has references that are not a list of images")
        references = tuple(_parse_reference(item, folder) for item in references)
        if file in [other for other, _ in references]:
            raise ValueError("names the image as its own reference")
    sample = _read_sample(file, captions[0])
    attribute = _parse_attribute(row.get("attribute"))
    return GroupImage(sample, captions, group, attribute, references)


def _parse_reference(item: Any, folder: Path) -> tuple[Path, str]:
    if not isinstance(item, dict) or not {"image"} <= item.keys() <= {"image", "attribute"}:
        raise ValueError('has a reference that is not {"image": ..., "attribute": ...}')
    return _resolve(folder, item["image"]), _parse_attribute(item.get("attribute"))


def _parse_captions(value: Any, default: str | None, name: str) -> tuple[str, ...]:
    if value is None and default is None:
        raise ValueError(f"has no caption for {name}")
    value = default if value is None else value
    texts: Any = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError("has a caption that is neither a text nor a list of texts")
    return tuple(" ".join(text.split()) for text in texts)


def _parse_attribute(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str) and not value.strip():
        return ""
    if not isinstance(value, str) or not is_attribute(value):
        raise ValueError(
            f"has an attribute that is not a text of at most {MAX_ATTRIBUTE_LENGTH} characters "
            "without special tokens"
        )
    return " ".join(value.split())


def _resolve(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError("names no image")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"names {quote(name)}, which is not in the folder of the file")
    return folder / path


def _read_sample(file: Path, caption: str) -> dataset.TrainingImage:
    image = dataset.ImageAndMask(dataset.read_image(file), None)
    check_aspect(image.image.size, file)
    digest = dataset.content_hash(image, caption)
    return dataset.TrainingImage(file, image.image.size, caption, None, digest=digest)


def targets_with_references(groups: ImageGroups, where: object) -> list[int]:
    """Return the numbers of the images that have references besides themselves.

    Raises:
        DataError: No image has any.
    """
    targets = [number for number, others in enumerate(groups.references) if others]
    if not targets:
        raise DataError(
            "every group has one image, so that no target has another as reference",
            where=where,
            fix="put at least two images of the same subject into a group, or train the stage "
            "single (--stage single)",
        )
    return targets


def content_digests(images: Sequence[GroupImage]) -> dict[str, str]:
    """Return "group/image" -> hash of the image, its captions and references.

    Further images of the same name in other folders have a number: "group/image (2)".
    """
    pixels = {image.sample.path: image.sample.digest for image in images}
    counts: Counter[str] = Counter()
    digests = {}
    for image in images:
        name = f"{image.group}/{image.sample.path.name}"
        counts[name] += 1
        name += f" ({counts[name]})" if counts[name] > 1 else ""
        references = image.references and [(pixels[file], text) for file, text in image.references]
        content = (image.sample.digest, image.captions, image.attribute, references)
        digests[name] = hashlib.sha256(repr(content).encode()).hexdigest()
    return digests
