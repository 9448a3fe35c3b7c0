"""Phrases of a prompt: finding them, and what a prompt says without some of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from customize.errors import ConfigError
from customize.near_names import find_near_names

#: Words that say nothing of what is in a picture by themselves.
SMALL_WORDS = frozenset(
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
    """Where a phrase stands in a prompt, as whole words; upper and lower case are alike.

    Returns:
        (start, end) of each place; empty where it does not occur.
    """
    words = phrase.split()
    if not words:
        return []
    body = r"\s+".join(map(re.escape, words))
    # A trigger's later entries, `<rex>_1`, and other tokens such as `<rex>-style`, are no trigger.
    # Nor is a plain word one that a trigger has inside.
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
    places = find_phrase(phrase, prompt)
    if not places or len(prompt) < limit // 2:  # a letter has two tokens at most
        return False
    start = tokenizer(prompt[: places[0][1]], add_special_tokens=False, verbose=False).input_ids
    return len(start) > limit - tokenizer.num_special_tokens_to_add()


def remove_phrases(prompt: str, phrases: Iterable[str]) -> str:
    """What is left of a prompt where phrases are taken out.

    Each goes with its article, and with the comma, "and" or "&" that joined it to the rest:
    ``a photo of <rex> and a red car on a beach`` without ``red car`` is ``a photo of <rex> on a
    beach``, and without ``<rex>`` it is ``a photo of a red car on a beach``.
    """
    for phrase in phrases:
        while places := find_phrase(phrase, prompt):
            start, end = places[0]
            head, tail = prompt[:start], prompt[end:]
            head = re.sub(_ARTICLE + r"$", "", head, flags=re.IGNORECASE)
            shorter = re.sub(rf"\s*{_JOINED}\s*$", " ", head, flags=re.IGNORECASE)
            if shorter == head:
                tail = re.sub(rf"^\s*{_JOINED}\s*", " ", tail, flags=re.IGNORECASE)
            prompt = shorter + tail
    return re.sub(r"\s+,", ",", " ".join(prompt.split()))


def content_words(text: str) -> list[str]:
    """The words of a text that say what is in a picture, in lower case, each once."""
    words = re.findall(r"<[^<>\s]+>|[^\W_]+(?:[-'][^\W_]+)*", text.lower())
    return [word for word in dict.fromkeys(words) if word not in SMALL_WORDS]


def common_words(captions: Sequence[str], besides: Iterable[str]) -> list[str]:
    """The telling words that all captions have, in the first one's order.

    Args:
        besides: words that do not count, such as a trigger and its class word.
    """
    left = {word for text in besides for word in (text.lower(), *content_words(text))}
    first = content_words(captions[0]) if captions else []
    return [
        word
        for word in first
        if word not in left and all(find_phrase(word, caption) for caption in captions)
    ]


def mentions_phrase(phrase: str, prompt: str) -> bool:
    """Whether a prompt has any of a phrase's telling words; or all of it, where it has none."""
    return any(find_phrase(word, prompt) for word in content_words(phrase) or [phrase])


def regional_prompts(prompt: str, phrases: Sequence[str]) -> list[str]:
    """What is asked of the background, without any of the phrases, and of each phrase's region,
    without the others."""
    others = [[other for other in phrases if other != own] for own in phrases]
    return [remove_phrases(prompt, phrases), *(remove_phrases(prompt, each) for each in others)]


def check_phrases(prompt: str, phrases: Sequence[str], known: Iterable[str], where: str) -> None:
    """Refuse phrases that a prompt does not have, or that share words of it.

    Args:
        known: what else the writer may have meant, such as triggers.

    Raises:
        ConfigError: naming the phrase, and what is like it.
    """
    taken: list[tuple[int, int, str]] = []
    for phrase in phrases:
        places = find_phrase(phrase, prompt)
        if not places:
            raise ConfigError(
                f"{phrase!r} is not in the prompt {prompt!r}",
                where=where,
                fix=_near(phrase, prompt, known),
            )
        for start, end in places:
            for first, last, other in taken:
                if start < last and first < end:
                    raise ConfigError(
                        f"{phrase!r} and {other!r} share words of the prompt {prompt!r}",
                        where=where,
                        fix="give each region words of its own",
                    )
            taken.append((start, end, phrase))


def _near(phrase: str, prompt: str, known: Iterable[str]) -> str:
    words = prompt.split()
    count = max(1, len(phrase.split()))
    runs = [" ".join(words[k : k + count]) for k in range(len(words) - count + 1)]
    choices = list(dict.fromkeys([*known, *runs]))
    found = find_near_names(phrase, choices)
    if found:
        return "write it as the prompt does; near it are " + ", ".join(found)
    return "name words that the prompt has, such as a trigger or red car"
