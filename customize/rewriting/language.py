"""Whether two texts are in one language."""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import Any

#: Texts with fewer letters are too short for a guess.
_MIN_LETTERS = 20
#: Probability from which a language counts as recognized.
_MIN_PROBABILITY = 0.9
#: The languages that are told apart; rarer ones would take probability from them.
_LANGUAGES = (
    *("ar", "bg", "ca", "cs", "da", "de", "el", "en", "es", "fi", "fr", "he", "hi", "hr", "hu"),
    *("id", "it", "ja", "ko", "nl", "no", "pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "vi"),
    "zh",
)


def same_language(first: str, second: str) -> bool:
    """Return whether no difference in script or language is certain.

    The scripts are compared by Unicode names; the languages only where both texts are long enough
    and py3langid (langid.py, Lui and Baldwin 2012) is certain of both.
    """
    scripts = [main_script(text) for text in (first, second)]
    if None not in scripts and scripts[0] != scripts[1]:
        return False
    languages = [_recognize(text) for text in (first, second)]
    return None in languages or languages[0] == languages[1]


def main_script(text: str) -> str | None:
    """Return the script of most letters, such as "LATIN", "CYRILLIC" or "CJK"; None for none."""
    counts: dict[str, int] = {}
    for char in text:
        if char.isalpha():
            name = unicodedata.name(char, "").split(" ")[0]
            # Japanese mixes them.
            name = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}.get(name, name)
            counts[name] = counts.get(name, 0) + 1
    return max(counts, key=counts.__getitem__) if counts else None


def _recognize(text: str) -> str | None:
    letters = re.sub(r"<[^<>\s]+>|[^\w\s]|\d", " ", text)
    if sum(char.isalpha() for char in letters) < _MIN_LETTERS:
        return None
    language, probability = _identifier().classify(" ".join(letters.split()))
    return str(language) if probability >= _MIN_PROBABILITY else None


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(_LANGUAGES))
    return identifier
