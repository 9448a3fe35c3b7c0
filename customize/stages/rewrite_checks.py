"""The checks of a rewriter's settings."""

from __future__ import annotations

from collections.abc import Sequence

from customize.errors import ConfigError
from customize.evaluation.rewards.reward import Reward
from customize.rewriting.instructions import Instructions
from customize.text import quote


def check_instructions(instructions: Instructions | None) -> None:
    """Refuse instructions of another type.

    Raises:
        ConfigError: They are no :class:`Instructions`.
    """
    if instructions is not None and not isinstance(instructions, Instructions):
        raise ConfigError(
            f"instructions={quote(instructions)} is not Instructions",
            where="instructions",
            fix='give customize.rewriting.instructions.Instructions(system="...", '
            'user="Prompt: {prompt}")',
        )


def parse_keep(keep: str | Sequence[str]) -> tuple[str, ...]:
    """Return the phrases of ``keep=``.

    Raises:
        ConfigError: It is no text and no list of texts.
    """
    phrases = [keep] if isinstance(keep, str) else keep
    if not isinstance(phrases, Sequence) or not all(
        isinstance(phrase, str) and phrase.strip() for phrase in phrases
    ):
        raise ConfigError(
            f"keep={quote(keep)} is not text",
            where="keep",
            fix='give words of the prompt, such as keep=["golden hour"]',
        )
    return tuple(dict.fromkeys(" ".join(phrase.split()) for phrase in phrases))


def check_best_of(best_of: int, reward: Reward | None, temperature: float) -> None:
    """Refuse several rewritings that cannot be compared, or would be equal.

    Raises:
        ConfigError: The values do not fit together.
    """
    if not isinstance(best_of, int) or isinstance(best_of, bool) or not 1 <= best_of <= 64:
        raise ConfigError(
            f"invalid number of rewritings {quote(best_of)}",
            where="best_of",
            fix="give a number from 1 to 64",
        )
    if (best_of > 1) != (reward is not None):
        raise ConfigError(
            "best_of= and reward= belong together, and one of them is missing",
            where="reward" if reward is None else "best_of",
            fix='give both, such as best_of=4, reward=load_reward("clip")',
        )
    if best_of > 1 and temperature == 0:
        raise ConfigError(
            "at a temperature of 0 all rewritings of a prompt are equal",
            where="temperature",
            fix="give temperature=1.0 with best_of=",
        )
