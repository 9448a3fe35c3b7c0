"""Rewards: scores of pictures and videos for the user's own prompts.

A reward is a file of this package that defines a :class:`RewardKind`, and one line of
:data:`REWARDS`. :func:`score` calls a reward and checks what it returns.
"""

from customize.evaluation.rewards.judges import check_judges
from customize.evaluation.rewards.registry import REWARDS, load_reward
from customize.evaluation.rewards.reward import Picture, Reward, RewardKind
from customize.evaluation.rewards.score import Scores, score
from customize.evaluation.rewards.weighted_sum import WeightedScores, WeightedSum

__all__ = [
    "REWARDS",
    "Picture",
    "Reward",
    "RewardKind",
    "Scores",
    "WeightedScores",
    "WeightedSum",
    "check_judges",
    "load_reward",
    "score",
]
