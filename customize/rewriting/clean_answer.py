"""The prompt in what a language model answers: without introductions, markup and labels."""

from __future__ import annotations

import json
import re
import unicodedata

#: How an answer begins that declines to write a prompt.
_REFUSALS = re.compile(
    r"(?:(?:i'?m|i am) (?:very |so |really )?(?:sorry|unable|afraid|not able)|sorry\b|"
    r"i (?:can'?t|cannot|can not|won'?t|will not|do not|don'?t) |i must decline|"
    r"i apologi[sz]e|(?:as|being) an? (?:ai|language model|assistant)|unfortunately,? i )",
    re.IGNORECASE,
)

#: A sentence before the prompt, such as "Sure! Here is a better prompt:".
_INTRODUCTION = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|ok|absolutely|great)(?: thing)?[!,.:]\s*)?"
    r"(?:(?:here(?:'s| is| are)|this is|below is|i(?:'ve| have) )[^\n:]{0,120}:\s*)?",
    re.IGNORECASE,
)

#: A label before the prompt, such as "**New prompt:**".
_LABEL = re.compile(
    r"^(?:(?:the )?(?:new|better|improved|rewritten|refined|revised|final|enhanced|updated|"
    r"corrected)?[ _-]?(?:prompt|answer|output|caption|description)|assistant|response)"
    r"(?: \d+)?\s*(?:[:=]\s*|$)",
    re.IGNORECASE,
)

_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"^\s*```[\w-]*\s*$", re.MULTILINE)
_LIST_MARK = re.compile(r"^(?:[-*•#>]+|\d{1,2}[.)])\s+")
_EMPHASIS = re.compile(r"(\*\*|__|`+)(?=\S)(.+?)(?<=\S)\1")
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“", "「": "」", "'": "'", "‘": "’"}
#: Fields that hold the prompt, where the answer is JSON.
_FIELDS = ("prompt", "new_prompt", "rewritten_prompt", "caption", "text")


def is_refusal(answer: str) -> bool:
    """Return whether an answer declines, such as "I'm sorry, but I cannot ..."."""
    return bool(_REFUSALS.match(_without_thinking(answer).lstrip(" \t\n\"'“*")))


def clean_answer(answer: str) -> str:
    """Return the prompt in an answer, on one line; empty if there is none.

    Removed are reasoning in tags, introductions, labels, code fences, marks of lists, headings and
    emphasis, quotation marks around the whole, control characters, and all that follows the first
    paragraph.
    """
    text = _FENCE.sub("", _without_thinking(answer))
    text = _from_json(text)
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        line = " ".join(_clean_line(line) for line in paragraph.splitlines()).strip()
        line = _unquote(_LABEL.sub("", _INTRODUCTION.sub("", line, count=1).strip(), count=1))
        if line:  # an introduction alone leaves nothing, and the prompt follows
            return line
    return ""


def _without_thinking(answer: str) -> str:
    return _THINKING.sub("", answer).strip()


def _from_json(text: str) -> str:
    """Return the prompt of a JSON object; other texts as they are."""
    stripped = text.strip()
    if not stripped.startswith("{"):
        return text
    try:
        values = json.loads(stripped)
    except (ValueError, RecursionError):
        return text
    found = next((values[name] for name in _FIELDS if isinstance(values.get(name), str)), None)
    return text if found is None else str(found)


def _clean_line(line: str) -> str:
    line = _LIST_MARK.sub("", line.strip())
    return " ".join(_EMPHASIS.sub(r"\2", line).split())


def _unquote(text: str) -> str:
    """Remove quotation marks around the whole text; those of a part stay."""
    text = text.strip()
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and _is_one_quotation(text):
        text = text[1:-1].strip()
    return text


def _is_one_quotation(text: str) -> bool:
    inner = text[1:-1]
    return text[0] not in inner and text[-1] not in inner


def is_repetitive(text: str, times: int = 4) -> bool:
    """Return whether a text repeats one run of words at least ``times`` times in a row."""
    words = text.lower().split()
    for length in range(1, len(words) // times + 1):
        equal = 0  # words in a row that equal the one a run before
        for word, before in zip(words[length:], words, strict=False):
            equal = equal + 1 if word == before else 0
            if equal >= length * (times - 1):
                return True
    return False


def shares_run(text: str, other: str, length: int = 6) -> bool:
    """Return whether two texts share a run of ``length`` words, whatever case and punctuation."""
    first, second = (re.findall(r"[^\W_]+", each.lower()) for each in (text, other))
    runs = {tuple(second[k : k + length]) for k in range(len(second) - length + 1)}
    return any(tuple(first[k : k + length]) in runs for k in range(len(first) - length + 1))
