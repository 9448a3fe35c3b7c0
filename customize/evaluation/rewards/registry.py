"""The kinds of rewards, and loading one by its name.

To add a kind, write a file in this folder with a class that has the interface of
:class:`customize.evaluation.rewards.reward.Reward` and its :class:`RewardKind`, and list that in
:data:`REWARDS`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from customize.errors import ConfigError
from customize.evaluation.rewards.aesthetic import AESTHETIC
from customize.evaluation.rewards.blip2_itm import BLIP2_ITM
from customize.evaluation.rewards.blip_itm import BLIP_ITM
from customize.evaluation.rewards.clip import CLIP
from customize.evaluation.rewards.hpsv3 import HPSV3
from customize.evaluation.rewards.image_reward import IMAGE_REWARD
from customize.evaluation.rewards.pick_score import PICK_SCORE
from customize.evaluation.rewards.pyiqa import PYIQA
from customize.evaluation.rewards.reward import Reward, RewardKind
from customize.evaluation.rewards.video_score import VIDEO_SCORE
from customize.evaluation.rewards.yes_no import YES_NO
from customize.near_names import suggest_names
from customize.text import quote

#: Name -> kind, in the order in which the guide and error messages list them.
REWARDS: dict[str, RewardKind] = {
    kind.name: kind
    for kind in (
        CLIP,
        BLIP_ITM,
        BLIP2_ITM,
        AESTHETIC,
        PICK_SCORE,
        YES_NO,
        PYIQA,
        HPSV3,
        IMAGE_REWARD,
        VIDEO_SCORE,
    )
}


def load_reward(
    name: str, model: str | Path | None = None, device: str | torch.device = "cpu"
) -> Reward:
    """Load a reward by its name.

    Args:
        name: Name of a kind in :data:`REWARDS`; some have a variant, such as ``"pyiqa:musiq"``.
        model: Folder or hub id of the model; default: the kind's.
        device: Device that the model runs on.

    Raises:
        ConfigError: The name or device is unknown, or the kind needs a model or takes none.
        PipelineError: The model cannot be loaded, or a package is missing.
    """
    kind, variant = find_reward(name)
    try:
        torch.empty(0, device=torch.device(device))
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"the device {quote(device)} is unknown or missing",
            where="device",
            fix='give "cpu", or "cuda" on a machine with a GPU',
        ) from error
    chosen = kind.model if model is None else model
    return kind.load(chosen, device, variant) if variant else kind.load(chosen, device)


def find_reward(name: str) -> tuple[RewardKind, str]:
    """Return the kind of a reward and its variant, empty for none, without loading it.

    Raises:
        ConfigError: The name is unknown, or its variant is missing or one too many.
    """
    kind_name, colon, variant = name.partition(":") if isinstance(name, str) else (name, "", "")
    kind = REWARDS.get(kind_name) if isinstance(kind_name, str) else None
    if kind is None:
        raise ConfigError(
            f"unknown reward {quote(name)}",
            where="reward",
            fix=suggest_names(kind_name, list(REWARDS)),
        )
    if kind.variant == "none" and colon:
        raise ConfigError(
            f"the reward {kind.name} has no variants",
            where=name,
            fix=f"give {quote(kind.name)}",
        )
    if not variant and (colon or kind.variant == "required"):
        raise ConfigError(
            f"the reward {kind.name} lacks the name of its variant",
            where=name,
            fix=f"give {quote(kind.name + ':NAME')}",
        )
    return kind, variant
