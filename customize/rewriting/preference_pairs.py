"""Preference pairs of ranked rewritings, for DPO (Prompt-A-Video, arXiv 2412.15156, section 3.3).

Each user prompt has several rewritings with the rewards of their pictures. The best rewriting, and
separately the second best, is preferred to every other one whose total reward is lower by more than
a margin, if all its rewards reach their floors. A rewriting that loses what the user asked for is
never preferred, and ranks below all that keep it, whatever its picture scored: text-level
faithfulness counts as in VPO (arXiv 2503.20491), whose authors criticize its absence in the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from customize.errors import ConfigError
from customize.rewriting.required_terms import find_problems, required_terms


@dataclass(frozen=True)
class Candidate:
    """A rewriting and the rewards of its pictures.

    Attributes:
        text: The rewriting.
        rewards: Name -> reward, against the user's prompt.
        total: Their weighted sum.
    """

    text: str
    rewards: Mapping[str, float]
    total: float


@dataclass(frozen=True)
class Pair:
    """Two rewritings of one prompt, of which the first is preferred."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class PairRule:
    """Which rewritings are preferred to which.

    Attributes:
        margin: A preferred total exceeds the other by more than this.
        floors: Name of a reward -> the least that a preferred rewriting has of it.
        best: How many of the best rewritings may be preferred; 2 in the paper's code.
        max_words: Most words of a preferred rewriting; 130 in the paper's code.
        max_length_ratio: Most words of a preferred rewriting, as a multiple of the other's, so
            that length earns nothing by itself. Infinity: any.

    Raises:
        ConfigError: A number is out of its range.
    """

    margin: float
    floors: Mapping[str, float] = field(default_factory=dict)
    best: int = 2
    max_words: int = 130
    max_length_ratio: float = 2.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("margin", self.margin, 0.0),
            ("best", self.best, 1),
            ("max_words", self.max_words, 1),
            ("max_length_ratio", self.max_length_ratio, 1.0),
        ):
            if not value >= least:  # NaN too
                raise ConfigError(f"{name} is {value}", where=name, fix=f"give at least {least:g}")


def rank(prompt: str, candidates: Sequence[Candidate]) -> list[tuple[bool, Candidate]]:
    """Return (keeps what the prompt asks for, candidate), the best first; equal texts once."""
    required = required_terms(prompt)
    distinct = {candidate.text: candidate for candidate in candidates}.values()
    judged = [(not find_problems(required, each.text), each) for each in distinct]
    return sorted(judged, key=lambda item: (item[0], item[1].total), reverse=True)


def make_pairs(prompt: str, candidates: Sequence[Candidate], rule: PairRule) -> list[Pair]:
    """Return the preference pairs of one prompt.

    Args:
        prompt: The user's prompt.
        candidates: Its rewritings; the prompt itself may be one of them.
        rule: Which are preferred to which.
    """
    ranked = rank(prompt, candidates)
    pairs = []
    for index, (is_faithful, chosen) in enumerate(ranked[: rule.best]):
        words = len(chosen.text.split())
        reaches = all(
            chosen.rewards.get(name, float("-inf")) >= least for name, least in rule.floors.items()
        )
        if not is_faithful or not reaches or words > rule.max_words:
            continue
        for other_is_faithful, other in ranked[index + 1 :]:
            is_better = not other_is_faithful or chosen.total - other.total > rule.margin
            is_longer = words > rule.max_length_ratio * len(other.text.split())
            if is_better and not is_longer:
                pairs.append(Pair(prompt, chosen.text, other.text))
    return pairs


def best_rewritings(
    prompts: Mapping[str, Sequence[Candidate]], floors: Mapping[str, float]
) -> list[tuple[str, str]]:
    """Return (prompt, its best faithful rewriting) for supervised training.

    Prompts whose best rewriting does not reach the floors, or is not better than the prompt itself,
    are left out.

    Args:
        prompts: User's prompt -> its rewritings.
        floors: Name of a reward -> the least that a rewriting has of it.
    """
    result = []
    for prompt, candidates in prompts.items():
        own = max((c.total for c in candidates if c.text == prompt), default=float("-inf"))
        ranked = [each for is_faithful, each in rank(prompt, candidates) if is_faithful]
        if not ranked or ranked[0].text == prompt or ranked[0].total <= own:
            continue
        if all(ranked[0].rewards.get(n, float("-inf")) >= v for n, v in floors.items()):
            result.append((prompt, ranked[0].text))
    return result
