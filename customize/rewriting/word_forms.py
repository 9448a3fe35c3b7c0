"""Inflected forms of English words, by endings and a list of irregular plurals."""

from __future__ import annotations

import re

_IRREGULAR = {
    "women": "woman",
    "men": "man",
    "people": "person",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "mice": "mouse",
    "geese": "goose",
    "leaves": "leaf",
    "wolves": "wolf",
    "knives": "knife",
    "shelves": "shelf",
    "loaves": "loaf",
}
#: Plurals that equal their singular.
_UNCHANGED = frozenset({"sheep", "deer", "fish"})
#: Words in -s of one thing, which prompts often have.
_SINGULAR = frozenset({"lens", "canvas", "graphics", "always", "perhaps", "towards", "iris"})


def stem(word: str) -> str:
    """Return an English word without the ending of its plural."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for ending, length in (("ies", 3), ("es", 2), ("s", 1)):
        if word.endswith(ending) and len(word) > length + 2 and not word.endswith("ss"):
            return word[:-length] + ("y" if ending == "ies" else "")
    return word


def root(word: str) -> str:
    """Return what regular inflected forms of an English word share: "wears", "wearing" -> "wear".

    It need not be a word: "smile", "smiles" and "smiling" share "smil".
    """
    word = stem(word.removesuffix("'s"))
    for ending in ("ing", "ed"):
        base = word.removesuffix(ending)
        if base != word and len(base) >= 3 and re.search("[aeiouy]", base):
            is_doubled = len(base) > 3 and base[-1] == base[-2] and base[-1] not in "aeiouls"
            word = base[:-1] if is_doubled else base  # "sitting"
            break
    return word.removesuffix("e") if len(word) > 3 else word


def is_plural(word: str) -> bool:
    """Return whether an English word has the form of a plural."""
    if word in _IRREGULAR or word in _UNCHANGED:
        return True
    return (
        len(word) > 3
        and word.endswith("s")
        and not word.endswith(("ss", "us", "'s"))
        and word not in _SINGULAR
    )


def pattern_of_forms(word: str) -> str:
    """Return a regular expression of a word's singular and plural."""
    singular = stem(word)
    plurals = [plural for plural, single in _IRREGULAR.items() if single == singular]
    forms = [rf"{re.escape(singular)}(?:s|es)?", *map(re.escape, plurals)]
    return rf"(?:{'|'.join(forms)})"
