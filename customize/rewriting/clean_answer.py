"""The prompt in what a language model answers: without introductions, markup and labels."""

from __future__ import annotations

import json
import re
import unicodedata

#: The longest part of an answer that is read, in characters.
_MAX_READ = 8000

_CANNOT = r"(?:can'?t|cannot|can not|won'?t|will not|do not|don'?t|am unable to|am not able to)"
_DOING = (
    r"(?:help|assist|create|generate|provide|fulfil|comply|do|rewrite|write|produce|engage|process|"
    r"support|answer|draw|feel)"
)
#: How an answer begins that declines to write a prompt.
_REFUSALS = re.compile(
    r"(?:(?:i'?m|i am) (?:very |so |really |deeply )?(?:sorry|unable|afraid|not able)|"
    rf"sorry[,.!]|sorry but|i {_CANNOT} {_DOING}|i must decline|i apologi[sz]e|"
    rf"(?:as|being) an? (?:ai|language model|assistant)\b|unfortunately,? i {_CANNOT})",
    re.IGNORECASE,
)

_ADJECTIVE = r"(?:new|better|improved|rewritten|refined|revised|final|enhanced|updated|corrected)"
_NOUN = r"(?:prompt|answer|output|caption|description|response)"
_INTERJECTION = r"(?:sure|certainly|of course|okay|ok|absolutely|great)(?: thing)?[!,.:]"

#: A sentence before the prompt, such as "Sure! Here is a better prompt:".
_INTRODUCTION = re.compile(
    rf"^(?:{_INTERJECTION}\s*)?(?:here(?:'s| is| are)|this is|below is|i(?:'ve| have))\b"
    rf"[^\n:]{{0,80}}\b(?:{_NOUN}|{_ADJECTIVE}|version|rewrite)\b[^\n:]{{0,60}}:\s*",
    re.IGNORECASE,
)

#: A label before the prompt, such as "**New prompt:**" or "A better prompt could be:".
_LABEL = re.compile(
    rf"^(?:{_INTERJECTION}\s*)?(?:(?:an?|the|my|your) )?(?:{_ADJECTIVE}[ _-])?{_NOUN}(?: \d+)?"
    r"(?:(?: (?:is|are|could be|would be|might be))?\s*(?:[:=]\s*| - |$))|^assistant\s*:\s*",
    re.IGNORECASE,
)

#: A paragraph that talks about the task.
_TALK = re.compile(
    rf"^{_INTERJECTION}(?:$|.*\bthe user\b)|^(?:so,? )?the user (?:wants|asks|is asking)\b",
    re.IGNORECASE,
)
#: What follows the prompt.
_AFTERWORD = re.compile(
    r"\s+(?:\(?(?:explanation|note|notes|reasoning|changes(?: made)?)\)?\s*:|let me know\b|"
    r"i hope (?:this|that)\b|feel free to\b).*",
    re.IGNORECASE | re.DOTALL,
)

_THINKING = re.compile(
    r"<(think|thinking|reasoning)>.*?(?:</\1>|\Z)|\A.*</(?:think|thinking|reasoning)>",
    re.DOTALL | re.IGNORECASE,
)
_TAG = re.compile(r"</?(?:prompt|answer|output|caption|response)>", re.IGNORECASE)
_FENCE = re.compile(r"^\s*```[\w-]*\s*$", re.MULTILINE)
_LIST_MARK = re.compile(r"^(?:[-*•#>]+|1[.)])\s+")
_EMPHASIS = re.compile(r"(\*\*|`{1,3})(?=[^\s`*])([^`*]+)(?<=\S)\1")
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“", "「": "」", "'": "'", "‘": "’"}
#: Names of fields that hold the prompt, where the answer is JSON.
_FIELD = re.compile(r"prompt|caption|text", re.IGNORECASE)


def is_refusal(answer: str) -> bool:
    """Return whether an answer declines, such as "I'm sorry, but I cannot ..."."""
    return bool(_REFUSALS.match(_without_thinking(answer).lstrip(" \t\n\"'“*")))


def clean_answer(answer: str) -> str:
    """Return the prompt in an answer, on one line; empty if there is none.

    Removed are reasoning in tags, introductions, labels, code fences, marks of lists, headings and
    emphasis, quotation marks around the whole, control characters, marks of writing direction, and
    all that follows the first paragraph.
    """
    text = _TAG.sub("", _FENCE.sub("", _without_thinking(answer[:_MAX_READ])))
    text = "".join(char for char in _from_json(text) if not _is_invisible(char))
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if _TALK.match(paragraph.strip()):
            continue
        paragraph = _AFTERWORD.sub("", paragraph)
        line = " ".join(_clean_line(line) for line in paragraph.splitlines()).strip()
        line = _unquote(_LABEL.sub("", _INTRODUCTION.sub("", line, count=1).strip(), count=1))
        if line:  # an introduction alone leaves nothing, and the prompt follows
            return line
    return ""


def _is_invisible(char: str) -> bool:
    """Whether a character is a control or a mark of direction; joiners of letters are not."""
    category = unicodedata.category(char)
    return category in ("Cc", "Cs", "Cf") and char not in "\n\t\u200c\u200d"


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
    if not isinstance(values, dict):
        return text
    named = (value for name, value in values.items() if _FIELD.search(name))
    found = next((value for value in named if isinstance(value, str)), None)
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
    """Return whether a text repeats one run of words at least ``times`` times in a row.

    One word may be repeated twice as often, as in "very very very very tall".
    """
    words = text.lower().split()
    for length in range(1, len(words) // times + 1):
        equal = 0  # words in a row that equal the one a run before
        for word, before in zip(words[length:], words, strict=False):
            equal = equal + 1 if word == before else 0
            if equal >= (length * (times - 1) if length > 1 else 2 * times - 1):
                return True
    return False


def shares_run(text: str, other: str, length: int = 6) -> bool:
    """Return whether two texts share a run of ``length`` words, whatever case and punctuation."""
    first, second = (re.findall(r"[^\W_]+", each.lower()) for each in (text, other))
    runs = {tuple(second[k : k + length]) for k in range(len(second) - length + 1)}
    return any(tuple(first[k : k + length]) in runs for k in range(len(first) - length + 1))
