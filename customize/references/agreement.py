"""How well each image of a group agrees with the others, and its weight in the group's tokens.

The final layer of the encoder reads all images; hiding images from it gives the tokens of a part
of the group at the cost of one layer. For image i, ``own_i`` are the tokens of it alone and
``rest_i`` those of the others. Both contain what every group has in common (the instruction, and
what the learned tokens always say), so the tokens of no image are subtracted:

    agreement_i = max(0, cos(own_i - none, rest_i - none))

in the mean over tokens. An image that shows something else has a low agreement, while it lowers
that of the others little, since they see one outlier among many. The weight compares it with the
median m of the group, so that groups of different images are not punished:

    weight_i = 1                               if agreement_i >= KEEP * m
               max(0, agreement_i / (KEEP * m)) ** POWER     otherwise

A group of fewer than three images is not weighed: of two that differ, nobody can tell which is the
outlier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Chosen on the bundled model, on groups of eight of 24 identities that no benchmark uses. With one
# outlier of the same class, the tokens are .43 as far from those of a clean group as without
# weights (.40 where it is removed; .88 with KEEP .7 and POWER 2), and clean groups move by .06
# of that distance. The lowest agreement in 72 clean groups was .69 of the median.
#: The fraction of the median agreement from which an image has its full weight.
KEEP = 0.9
#: The steepness of weights below it.
POWER = 16.0
#: The fraction of the median agreement below which an image is reported as one that does not fit.
OUTLIER = 0.65
#: The number of images from which a group is weighed.
MIN_IMAGES = 3


@dataclass(frozen=True)
class Agreement:
    """The agreement of the images of one group.

    Attributes:
        agreement: For each image, in [0, 1].
        weights: For each image its weight, in [0, 1].
        outliers: Indices of images that do not fit.
    """

    agreement: tuple[float, ...]
    weights: tuple[float, ...]
    outliers: tuple[int, ...]


@torch.no_grad()
def measure_agreement(encoder: Any, states: Tensor, inputs: Any, count: int) -> Agreement:
    """Measure the agreement of one group.

    Args:
        encoder: A :class:`~customize.references.encoder.ReferenceEncoder`.
        states: (1, length, hidden), the states before its final layer.
        inputs: The group's inputs, a batch of one.
        count: Number of images.
    """
    if count < 2:
        return Agreement((1.0,) * count, (1.0,) * count, ())
    one_hot = torch.eye(count)
    none = encoder.read_tokens(states, inputs, torch.zeros(1, count)).float()

    def read(weights: Tensor) -> Tensor:
        # One row after another: the mask alone has (length + num_tokens)^2 entries.
        tokens = [encoder.read_tokens(states, inputs, row[None]).float() for row in weights]
        return torch.cat(tokens) - none

    own, rest = read(one_hot), read(1.0 - one_hot)
    cosine = functional.cosine_similarity(own, rest, dim=-1).mean(dim=1)
    return weigh(cosine.clamp(0.0, 1.0).cpu())


def weigh(agreement: Tensor) -> Agreement:
    """Return weights for the agreement of the images of one group: (images,), in [0, 1]."""
    numbers = tuple(agreement.tolist())
    median = float(agreement.median())
    if len(numbers) < MIN_IMAGES or median <= 0.0:
        return Agreement(numbers, (1.0,) * len(numbers), ())
    weights = (agreement / (KEEP * median)).clamp(0.0, 1.0) ** POWER
    outliers = (agreement < OUTLIER * median).nonzero().flatten().tolist()
    return Agreement(numbers, tuple(weights.tolist()), tuple(outliers))
