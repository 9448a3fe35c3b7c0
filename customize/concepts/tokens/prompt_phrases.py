"""Phrases of a prompt: finding, comparing and removing them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from customize.errors import ConfigError
from customize.near_names import find_near_names

#: Function words, which do not describe the content of a picture.
FUNCTION_WORDS = frozenset(
    {
        *("a", "an", "the", "this", "that", "his", "her", "its", "my", "your", "their"),
        *("of", "in", "on", "at", "to", "by", "for", "from", "with", "without", "near"),
        *("under", "over", "and", "or", "is", "are", "being", "wearing", "holding", "one", "two"),
        *("photo", "photograph", "picture", "image", "drawing", "painting", "style"),
    }
)

_JOINED = r"(?:,|\band\b|&)"
_ARTICLE = r"(?:\b(?:a|an|the)\s+)?"


def find_phrase(phrase: str, prompt: str) -> list[tuple[int, int]]:
    """Find a phrase in a prompt, as whole words; case is ignored.

    Returns:
        (start, end) of each occurrence.
    """
    words = phrase.split()
    if not words:
        return []
    body = r"\s+".join(map(re.escape, words))
    # `<rex>` is not found in `<rex>_1` and `<rex>-style`, nor a plain word inside a trigger.
    before = r"(?<![\w<])" if re.match(r"\w", words[0]) else r"(?<![\w-])"
    after = r"(?![\w>])" if re.search(r"\w$", words[-1]) else r"(?![\w-])"
    return [m.span() for m in re.finditer(before + body + after, prompt, re.IGNORECASE)]


def is_truncated(phrase: str, prompt: str, tokenizer: Any, limit: int) -> bool:
    """Whether the first occurrence of a phrase lies beyond the tokens that an encoder reads.

    Args:
        phrase: The phrase.
        prompt: The prompt; False where it does not contain the phrase.
        tokenizer: The encoder's tokenizer.
        limit: The number of tokens that it reads, special tokens included.
    """
    spans = find_phrase(phrase, prompt)
    if not spans or len(prompt) < limit // 2:  # a letter has two tokens at most
        return False
    start = tokenizer(prompt[: spans[0][1]], add_special_tokens=False, verbose=False).input_ids
    return len(start) > limit - tokenizer.num_special_tokens_to_add()


def remove_phrases(prompt: str, phrases: Iterable[str]) -> str:
    """Remove phrases from a prompt.

    Each phrase is removed with its article, and with the comma, "and" or "&" that joins it:
    ``a photo of <rex> and a red car on a beach`` without ``red car`` is ``a photo of <rex> on a
    beach``, and without ``<rex>`` it is ``a photo of a red car on a beach``.
    """
    for phrase in phrases:
        while spans := find_phrase(phrase, prompt):
            start, end = spans[0]
            head, tail = prompt[:start], prompt[end:]
            head = re.sub(_ARTICLE + r"$", "", head, flags=re.IGNORECASE)
            shorter = re.sub(rf"\s*{_JOINED}\s*$", " ", head, flags=re.IGNORECASE)
            if shorter == head:
                tail = re.sub(rf"^\s*{_JOINED}\s*", " ", tail, flags=re.IGNORECASE)
            prompt = shorter + tail
    return re.sub(r"\s+,", ",", " ".join(prompt.split()))


def content_words(text: str) -> list[str]:
    """The distinct content words of a text, in lower case."""
    words = re.findall(r"<[^<>\s]+>|[^\W_]+(?:[-'][^\W_]+)*", text.lower())
    return [word for word in dict.fromkeys(words) if word not in FUNCTION_WORDS]


def common_words(captions: Sequence[str], besides: Iterable[str]) -> list[str]:
    """The content words that all captions share, in the order of the first one.

    Args:
        captions: The captions.
        besides: Words to leave out, such as a trigger and its class word.
    """
    excluded = {word for text in besides for word in (text.lower(), *content_words(text))}
    first = content_words(captions[0]) if captions else []
    return [
        word
        for word in first
        if word not in excluded and all(find_phrase(word, caption) for caption in captions)
    ]


def mentioned_spans(phrase: str, prompt: str) -> list[tuple[int, int]]:
    """The content words of a phrase that a prompt contains, as (start, end) in the phrase.

    A phrase without content words counts as one.
    """
    words = content_words(phrase) or [phrase]
    shared = [word for word in words if find_phrase(word, prompt)]
    return sorted(span for word in shared for span in find_phrase(word, phrase))


def unmentioned_part(phrase: str, prompt: str) -> str:
    """A phrase without the content words that a prompt contains; empty if it has no others.

    ``red background`` becomes ``red`` for the prompt ``a dog on a blue background``, and ``a hat on
    a beach`` becomes ``hat`` for ``a dog at the beach``.
    """
    spans = mentioned_spans(phrase, prompt)
    if not spans:
        return phrase
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(phrase)]
    kept = [phrase[end:start] for end, start in zip(ends, starts, strict=True)]
    words = " ".join(kept).split()
    while words and words[0].lower() in FUNCTION_WORDS:
        words.pop(0)
    while words and words[-1].lower() in FUNCTION_WORDS:
        words.pop()
    part = " ".join(words)
    return part if content_words(part) else ""


def regional_prompts(prompt: str, phrases: Sequence[str]) -> list[str]:
    """The prompt of the background, and of each phrase's region.

    Returns:
        The prompt without all phrases; then, for each phrase, the prompt without the others.
    """
    others = [[other for other in phrases if other != phrase] for phrase in phrases]
    return [
        remove_phrases(prompt, phrases),
        *(remove_phrases(prompt, removed) for removed in others),
    ]


def check_phrases(prompt: str, phrases: Sequence[str], known: Iterable[str], where: str) -> None:
    """Refuse phrases that a prompt does not contain, or that share words of it.

    Args:
        prompt: The prompt.
        phrases: The phrases.
        known: Further suggestions, such as triggers.
        where: The argument, for errors.

    Raises:
        ConfigError: With the phrase and similar ones.
    """
    taken: list[tuple[int, int, str]] = []
    for phrase in phrases:
        spans = find_phrase(phrase, prompt)
        if not spans:
            raise ConfigError(
                f"{phrase!r} is not in the prompt {prompt!r}",
                where=where,
                fix=_suggest(phrase, prompt, known),
            )
        for start, end in spans:
            for first, last, other in taken:
                if start < last and first < end:
                    raise ConfigError(
                        f"{phrase!r} and {other!r} share words of the prompt {prompt!r}",
                        where=where,
                        fix="name each region by different words",
                    )
            taken.append((start, end, phrase))


def _suggest(phrase: str, prompt: str, known: Iterable[str]) -> str:
    words = prompt.split()
    count = max(1, len(phrase.split()))
    runs = [" ".join(words[k : k + count]) for k in range(len(words) - count + 1)]
    choices = list(dict.fromkeys([*known, *runs]))
    similar = find_near_names(phrase, choices)
    if similar:
        return "write it as in the prompt; similar are " + ", ".join(similar)
    return "use words of the prompt, such as a trigger or red car"
