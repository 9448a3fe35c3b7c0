"""Prototypes of all subjects in several hands: what embeddings of stickers are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from customize.core.precision import full_precision
from customize.image_tensors import images_to_tensor
from customize.stickers.artwork import Artwork, Subject
from customize.stickers.recognition_nets import StickerJudge, crop_squares
from customize.stickers.scene_drawing import draw_scene
from customize.stickers.world import GROUND_COLOURS, HEIGHT, Scene, Sticker, random_ground

# Sizes in pixels at which a picture is drawn for its prototype, each on another ground.
_SIZES = (26, 34, 42, 50)
_SEED = 61_000


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Mean embeddings of the pictures of subjects.

    Attributes:
        subjects: Ids.
        hands: Names.
        vectors: Unit vectors (subjects, hands, width), float32.

    Raises:
        ValueError: The vectors have another shape.
    """

    subjects: tuple[str, ...]
    hands: tuple[str, ...]
    vectors: Tensor

    def __post_init__(self) -> None:
        expected = (len(self.subjects), len(self.hands))
        if self.vectors.ndim != 3 or tuple(self.vectors.shape[:2]) != expected:
            raise ValueError(
                f"prototypes of {expected[0]} subjects in {expected[1]} hands have the shape"
                f" {tuple(self.vectors.shape)}"
            )

    @full_precision(tf32=True)
    def similarity(self, vectors: Tensor) -> Tensor:
        """Cosine similarity of unit vectors (n, width): (n, subjects, hands)."""
        return torch.einsum("nd,shd->nsh", vectors, self.vectors.to(vectors))

    def recognise(self, vectors: Tensor) -> list[tuple[str, str]]:
        """Subject id and hand of the nearest prototype to each of the unit vectors (n, width)."""
        best = self.similarity(vectors).flatten(1).argmax(1).tolist()
        pairs = (divmod(index, len(self.hands)) for index in best)
        return [(self.subjects[subject], self.hands[hand]) for subject, hand in pairs]

    def joined(self, other: Prototypes) -> Prototypes:
        """These and those of other hands of the same subjects.

        Raises:
            ValueError: The subjects differ.
        """
        if self.subjects != other.subjects:
            raise ValueError("prototypes of other subjects cannot be joined")
        vectors = torch.cat([self.vectors, other.vectors.to(self.vectors)], 1)
        return Prototypes(self.subjects, (*self.hands, *other.hands), vectors)


def prototype_scenes(subject: Subject, hand: str, seed: int) -> list[Scene]:
    """Scenes of one sticker in the middle, each of another size and ground."""
    rng = np.random.default_rng((_SEED, seed))
    colours = rng.permutation(list(GROUND_COLOURS))
    return [
        Scene(
            (Sticker(subject, hand, (HEIGHT - size) // 2, (HEIGHT - size) // 2, size),),
            random_ground(rng, str(colours[k])),
        )
        for k, size in enumerate(_SIZES)
    ]


@full_precision(tf32=True)
@torch.no_grad()
def compute_prototypes(
    judge: StickerJudge,
    artwork: Artwork,
    hands: Sequence[str],
    subjects: Sequence[Subject] | None = None,
) -> Prototypes:
    """Draw the artwork and embed it.

    Args:
        judge: Embeds the pictures, in evaluation mode.
        artwork: The pictures.
        hands: Names.
        subjects: None: all.

    Raises:
        DataError: A picture is missing or unreadable.
    """
    subjects = artwork.subjects if subjects is None else subjects
    squares = torch.tensor([(HEIGHT / 2, HEIGHT / 2, float(size)) for size in _SIZES])
    vectors = []
    for hand in hands:
        rows = []
        for number, subject in enumerate(subjects):
            scenes = prototype_scenes(subject, hand, number)
            images = images_to_tensor([draw_scene(scene, artwork) for scene in scenes])
            crops = crop_squares(images, torch.arange(len(scenes)), squares)
            rows.append(judge(crops).mean(0))
        vectors.append(torch.stack(rows))
    return Prototypes(
        tuple(subject.id for subject in subjects),
        tuple(hands),
        F.normalize(torch.stack(vectors, 1), dim=2),
    )
