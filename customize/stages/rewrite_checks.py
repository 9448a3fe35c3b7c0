"""The checks of a rewriter's settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from customize.errors import ConfigError
from customize.evaluation.rewards.reward import Reward
from customize.near_names import did_you_mean
from customize.rewriting.instructions import Instructions
from customize.rewriting.language_model import AfterUse, LanguageModel
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


def check_count(n: int) -> None:
    """Refuse an impossible number of rewritings.

    Raises:
        ConfigError: It is not a whole number from 1.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ConfigError(
            f"invalid number of rewritings {quote(n)}", where="n", fix="give 1 or more"
        )


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
    if reward is not None and not (
        callable(reward) and isinstance(getattr(reward, "name", None), str)
    ):
        raise ConfigError(
            f"reward={quote(reward)} is no reward",
            where="reward",
            fix='give customize.evaluation.rewards.load_reward("clip"), or an object with a name '
            "and a digest that scores pictures for prompts",
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


def check_after_call(after_call: str, model: LanguageModel) -> None:
    """Refuse unknown values, and to free weights that cannot be loaded again.

    Raises:
        ConfigError: The value is unknown, or does not belong to the model.
    """
    known = get_args(AfterUse)
    if after_call not in known:
        raise ConfigError(
            f"{quote(after_call)} is none of {', '.join(known)}",
            where="after_call",
            fix=did_you_mean(after_call, known) or "give one of them",
        )
    if after_call == "unload" and not model.can_reload:
        raise ConfigError(
            "the weights of this language model cannot be loaded again",
            where="after_call",
            fix='load it by Rewriter.from_pretrained, or give after_call="offload"',
        )
