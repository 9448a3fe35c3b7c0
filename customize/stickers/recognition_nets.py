"""The nets of the judges of stickers: one finds stickers and reads the ground, one embeds them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from customize.judge_nets import conv_trunk
from customize.stickers.world import GROUND_COLOURS, TEXTURES

COLOURS = tuple(GROUND_COLOURS)
#: Side of the square that is embedded, in pixels, and of its content by the side of the box.
CROP, MARGIN = 48, 1.1

#: Pixels of an image to a cell of the maps.
CELL = 4
#: A typical size of stickers in pixels; sizes are predicted as logarithms by it.
TYPICAL_SIZE = 36.0


class SceneMaps(NamedTuple):
    """What :class:`SceneJudge` says of images; a cell is a square of 4 pixels.

    Attributes:
        centres: Logits that the centre of a sticker is in a cell: (batch, rows, columns).
        squares: Centre x, y and size in pixels of the sticker at a cell: (batch, 3, rows, columns).
        colour: Logits of the colours of the ground: (batch, colours).
        texture: Logits of the textures of the ground: (batch, textures).
    """

    centres: Tensor
    squares: Tensor
    colour: Tensor
    texture: Tensor


class SceneJudge(nn.Module):
    """Finds stickers in images (batch, 3, 64, width) in [-1, 1], and reads their ground."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = conv_trunk((16, 32))
        self.middle = conv_trunk((48,), channels=32)
        self.coarse = conv_trunk((64,), channels=48)
        self.join = nn.Sequential(
            *(nn.Conv2d(32 + 48 + 64, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU()),
            *(nn.Conv2d(48, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU()),
        )
        self.outputs = (1, 3, 1, len(COLOURS), len(TEXTURES))
        self.head = nn.Conv2d(48, sum(self.outputs), 1)

    def forward(self, images: Tensor) -> SceneMaps:
        """Return the maps."""
        fine = self.fine(images)
        middle = self.middle(fine)
        shape = fine.shape[-2:]
        levels = [fine] + [
            F.interpolate(level, size=shape, mode="bilinear", align_corners=False)
            for level in (middle, self.coarse(middle))
        ]
        maps = self.head(self.join(torch.cat(levels, 1))).float()
        centres, squares, attention, colour, texture = maps.split(self.outputs, 1)
        # A ground is read where it is visible.
        weight = attention.flatten(1).softmax(1).unflatten(1, shape)[:, None]
        rows, columns = ((torch.arange(n, device=maps.device) + 0.5) * CELL for n in shape)
        x = columns[None, None] + CELL * squares[:, 0]
        y = rows[None, :, None] + CELL * squares[:, 1]
        size = TYPICAL_SIZE * squares[:, 2].clamp(-3, 3).exp()
        return SceneMaps(
            centres[:, 0],
            torch.stack([x, y, size], 1),
            (weight * colour).sum((2, 3)),
            (weight * texture).sum((2, 3)),
        )


class StickerJudge(nn.Module):
    """Embeds crops (batch, 3, 48, 48) in [-1, 1] as unit vectors (batch, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = conv_trunk((32, 64, 96, 128))
        self.project = nn.Linear(128 * 9, 64)

    def forward(self, crops: Tensor) -> Tensor:
        """Return unit vectors (batch, 64), float32."""
        return F.normalize(self.project(self.trunk(crops).flatten(1)).float(), dim=1)


def crop_squares(images: Tensor, rows: Tensor, squares: Tensor) -> Tensor:
    """Crop squares, with a margin of 5 % on each side, so that all stickers have one size.

    Args:
        images: (batch, 3, height, width).
        rows: (n,) index of the image of each square.
        squares: (n, 3) x and y of the centre, and size, in pixels. What is outside of the image
            repeats its border.

    Returns:
        (n, 3, 48, 48), bilinear.
    """
    height, width = images.shape[-2:]
    steps = (torch.arange(CROP, device=images.device) + 0.5) / CROP - 0.5
    offsets = MARGIN * squares[:, 2:] * steps
    # grid_sample has the borders of the image at -1 and 1.
    x = (squares[:, :1] + offsets) * 2 / width - 1
    y = (squares[:, 1:2] + offsets) * 2 / height - 1
    shape = (len(squares), CROP, CROP)
    grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], -1)
    return F.grid_sample(
        images[rows], grid.to(images.dtype), padding_mode="border", align_corners=False
    )
