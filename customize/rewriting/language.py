"""Whether two texts are in one language."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

#: Letters from which a language counts as recognized without a function word.
_MIN_LETTERS = 20
#: Probability from which a language counts as recognized: of a text of so many letters, and of a
#: text with a function word of it.
_MIN_PROBABILITY, _MIN_PROBABILITY_SHORT = 0.9, 0.4
#: A language with a smaller share of another one's probability is implausible.
_PLAUSIBLE_SHARE = 0.1
#: The languages that are told apart; rarer ones would take probability from them.
_LANGUAGES = (
    *("ar", "bg", "ca", "cs", "da", "de", "el", "en", "es", "fi", "fr", "he", "hi", "hr", "hu"),
    *("id", "it", "ja", "ko", "nl", "no", "pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "vi"),
    "zh",
)


#: Language -> its most frequent function words, without those that are English words or letters.
_FUNCTION_WORDS = {
    language: frozenset(words.split())
    for language, words in {
        "ca": "un una els amb del dels per sobre sota i el la les",
        "cs": "na se ve ze pod nad pro",
        "da": "en et og med på ved af til uden",
        "de": "ein eine einen einem einer der das dem den des und mit im am auf bei vor ohne von",
        "en": "a an the of on in at with and by for from to near under over is are wearing",
        "es": "un una el la los las del con en sobre bajo sin y de",
        "fi": "ja kanssa ilman joka",
        "fr": "un une le la les du des et avec sur dans au aux sous sans de en",
        "hr": "na iz sa pod nad bez",
        "hu": "egy az és alatt",
        "id": "di dengan seekor sebuah seorang yang dan pada",
        "it": "un una uno il lo gli la di con nel nella sul sulla del della al alla e",
        "nl": "een het met op van voor bij onder zonder naast aan de en",
        "no": "en ei et og med på ved av til uten",
        "pl": "na ze przy pod nad bez przed",
        "pt": "um uma com em na da dos das sob sem de",
        "ro": "un pe cu la și în din sub",
        "sv": "en ett och med på vid av till utan",
        "tr": "bir ve ile altında",
        "vi": "một con và trên với trong",
    }.items()
}


def same_language(first: str, second: str) -> bool:
    """Return whether no difference in script or language is certain.

    The scripts are compared by Unicode names. The languages differ where py3langid (langid.py, Lui
    and Baldwin 2012) recognizes one in each text, and neither text is plausible in the other's. A
    language is recognized in 20 letters, or by a function word that the other text lacks: names
    such as "La Traviata" stay in every language. Texts that share all words of one are alike.
    """
    scripts = [main_script(text) for text in (first, second)]
    if None not in scripts and scripts[0] != scripts[1]:
        return False
    words = [frozenset(re.findall(r"[^\W\d_]+", text.lower())) for text in (first, second)]
    own = [words[0] - words[1], words[1] - words[0]]
    if not all(own):
        return True
    ranks = [_rank(text) for text in (first, second)]
    one, two = _recognize(first, ranks[0], own[0]), _recognize(second, ranks[1], own[1])
    if one is None or two is None:
        return True
    shares = ranks[0][two] / ranks[0][one], ranks[1][one] / ranks[1][two]
    return max(shares) >= _PLAUSIBLE_SHARE


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


def _rank(text: str) -> dict[str, float]:
    """Return language -> probability."""
    ranked = _identifier().rank(" ".join(_letters(text).split()))
    return {str(language): float(probability) for language, probability in ranked}


def _recognize(text: str, rank: Mapping[str, float], words: frozenset[str]) -> str | None:
    """Return the language of a text; None if it is uncertain.

    Args:
        text: The text.
        rank: Language -> its probability.
        words: The words of the text that the other text lacks.
    """
    language = max(rank, key=rank.__getitem__)
    has_function_word = not words.isdisjoint(_FUNCTION_WORDS.get(language, ()))
    is_long = sum(char.isalpha() for char in _letters(text)) >= _MIN_LETTERS
    if is_long and rank[language] >= _MIN_PROBABILITY:
        return language
    return language if has_function_word and rank[language] >= _MIN_PROBABILITY_SHORT else None


def _letters(text: str) -> str:
    """Return a text without triggers, punctuation and digits."""
    return re.sub(r"<[^<>\s]+>|[^\w\s]|\d", " ", text)


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(_LANGUAGES))
    return identifier
