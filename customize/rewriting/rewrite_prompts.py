"""Rewriting of prompts: generate, clean, check, ask once more, repair.

The text that is drawn keeps what the user asked for (:mod:`customize.rewriting.required_terms`), or
it is the user's own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from customize.concepts.tokens.prompt_phrases import FUNCTION_WORDS, find_phrase
from customize.errors import EndpointError, PipelineError
from customize.rewriting.clean_answer import (
    clean_answer,
    is_refusal,
    is_repetitive,
    shares_run,
)
from customize.rewriting.instructions import Instructions
from customize.rewriting.language_model import Chat, Completion, LanguageModel, Sampling
from customize.rewriting.required_terms import (
    RequiredTerms,
    added_words,
    find_problems,
    has_quotation,
)

#: Largest number of characters of a rewriting.
_MAX_LENGTH = 2000
_SEEDS = 2**31


@dataclass(frozen=True)
class Rewriting:
    """The rewriting of one prompt.

    Attributes:
        prompt: The user's prompt.
        text: The prompt to draw.
        added: Content words of the text that the prompt has in no inflected form: nouns, adjectives
            and verbs.
        note: Why the text is repaired, or the prompt itself; empty if the model's answer is drawn.
    """

    prompt: str
    text: str
    added: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        return self.text


def rewrite_prompts(
    model: LanguageModel,
    requests: Sequence[RequiredTerms],
    seeds: Sequence[int],
    *,
    instructions: Instructions,
    sampling: Sampling,
    class_words: Mapping[str, str] | None = None,
) -> list[Rewriting | EndpointError]:
    """Rewrite prompts.

    Args:
        model: The language model.
        requests: Each prompt with what its rewriting must keep.
        seeds: Seed of each rewriting.
        instructions: The text around the prompt.
        sampling: How answers are generated.
        class_words: Trigger words of concepts -> their class word, for repairs.

    Returns:
        The rewriting of each prompt, or why a server elsewhere did not answer.
    """
    result: dict[int, Rewriting | EndpointError] = {
        index: Rewriting(required.prompt, required.prompt)
        for index, required in enumerate(requests)
        if not required.prompt.strip()
    }
    asked = [index for index in range(len(requests)) if index not in result]
    chats = [Chat(instructions.messages(requests[k].prompt), seeds[k] % _SEEDS) for k in asked]
    answers: dict[int, Completion] = {}
    for k, answer in zip(asked, model.complete(chats, sampling) if chats else (), strict=True):
        if isinstance(answer, EndpointError):
            result[k] = answer
        else:
            answers[k] = answer
    wording = " ".join((instructions.system, instructions.user))
    problems = {k: find_answer_problems(requests[k], answers[k], wording) for k in answers}

    again = [k for k in answers if problems[k]]
    chats = [
        Chat(
            instructions.retry(
                requests[k].prompt, clean_answer(answers[k].text) or "...", problems[k]
            ),
            (seeds[k] + 1) % _SEEDS,
        )
        for k in again
    ]
    try:
        second = list(model.complete(chats, sampling)) if chats else []
    except PipelineError:  # a long chat; the first answers are there
        again, second = [], []
    for k, answer in zip(again, second, strict=True):
        if isinstance(answer, EndpointError):
            continue
        remaining = find_answer_problems(requests[k], answer, wording)
        if not remaining or not clean_answer(answers[k].text):
            answers[k], problems[k] = answer, remaining
    for k, answer in answers.items():
        result[k] = _accept(requests[k], answer, problems[k], wording, class_words or {})
    return [result[index] for index in range(len(requests))]


def find_answer_problems(required: RequiredTerms, answer: Completion, wording: str) -> list[str]:
    """Return why an answer may not be drawn, as sentences without full stop.

    Args:
        required: The prompt with what its rewriting must keep.
        answer: The answer.
        wording: The text of the instructions, which an answer must not repeat.
    """
    fault = find_fault(required.prompt, answer, wording)
    return [fault] if fault else find_problems(required, clean_answer(answer.text))


def find_fault(prompt: str, answer: Completion, wording: str) -> str:
    """Return why an answer contains no prompt; empty if it does.

    Args:
        prompt: The user's prompt.
        answer: The answer.
        wording: The text of the instructions.
    """
    text = clean_answer(answer.text)
    if is_refusal(answer.text):
        return "it declines"
    if not any(char.isalnum() for char in text):
        return "it is empty"
    if not answer.is_complete or len(text) > _MAX_LENGTH:
        return "it repeats itself" if is_repetitive(text[:_MAX_LENGTH]) else "it does not end"
    if is_repetitive(text):
        return "it repeats itself"
    if shares_run(text, wording) and not shares_run(text, prompt):
        return "it repeats the instructions"
    return ""


def _accept(
    required: RequiredTerms,
    answer: Completion,
    problems: list[str],
    wording: str,
    class_words: Mapping[str, str],
) -> Rewriting:
    """Return an answer without problems, a repaired one, or the prompt."""
    text, note = clean_answer(answer.text), ""
    if problems and not find_fault(required.prompt, answer, wording):
        text, note = repair(required, text, class_words), f"repaired, as {problems[0]}"
        problems = problems if find_problems(required, text) else []
    if problems:
        return Rewriting(required.prompt, required.prompt, note=f"not rewritten, as {problems[0]}")
    return Rewriting(required.prompt, text, tuple(added_words(required.prompt, text)), note)


def repair(required: RequiredTerms, text: str, class_words: Mapping[str, str]) -> str:
    """Put what a rewriting lost back into it, by a fixed rule.

    A trigger replaces the first mention of its concept's class word that is no part of a compound
    (:func:`is_whole_noun`), with that word's article; a rewriting without one stays without the
    trigger. Phrases and quotations follow at the end, after a comma.

    Args:
        required: What the rewriting must keep.
        text: The rewriting.
        class_words: Trigger words of concepts -> their class word.
    """
    for trigger in required.triggers:
        if find_phrase(trigger, text):
            continue
        mentions = find_phrase(class_words.get(trigger, ""), text)
        own = _word_before(trigger, required.prompt)
        whole = ((a, b) for a, b in mentions if is_whole_noun(text, a, b, own))
        for start, end in itertools.islice(whole, 1):
            text = _without_article(text[:start]) + trigger + text[end:]
    for phrase in required.phrases:
        if not find_phrase(phrase, text):
            text = f"{text.rstrip(' .,')}, {phrase}"
    for quotation in required.quotations:
        if quotation not in text and not has_quotation(text):
            text = f'{text.rstrip(" .,")}, "{quotation}"'
    return text


def is_whole_noun(text: str, start: int, end: int, adjective: str = "") -> bool:
    """Return whether a noun stands alone, and names what it names by itself.

    Before it is a function word, such as an article, or nothing; after it a function word, a
    participle in -ing or -ed, or nothing. So "dog" is no whole noun in "a hot dog", "a dog house"
    or "a dog's bowl". Any other adjective counts as part of a compound.

    Args:
        text: The text.
        start: Where the noun begins.
        end: Where it ends.
        adjective: A word that may be before it too.
    """
    before = re.search(r"([^\W_]+)[ \t]*$|[-'’]$", text[:start])
    after = re.match(r"[ \t]*([^\W_]+)|[-'’]", text[end:])
    known = FUNCTION_WORDS | {adjective.lower()}
    starts = before is None or (before[1] or "").lower() in known - {""}
    follower = "" if after is None else (after[1] or "").lower()
    ends = after is None or follower in FUNCTION_WORDS or follower.endswith(("ing", "ed"))
    return starts and ends


def _word_before(phrase: str, text: str) -> str:
    """Return the word before the first occurrence of a phrase; empty for none."""
    spans = find_phrase(phrase, text)
    before = re.search(r"([^\W_]+)[ \t]+$", text[: spans[0][0]]) if spans else None
    return before[1] if before else ""


def _without_article(text: str) -> str:
    """Return a text without the article that ends it."""
    head, _, last = text.rstrip().rpartition(" ")
    if last.lower() not in ("a", "an", "the"):
        return text
    return f"{head} " if head else ""
