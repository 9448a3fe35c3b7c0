"""The judges of stickers: nets that find stickers in an image and recognise what they show.

A net finds squares of stickers and reads the ground, and another corrects the squares. A third
embeds them, so that subjects, hands and concepts are compared by cosine distances to prototypes,
also those that it was not trained on. All are trained on drawn scenes degraded like generated
images. No model is trained against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from customize.core.precision import full_precision
from customize.errors import DataError
from customize.image_tensors import images_to_tensor
from customize.judge_nets import judge_errors, read_judges, read_tensors
from customize.stickers.prototypes import Prototypes
from customize.stickers.recognition_nets import (
    COLOURS,
    BoxJudge,
    SceneJudge,
    StickerJudge,
    crop_squares,
)
from customize.stickers.world import HEIGHT, TEXTURES

#: Distance to a prototype where no sticker is found.
NOTHING = 2.0

# The score from which a cell is the centre of a sticker.
_MIN_SCORE = 0.4
# Two boxes that share more of their union are one sticker.
_MAX_OVERLAP = 0.4
_CORRECTIONS = 2


@dataclass(frozen=True)
class Box:
    """The square of a sticker in pixels, as :class:`~customize.stickers.world.Sticker` has it."""

    left: float
    top: float
    size: float

    @property
    def centre(self) -> tuple[float, float]:
        """Pixels from the left and the upper border."""
        return self.left + self.size / 2, self.top + self.size / 2


def judge_inputs(images: Sequence[Image.Image]) -> Tensor:
    """Scale n images of one size to a height of 64: (n, 3, 64, width), float32 in [-1, 1]."""
    scaled = [
        image.convert("RGB").resize(
            (round(image.width * HEIGHT / image.height), HEIGHT), Image.Resampling.LANCZOS
        )
        for image in images
    ]
    return images_to_tensor(scaled)


def shared_part(first: Box, second: Box) -> float:
    """Intersection of two squares over their union, in [0, 1]."""
    sides = [
        min(a + first.size, b + second.size) - max(a, b)
        for a, b in ((first.left, second.left), (first.top, second.top))
    ]
    common = max(sides[0], 0.0) * max(sides[1], 0.0)
    return common / (first.size**2 + second.size**2 - common)


def boxes_of(centres: Tensor, squares: Tensor) -> list[Box]:
    """The boxes of one image, from left to right.

    Args:
        centres: Logits (rows, columns).
        squares: x, y and size (3, rows, columns).
    """
    scores = centres.sigmoid()
    highest = F.max_pool2d(scores[None, None], 3, stride=1, padding=1)[0, 0]
    peaks = (scores >= _MIN_SCORE) & (scores == highest)
    found: list[Box] = []
    for index in scores.masked_fill(~peaks, 0).flatten().argsort(descending=True)[: peaks.sum()]:
        box = _box(*squares.flatten(1)[:, index].tolist())
        if all(shared_part(box, other) <= _MAX_OVERLAP for other in found):
            found.append(box)
    return sorted(found, key=lambda box: box.centre)


def _box(x: float, y: float, size: float) -> Box:
    return Box(x - size / 2, y - size / 2, size)


def squares_of(boxes: Sequence[Sequence[Box]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The index of the image (n,), and x, y of the centre and the size (n, 3), of all boxes."""
    rows = [row for row, each in enumerate(boxes) for _ in each]
    squares = [(*box.centre, box.size) for each in boxes for box in each]
    return torch.tensor(rows, device=device), torch.tensor(squares, device=device)


