"""The interface of rewards, and what identifies their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

#: A picture, or the frames of a video in their order.
Picture: TypeAlias = Image.Image | Sequence[Image.Image]


class Reward(Protocol):
    """A score of pictures or videos for the prompts that a user wrote; higher is better.

    A reward that combines others lists them in an attribute ``rewards``, a mapping from name to
    reward, where :func:`customize.evaluation.rewards.check_judges` finds them.

    Attributes:
        name: Its kind, and after a colon its variant, such as ``"clip"`` or ``"pyiqa:musiq"``.
        digest: What identifies its weights: rewards of equal name and digest give equal scores.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def digest(self) -> str: ...  # noqa: D102

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Tensor:
        """Score each picture for its prompt.

        Args:
            pictures: For each prompt an image, or the frames of a video. Image models score
                :data:`customize.evaluation.rewards.frames.FRAMES` evenly spaced frames of a video
                and return the mean.
            prompts: The prompts as the user wrote them, before any rewriting.

        Returns:
            Scores (n,), float32, on the CPU.
        """
        ...


@dataclass(frozen=True)
class RewardKind:
    """A kind of reward in the registry.

    Attributes:
        name: Its name in :func:`customize.evaluation.rewards.load_reward`.
        measures: What it scores, for guides.
        load: Called with model, device and, where the name has one, the variant.
        model: Hub id, or a name of the package, where no model is given. None: there is no
            default, or the package has its own.
        needs: Package to install beside this one.
        variant: Whether the name has a variant after a colon, as in ``pyiqa:musiq``.
    """

    name: str
    measures: str
    load: Callable[..., Reward]
    model: str | None = None
    needs: str = ""
    variant: Literal["none", "optional", "required"] = "none"


def weights_digest(model: nn.Module, name: str = "") -> str:
    """Return the SHA-256 of a model's weights.

    The values are rounded to float16 first, so that a copy in half precision and the original have
    the same digest.

    Args:
        model: The model.
        name: Is hashed too, for models that may have no weights.
    """
    sha = hashlib.sha256(name.encode())
    for key, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().reshape(-1).cpu()
        if values.is_floating_point():
            values = values.to(torch.float16)
        sha.update(f"{key} {tuple(tensor.shape)} ".encode())
        sha.update(values.contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()
