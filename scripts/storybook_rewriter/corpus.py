"""What the miniature language model reads before it is taught to rewrite: chats about words.

Definitions name every word, also the held-out ones. Paraphrases turn a prompt into another way to
ask for the same, a tenth of them into the caption of the base's grammar. Held-out words are in
definitions alone.
"""

from __future__ import annotations

import string

import numpy as np

from customize.storybook.user_prompts import (
    KINDS,
    SYNONYMS,
    random_request,
    write_user_prompt,
)
from customize.storybook.world import ACCESSORIES, BACKGROUNDS, CLASSES, COLOURS, PATTERNS

#: The share of paraphrases that are captions of the base: enough to know them, too few to prefer
#: them, so that what training on rewards adds can be measured.
_CAPTIONS = 0.1

USER = "Prompt: {prompt}\nBetter prompt:"

_KIND_OF = {
    **dict.fromkeys(CLASSES, "thing"),
    **dict.fromkeys(COLOURS, "colour"),
    **dict.fromkeys(PATTERNS, "pattern"),
    **dict.fromkeys(ACCESSORIES, "thing to wear"),
    **dict.fromkeys(BACKGROUNDS, "place"),
}


def random_trigger(rng: np.random.Generator) -> str:
    """A random trigger, such as <abc>, <tom2>."""
    letters = "".join(rng.choice(list(string.ascii_lowercase), size=int(rng.integers(2, 7))))
    return f"<{letters}{rng.choice(('', '', '1', '2', '-v2'))}>"


def definition(rng: np.random.Generator) -> tuple[str, str]:
    """A question about a word, and its answer."""
    word = str(rng.choice(list(SYNONYMS)))
    other = str(rng.choice(SYNONYMS[word]))
    kind = _KIND_OF[word]
    questions = (
        (f"What does {other} mean?", f"{other} means {word}."),
        (f"Another word for {word}?", f"{other} is another word for {word}."),
        (f"What is {other}?", f"{other} is a {kind}: {word}."),
        (f"Is {other} a {kind}?", f"yes, {other} is {word}."),
        (f"Say {other} in a simple word.", word),
        (f"Say a {other} in simple words.", f"a {word}"),
    )
    return questions[int(rng.integers(len(questions)))]


def paraphrase(rng: np.random.Generator) -> tuple[str, str]:
    """A prompt in the chat of the rewriter, and another way to ask for the same."""
    kind = str(rng.choice(KINDS))
    trigger = random_trigger(rng) if rng.random() < 0.5 else ""
    prompt = write_user_prompt(rng, kind, request=random_request(rng), trigger=trigger)
    if rng.random() < _CAPTIONS:
        answer = prompt.caption
    elif kind == KINDS[-1] or rng.random() < 0.2:
        answer = prompt.text
    else:
        other = str(rng.choice(("short", "odd order", "unseen words")))
        answer = write_user_prompt(rng, other, request=prompt.request).text
    return USER.replace("{prompt}", prompt.text), answer


def chat(rng: np.random.Generator, definitions: float = 0.3) -> tuple[str, str]:
    """A user's message and its answer; ``definitions`` is the share of questions about words."""
    return definition(rng) if rng.random() < definitions else paraphrase(rng)
