"""The parts of a prompt that every rewriting of it must keep, and the checks of a rewriting.

Kept are triggers, chosen phrases, quoted text, numbers, and negations: what a prompt excludes must
not come back as a wish, and no other count of things is added. The language stays too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from customize.concepts.library.library import TRIGGER_PATTERN
from customize.concepts.tokens.prompt_phrases import FUNCTION_WORDS, content_words, find_phrase
from customize.concepts.tokens.token_limit import TokenLimit
from customize.rewriting.language import same_language
from customize.rewriting.numbers import find_counts, find_numbers
from customize.rewriting.word_forms import pattern_of_forms, root

_QUOTED = re.compile(
    r"(?<!\d)\"([^\"\n]+)\"|“([^”\n]+)”|„([^“”\n]+)[“”]|«([^»\n]+)»|「([^」\n]+)」|‘([^’\n]+)’"
    r"|(?<!\w)'([^'\n]+)'(?!\w)"
)
_TRIGGER = re.compile(TRIGGER_PATTERN, re.IGNORECASE)

#: Words that negate what follows.
_NEGATION = re.compile(
    r"\b(?:no|not|never|without|neither|nor|none|lacking|excluding|except|free of|devoid of|zero|"
    r"avoid|avoiding|instead of|kein(?:e[nmrs]?)?|ohne|nicht|sans|pas de|sin|senza)\b"
    r"|\b(?:isn|aren|wasn|weren|doesn|don|didn|hasn|haven|won|can|couldn|shouldn|wouldn)['’]?t\b",
    re.IGNORECASE,
)
#: Where a negation ends.
_CLAUSE_END = re.compile(
    r"[,.;:!?()]|\b(?:wearing|holding|having|that|which|who|but|in|on|at|with|while|near|under|over|behind|by|from|to)\b"
    r"|\band(?=\s+(?:an?|the|one|two|his|her|its|with|\d)\b)",
    re.IGNORECASE,
)
_WEAK = FUNCTION_WORDS | {
    *("any", "some", "much", "many", "other", "else", "be", "been", "has", "have", "does", "do"),
    *("wear", "have", "show", "it", "there", "only", "very", "too", "more", "all", "such"),
}


@dataclass(frozen=True)
class RequiredTerms:
    """What a rewriting of one prompt must keep.

    Attributes:
        prompt: The user's prompt.
        triggers: Trigger words of concepts, as they are written.
        phrases: Phrases that the user wants kept, such as keys of ``regions=``.
        quotations: Texts in quotation marks, verbatim.
        numbers: Numbers, as digits, with repetitions.
        excluded: What the prompt excludes: content words of each negation.
        limits: What each text encoder reads of the rewriting; empty: all of it.
    """

    prompt: str
    triggers: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()
    quotations: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    excluded: tuple[tuple[str, ...], ...] = ()
    limits: tuple[TokenLimit, ...] = ()


def required_terms(
    prompt: str,
    triggers: Iterable[str] = (),
    keep: Iterable[str] = (),
    avoid: Iterable[str] = (),
    limits: Iterable[TokenLimit] = (),
) -> RequiredTerms:
    """Find what a rewriting of a prompt must keep.

    Args:
        prompt: The user's prompt.
        triggers: Trigger words of attached concepts; those that the prompt contains are kept, and
            so is everything in the form of a trigger, such as ``<rex>``.
        keep: Phrases to keep; those that the prompt lacks are ignored.
        avoid: Phrases that the call avoids; they count as excluded.
        limits: What each text encoder reads of the rewriting; none: all of it.
    """
    named = [*triggers, *_TRIGGER.findall(prompt)]
    present = [word for word in named if find_phrase(word, prompt)]
    quotations = [next(filter(None, match)) for match in _QUOTED.findall(prompt)]
    return RequiredTerms(
        prompt,
        triggers=tuple(dict.fromkeys(present)),
        phrases=tuple(phrase for phrase in keep if find_phrase(phrase, prompt)),
        quotations=tuple(dict.fromkeys(quotations)),
        numbers=tuple(find_numbers(_without_quotations(prompt))),
        excluded=(
            *_excluded(prompt),
            *(tuple(content_words(phrase)) for phrase in avoid if content_words(phrase)),
        ),
        limits=tuple(limits),
    )


def find_problems(required: RequiredTerms, text: str) -> list[str]:
    """Return what a rewriting breaks, as sentences without full stop; none: it may be drawn."""
    problems = []
    missing = missing_terms(required, text)
    if missing:
        problems.append(f"it lacks {', '.join(missing)}")
    own = {trigger.lower() for trigger in _TRIGGER.findall(required.prompt)}
    others = [name for name in _TRIGGER.findall(text) if name.lower() not in own]
    if others:
        problems.append(f"it contains {', '.join(dict.fromkeys(others))}")
    counts = added_counts(required.prompt, text)
    if counts:
        problems.append(f"it adds {', '.join(counts)}")
    wanted = [" ".join(words) for words in required.excluded if _wants(words, text)]
    if wanted:
        problems.append(f"it asks for {', '.join(wanted)}, which the prompt excludes")
    if not same_language(required.prompt, text):
        problems.append("it is in another language")
    return [*problems, *_truncations(required, text)]


def _truncations(required: RequiredTerms, text: str) -> list[str]:
    """Return what text encoders do not read: the end of a text, or a trigger.

    A text may be longer than what one encoder reads if another one reads it to its end. Triggers
    have embeddings of their own in each encoder, so each one has to read them.
    """
    if required.limits and all(limit.truncates(text) for limit in required.limits):
        limit = max(required.limits, key=lambda each: each.tokens or 0)
        return [
            f"it is too long: of its {limit.count(text)} tokens the {limit.encoder} reads "
            f"{limit.tokens}"
        ]
    return [
        f"{trigger} is not in the first {limit.tokens} tokens, which the {limit.encoder} reads"
        for limit in required.limits
        for trigger in required.triggers
        if limit.cuts_off(trigger, text)
    ]


def missing_terms(required: RequiredTerms, text: str) -> list[str]:
    """Return the terms of a prompt that a text lacks, as the prompt writes them."""
    named = (*required.triggers, *required.phrases)
    missing = [term for term in named if not find_phrase(term, text)]
    missing += [quoted for quoted in required.quotations if quoted not in text]
    lacking = Counter(required.numbers) - Counter(find_numbers(_without_quotations(text)))
    return [*dict.fromkeys(missing), *lacking]


def added_counts(prompt: str, text: str) -> list[str]:
    """Return the counts of a rewriting whose number the prompt does not have."""
    known = {*find_numbers(prompt), *(value for value, _ in find_counts(prompt))}
    counts = find_counts(_without_quotations(text))
    return [words for value, words in counts if value not in known]


def added_words(prompt: str, text: str) -> list[str]:
    """Return the content words of a rewriting that the prompt has in no inflected form.

    Verbs and adjectives are among them: what is a noun only a part-of-speech tagger could tell.
    """
    known = {root(word) for word in content_words(prompt)}
    return [word for word in content_words(text) if root(word) not in known]


def has_quotation(text: str) -> bool:
    """Return whether a text has quoted text."""
    return _QUOTED.search(text) is not None


def _without_quotations(text: str) -> str:
    return _QUOTED.sub(" ", text)


def _negated(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of what each negation of a text reaches."""
    spans = []
    for match in _NEGATION.finditer(text):
        end = _CLAUSE_END.search(text, match.end())
        spans.append((match.start(), end.start() if end else len(text)))
    return spans


def _excluded(prompt: str) -> list[tuple[str, ...]]:
    text = _without_quotations(prompt)
    found = []
    for start, end in _negated(text):
        clause = _NEGATION.sub(" ", text[start:end])
        for part in re.split(r"\b(?:or|and|oder|und|ou|y|e)\b|/", clause):
            words = tuple(word for word in content_words(part) if word not in _WEAK)
            if words and not _wants(words, prompt):  # "without a hat, in a hat shop"
                found.append(words)
    return found


def _wants(words: Sequence[str], text: str) -> bool:
    """Return whether a text asks for excluded words: all of them, one after another, unnegated."""
    body = r"\W+(?:\w+\W+)?".join(map(pattern_of_forms, words))
    negated = _negated(text)
    matches = re.finditer(rf"(?<![\w<]){body}(?![\w>])", text, re.IGNORECASE)
    return any(not any(a <= m.start() < b for a, b in negated) for m in matches)