@dataclass(frozen=True, eq=False)
class StickerJudges:
    """The judges in evaluation mode.

    Attributes:
        scenes: Finds stickers and reads grounds.
        boxes: Corrects the squares of stickers.
        stickers: Embedding of stickers.
        prototypes: Of all subjects in the hands of training.
        threshold: Cosine distance to a concept's prototype, at equal error rates, up to which a
            sticker counts as the concept.
    """

    scenes: SceneJudge
    boxes: BoxJudge
    stickers: StickerJudge
    prototypes: Prototypes
    threshold: float

    @full_precision(tf32=True)
    @torch.no_grad()
    def find_stickers(self, images: Tensor) -> list[list[Box]]:
        """Find the stickers of images (n, 3, 64, width) in [-1, 1], from left to right."""
        maps = self.scenes(images)
        pairs = zip(maps.centres.cpu(), maps.squares.cpu(), strict=True)
        found = [boxes_of(centres, squares) for centres, squares in pairs]
        rows, squares = squares_of(found, images.device)
        if not len(rows):
            return found
        for _ in range(_CORRECTIONS):
            squares = self.boxes(images, rows, squares)
        corrected = iter(squares.tolist())
        return [[_box(*next(corrected)) for _ in boxes] for boxes in found]

    @full_precision(tf32=True)
    @torch.no_grad()
    def read_grounds(self, images: Tensor) -> list[tuple[str, str]]:
        """Colour and texture of the ground of images (n, 3, 64, width) in [-1, 1]."""
        maps = self.scenes(images)
        both = zip(maps.colour.argmax(1).tolist(), maps.texture.argmax(1).tolist(), strict=True)
        return [(COLOURS[colour], TEXTURES[texture]) for colour, texture in both]

    @full_precision(tf32=True)
    @torch.no_grad()
    def embed(self, images: Tensor, boxes: Sequence[Sequence[Box]]) -> Tensor:
        """Embed stickers.

        Args:
            images: (n, 3, 64, width) in [-1, 1].
            boxes: Of each image, such as those of :meth:`find_stickers`.

        Returns:
            (boxes, 64) unit vectors, in the order of the boxes.
        """
        rows, squares = squares_of(boxes, images.device)
        if not len(rows):
            return torch.zeros(0, self.stickers.project.out_features, device=images.device)
        return self.stickers(crop_squares(images, rows, squares))

    def prototype(self, references: Tensor) -> Tensor:
        """The normalised mean embedding (64,) of a concept.

        Args:
            references: Images (n, 3, 64, width) in [-1, 1], in each of which the largest sticker
                shows the concept.

        Raises:
            DataError: No image has a sticker.
        """
        found = self.find_stickers(references)
        largest = [[max(boxes, key=lambda box: box.size)] if boxes else [] for boxes in found]
        if not any(largest):
            raise DataError(
                "no sticker is found in the reference images",
                where="references",
                fix="use images in which the concept is on a ground of few colours",
            )
        return F.normalize(self.embed(references, largest).mean(0), dim=0)

    def distance(self, images: Tensor, prototype: Tensor) -> Tensor:
        """Cosine distance to a prototype of the sticker that is nearest to it.

        Args:
            images: (n, 3, 64, width) in [-1, 1].
            prototype: (64,) from :meth:`prototype`.

        Returns:
            (n,) in [0, 2]; 2 for images in which no sticker is found.
        """
        found = self.find_stickers(images)
        distances = 1 - self.embed(images, found) @ prototype
        parts = distances.split([len(boxes) for boxes in found])
        nothing = distances.new_tensor(NOTHING)
        return torch.stack([part.min() if len(part) else nothing for part in parts])


def load_sticker_judges(folder: str | Path) -> StickerJudges:
    """Load the judges that ``scripts/train_storybook.py --world stickers`` writes.

    Raises:
        ConceptError: A file is missing, damaged or from another architecture.
    """
    folder = Path(folder)
    fix = "restore assets/stickers/judges, or train it with scripts/train_storybook.py"
    scenes, boxes, stickers = SceneJudge(), BoxJudge(), StickerJudge()
    with judge_errors("the judges of stickers", folder, fix):
        nets = {"scenes": scenes, "boxes": boxes, "stickers": stickers}
        threshold, content = read_judges(folder, nets)
        vectors = read_tensors(folder / "prototypes.safetensors")["vectors"]
        prototypes = Prototypes(tuple(content["subjects"]), tuple(content["hands"]), vectors)
    return StickerJudges(scenes, boxes, stickers, prototypes, threshold)
