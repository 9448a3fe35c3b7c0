"""The characters that a prompt may have."""

from __future__ import annotations

import unicodedata

#: Controls that separate words.
_SPACES = "\t\n\r"


def find_control_character(text: str) -> str | None:
    """Return the first control character of a text; None if it has none.

    A terminal's escape sequences begin with one, and their digits would count as numbers of the
    prompt. Lone surrogates, which stand for bytes that are not UTF-8, count too. Spaces, tabs, line
    ends, and the invisible joiners and direction marks of scripts do not.
    """
    return next(
        (c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in _SPACES), None
    )
