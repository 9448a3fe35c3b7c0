"""Which pictures of a run have changed since a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

#: File name -> hash of picture, caption and mask, in their order; or one hash of all, as what is
#: published and what earlier versions saved has it; None for no pictures.
ImageHashes = Mapping[str, str] | str | None

#: Among a run's settings: setting -> what it is called in messages.
IMAGE_SETTINGS = {"pictures": "pictures", "class_pictures": "class pictures"}

_MOST_SHOWN = 3


def combined_hash(pictures: Any) -> Any:
    """One hash of all; what is one already stays as it is."""
    if not isinstance(pictures, Mapping):
        return pictures
    hashes = "".join(map(str, pictures.values()))
    return hashlib.sha256(hashes.encode()).hexdigest()[:16] if pictures else None


def describe_changes(before: Any, now: Any, what: str) -> str:
    """How pictures differ, in words; empty where they do not.

    Args:
        before, now: :data:`ImageHashes`, from files.
        what: ``"pictures"`` or ``"class pictures"``.
    """
    if combined_hash(before) == combined_hash(now):
        return ""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return f"the {what}, their captions or their masks have changed"
    parts = {
        "new": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
        "changed (the picture, its caption or its mask)": [
            name for name in now if name in before and now[name] != before[name]
        ],
    }
    told = [f"{_listed(names)} {_be(names)} {how}" for how, names in parts.items() if names]
    return f"the {what} have changed: {', '.join(told) or 'their order is another'}"


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_SHOWN
    short = (name if len(name) <= 80 else f"{name[:77]}..." for name in names[:_MOST_SHOWN])
    shown = ", ".join(short)
    return f"{shown} and {more} more" if more > 0 else shown


def _be(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
