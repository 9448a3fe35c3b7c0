"""Where a noun that replaces a trigger needs an article."""

from __future__ import annotations

import re

# Behind these a noun phrase begins.
_BEFORE_PHRASES = re.compile(
    r"""(?:^|[^\w\s]
    |\b(?:about|above|across|after|against|along|among|and|are|around|as|at|before|behind|below
    |beneath|besides?|between|beyond|by|down|during|for|from|has|in|inside|into|is|like|meets|near
    |next|of|off|on|onto|or|out|outside|over|past|than|through|to|towards?|under|upon|versus|via|vs
    |was|were|with|within|without)
    )\s*$""",
    re.IGNORECASE | re.VERBOSE,
)
# A verb, as in "hugging", but no adjective, as in "a smiling".
_VERB = re.compile(
    r"(?<!\ba )(?<!\ban )(?<!\bthe )(?<!\bmy )(?<!\byour )(?<!\btwo )\b\w+ing\s+$", re.IGNORECASE
)


def begins_phrase(text: str) -> bool:
    """Whether a noun phrase begins behind a text, so that its noun needs an article.

    Behind a determiner, an adjective or a number one stands already, or none fits: "a happy cat",
    "two cats".
    """
    return bool(_BEFORE_PHRASES.search(text) or _VERB.search(text))
