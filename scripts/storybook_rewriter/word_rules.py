"""The cheap rival of a language model: a speller and a list of synonyms.

Each word that is not known becomes the known one that is spelt most alike, and each synonym of the
list the word of the base's captions. The held-out words are not in the list, as no list is whole.
"""

from __future__ import annotations

import difflib
import re

import numpy as np

from customize.storybook.user_prompts import HELD_OUT_WORDS, SYNONYMS, write_user_prompt

_GRAMMAR = {
    *SYNONYMS,
    *("a", "an", "and", "at", "beach", "in", "inside", "is", "isn't", "it", "no", "not", "of"),
    *("on", "photo", "picture", "that", "the", "wearing", "with", "without"),
}
_TO_WORD = {
    synonym: word
    for word, synonyms in SYNONYMS.items()
    for synonym in synonyms
    if synonym not in HELD_OUT_WORDS
}
#: Words that are spelt right, which a speller with an English dictionary leaves.
_RIGHT = {
    word
    for number in range(100)
    for word in re.findall(
        r"[a-z']{3,}", write_user_prompt(np.random.default_rng(number), "long-winded").text.lower()
    )
} | HELD_OUT_WORDS
_KNOWN = sorted(_GRAMMAR | {part for synonym in _TO_WORD for part in synonym.split()})
#: Least similarity of spellings (difflib's ratio) of a correction.
_ALIKE = 0.75


def apply_word_rules(prompt: str) -> str:
    """Correct spellings, then replace synonyms, the longest first."""
    text = re.sub(r"(?<![\w<])[A-Za-z']{3,}(?![\w>])", lambda match: _spell(match[0]), prompt)
    for synonym in sorted(_TO_WORD, key=len, reverse=True):
        text = re.sub(rf"(?<![\w<]){synonym}(?![\w>])", _TO_WORD[synonym], text)
    return re.sub(r"\b(a|an) (?=[a-z])", _fix_article, text)


def _spell(word: str) -> str:
    if word.lower() in _KNOWN or word.lower() in _RIGHT:
        return word
    near = difflib.get_close_matches(word.lower(), _KNOWN, n=1, cutoff=_ALIKE)
    return near[0] if near else word


def _fix_article(match: re.Match[str]) -> str:
    following = match.string[match.end()]
    return "an " if following in "aeiou" else "a "
