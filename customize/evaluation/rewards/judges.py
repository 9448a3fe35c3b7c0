"""A model that judges results never serves as a reward in the same study."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from customize.errors import ConfigError
from customize.evaluation.rewards.reward import Reward


def check_judges(rewards: Iterable[Reward], judges: Iterable[Reward]) -> None:
    """Check that no judge is a reward as well.

    Both are searched inside weighted sums. Two are the same if they are of one kind, whatever the
    variant, and have the same weights, whatever file they come from.

    Args:
        rewards: What a study trains or selects with.
        judges: What it reports.

    Raises:
        ConfigError: A judge and a reward are of the same kind and have the same weights.
    """
    used = {_identity(reward): reward.name for reward in _flatten(rewards)}
    for judge in _flatten(judges):
        if _identity(judge) in used:
            raise ConfigError(
                f"the judge has the weights of the reward {used[_identity(judge)]}",
                where=judge.name,
                fix="judge with another kind of model, or with other weights: what is trained"
                " against a model proves nothing by it",
            )


def _identity(reward: Reward) -> tuple[str, str]:
    return reward.name.partition(":")[0], reward.digest


def _flatten(rewards: Iterable[Reward]) -> Iterator[Reward]:
    """Yield all rewards, those of sums in the place of the sums."""
    for reward in rewards:
        parts: Mapping[str, Reward] | None = getattr(reward, "rewards", None)
        if parts is None:
            yield reward
        else:
            yield from _flatten(parts.values())
