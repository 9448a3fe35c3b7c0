"""Detection of training images that changed since a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

#: File name -> hash of image, caption and mask, in order; or one combined hash, as in published
#: concepts and checkpoints of earlier versions; None for no images.
ImageHashes = Mapping[str, str] | str | None

#: Key in a run's settings -> name in messages.
IMAGE_SETTINGS = {"pictures": "images", "class_pictures": "class images"}

_MAX_NAMES = 3


def combined_hash(pictures: Any) -> Any:
    """Combine the hashes of images to one; a combined hash is returned unchanged."""
    if not isinstance(pictures, Mapping):
        return pictures
    hashes = "".join(map(str, pictures.values()))
    return hashlib.sha256(hashes.encode()).hexdigest()[:16] if pictures else None


def describe_changes(before: Any, now: Any, kind: str) -> str:
    """Describe how images differ, or return an empty text.

    Args:
        before: :data:`ImageHashes` of the checkpoint.
        now: :data:`ImageHashes` of the run.
        kind: ``"images"`` or ``"class images"``.
    """
    if combined_hash(before) == combined_hash(now):
        return ""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return f"the {kind}, their captions or their masks have changed"
    changes = {
        "new": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
        "changed (the image, its caption or its mask)": [
            name for name in now if name in before and now[name] != before[name]
        ],
    }
    texts = [
        f"{_join_names(names)} {'is' if len(names) == 1 else 'are'} {change}"
        for change, names in changes.items()
        if names
    ]
    return f"the {kind} have changed: {', '.join(texts) or 'their order is different'}"


def _join_names(names: list[str]) -> str:
    more = len(names) - _MAX_NAMES
    short = (name if len(name) <= 80 else f"{name[:77]}..." for name in names[:_MAX_NAMES])
    shown = ", ".join(short)
    return f"{shown} and {more} more" if more > 0 else shown
