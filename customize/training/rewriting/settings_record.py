"""The record of the settings that an output folder was made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from customize.atomic import write_atomic
from customize.errors import SettingsError
from customize.safe_read import MAX_TEXT_BYTES, read_json

#: Name of the record in the folder.
RECORD = "settings.json"


def write_record(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the record.

    Args:
        folder: The output folder.
        settings: Name -> value, as JSON.
    """
    write_atomic(folder / RECORD, (json.dumps(settings, indent=1) + "\n").encode())


def check_record(folder: Path, settings: Mapping[str, Any], subject: str, fix: str) -> None:
    """Refuse to go on with what was made with other settings.

    Args:
        folder: The output folder.
        settings: Name -> value, as JSON, of those that must be equal.
        subject: What was made with them, such as "the checkpoints".
        fix: What the user can do.

    Raises:
        SettingsError: A setting differs, or the record is missing or damaged.
    """
    try:
        before = read_json(folder / RECORD, MAX_TEXT_BYTES)
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise SettingsError(
            f"the settings that {subject} were made with cannot be read",
            where=folder / RECORD,
            fix=fix,
        )
    differing = sorted(name for name in settings if before.get(name) != settings[name])
    if differing:
        raise SettingsError(
            f"{subject} were made with other settings: {', '.join(differing)}",
            where=folder,
            fix=fix,
        )
