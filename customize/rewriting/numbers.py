"""The numbers of a text, and the counts of things among them."""

from __future__ import annotations

import re

from customize.concepts.library.library import TRIGGER_PATTERN
from customize.concepts.tokens.prompt_phrases import FUNCTION_WORDS
from customize.rewriting.word_forms import is_plural

_TRIGGER = re.compile(TRIGGER_PATTERN, re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.:/x]\d+|,\d+)*")

_UNITS_BELOW_TEN = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBER_WORDS = {
    word: str(value)
    for value, words in (
        *enumerate(("two|pair|couple", "three|trio", *_UNITS_BELOW_TEN[3:], "ten", "eleven"), 2),
        *enumerate(("twelve|dozen", "thirteen", "fourteen", "fifteen", "sixteen"), 12),
        *enumerate(("seventeen", "eighteen", "nineteen"), 17),
        *((10 * k, word) for k, word in enumerate((*_TENS, "hundred"), 2)),
        (1000, "thousand"),
    )
    for word in words.split("|")
}
#: "twenty-five"
_COMPOUND = re.compile(rf"\b({'|'.join(_TENS)})[ -]({'|'.join(_UNITS_BELOW_TEN)})\b", re.IGNORECASE)

#: A number that may count things: a word, or 2 to 99, with nothing that makes it another number.
_COUNT = re.compile(
    rf"(?<![\w.,:/<'-])(?P<number>{'|'.join(_NUMBER_WORDS)}|[2-9]|[1-9]\d)"
    r"(?P<noun>[a-z]{4,})?(?![\w.:/%°'\"’-])",
    re.IGNORECASE,
)
_MAX_COUNT = 99
_WORDS = re.compile(r"(?:\s+[^\W\d_]+(?:['’-][^\W\d_]+)*){1,4}")
#: Words before a number of things that were named before, such as "the two animals".
_REFERRING = frozenset(
    {
        *("the", "these", "those", "both", "all", "other"),
        *("his", "her", "its", "their", "my", "our"),
    }
)
#: Words after a number that measures.
_MEASURES = frozenset(
    {
        *("mm", "cm", "km", "fps", "px", "pixel", "pixels", "inch", "inches", "foot", "feet"),
        *("meters", "metres", "degrees", "percent", "bits", "stops", "frames", "dimensions"),
        *("seconds", "minutes", "hours", "days", "weeks", "months", "years", "times", "points"),
        *("colors", "colours", "tones", "shades", "megapixels"),
    }
)


def find_numbers(text: str) -> list[str]:
    """Return the numbers of a text as digits; one is mostly an article and left out."""
    text = _with_digits(text)
    words = [_NUMBER_WORDS[w] for w in re.findall(r"[a-z]+", text.lower()) if w in _NUMBER_WORDS]
    digits = [re.sub(r",(?=\d{3}\b)", "", found) for found in _NUMBER.findall(text)]
    return [*(found for found in digits if found != "1"), *words]


def find_counts(text: str) -> list[tuple[str, str]]:
    """Return the counts of things in a text: ("3", "three big cats").

    A count is a number word, or a whole number from 2 to 99, that stands up to four words before
    the plural of an English noun. Numbers of styles are not counts: those with letters, a unit or a
    fraction ("8k", "35 mm", "f/1.8", "16:9"), without a plural ("Unreal Engine 5"), years, and
    adjectives ("two-tone"). Neither is a number of what the text has named ("the two animals").
    """
    text, counts = _with_digits(text), []
    for match in _COUNT.finditer(text):
        number = match["number"].lower()
        before = re.search(r"(\w+)\s+$", text[: match.start()])
        run = _WORDS.match(text, match.end())
        words = [match["noun"]] if match["noun"] else (run[0] if run else "").split()
        words = [word.lower() for word in words]
        stop = next((k for k, word in enumerate(words) if word in FUNCTION_WORDS), len(words))
        plural = next((k for k, word in enumerate(words[:stop]) if is_plural(word)), None)
        value = _NUMBER_WORDS.get(number, number)
        if (
            plural is not None
            and words[0] not in _MEASURES
            and int(value) <= _MAX_COUNT
            and not (before and before[1].lower() in _REFERRING)
        ):
            counts.append((value, " ".join((number, *words[: plural + 1]))))
    return counts


def _with_digits(text: str) -> str:
    """Remove triggers, and write compound number words as digits."""

    def value(match: re.Match[str]) -> str:
        tens, unit = match[1].lower(), match[2].lower()
        return str(int(_NUMBER_WORDS[tens]) + 1 + _UNITS_BELOW_TEN.index(unit))

    return _COMPOUND.sub(value, _TRIGGER.sub(" ", text))
