"""The folder of what the project's commands downloaded: language models and artwork."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return CUSTOMIZE_CACHE, or ``customize`` in the user's cache folder."""
    chosen = os.environ.get("CUSTOMIZE_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "customize"
