"""The nets of the judges of stickers.

One finds stickers and reads the ground, one corrects their squares, and one embeds them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from customize.judge_nets import conv_trunk
from customize.stickers.world import GROUND_COLOURS, TEXTURES

COLOURS = tuple(GROUND_COLOURS)
#: Side of crops in pixels.
CROP = 48
#: Side of what a crop shows, by the size of the sticker: to embed it, and to correct its square.
MARGIN, WIDE_MARGIN = 1.1, 1.5

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
        maps = self.head(self.join(joined_levels(fine, middle, self.coarse(middle)))).float()
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


class BoxJudge(nn.Module):
    """Corrects the squares of stickers, around each of which it sees a quarter of the size more.

    An edge is the mean column or row under a softmax, which is more exact than a regression.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fine = conv_trunk((16,))
        self.middle = conv_trunk((32,), channels=16)
        self.coarse = conv_trunk((64,), channels=32)
        self.join = nn.Sequential(
            *(nn.Conv2d(16 + 32 + 64, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        )
        self.head = nn.Conv2d(32, 4, 1)

    def edges(self, images: Tensor, rows: Tensor, squares: Tensor) -> Tensor:
        """Left, top, right and lower edge of what is visible of stickers, in pixels.

        Args:
            images: (batch, 3, height, width) in [-1, 1].
            rows: (n,) index of the image of each square.
            squares: (n, 3) x and y of the centre, and size, in pixels.

        Returns:
            (n, 4), float32.
        """
        crops = crop_squares(images, rows, squares, WIDE_MARGIN)
        # A third faster on CPUs, for channels this few.
        fine = self.fine(crops.contiguous(memory_format=torch.channels_last))
        middle = self.middle(fine)
        maps = self.head(self.join(joined_levels(fine, middle, self.coarse(middle)))).float()
        cells = maps.shape[-1]
        steps = WIDE_MARGIN * ((torch.arange(cells, device=maps.device) + 0.5) / cells - 0.5)
        across, down = maps[:, 0::2].logsumexp(2), maps[:, 1::2].logsumexp(3)
        x, y = ((each.softmax(2) * steps).sum(2) for each in (across, down))
        offsets = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)
        return squares[:, :2].repeat(1, 2) + squares[:, 2:] * offsets

    def forward(self, images: Tensor, rows: Tensor, squares: Tensor) -> Tensor:
        """Return better squares (n, 3), float32; arguments as in :meth:`edges`."""
        first, last = self.edges(images, rows, squares).split(2, 1)
        size = (last - first).amax(1, keepdim=True).clamp(min=1)
        return torch.cat([(first + last) / 2, size], 1)


def joined_levels(fine: Tensor, *others: Tensor) -> Tensor:
    """Concatenate maps of several resolutions at the first one: (batch, all channels, h, w)."""
    scaled = [
        F.interpolate(each, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        for each in others
    ]
    return torch.cat([fine, *scaled], 1)


def crop_squares(images: Tensor, rows: Tensor, squares: Tensor, margin: float = MARGIN) -> Tensor:
    """Crop squares, so that all stickers have one size.

    Args:
        images: (batch, 3, height, width).
        rows: (n,) index of the image of each square.
        squares: (n, 3) x and y of the centre, and size, in pixels. What is outside of the image
            repeats its border.
        margin: Side of what is cropped, by the size.

    Returns:
        (n, 3, 48, 48), bilinear.
    """
    height, width = images.shape[-2:]
    steps = (torch.arange(CROP, device=images.device) + 0.5) / CROP - 0.5
    offsets = margin * squares[:, 2:] * steps
    # grid_sample has the borders of the image at -1 and 1.
    x = (squares[:, :1] + offsets) * 2 / width - 1
    y = (squares[:, 1:2] + offsets) * 2 / height - 1
    shape = (len(squares), CROP, CROP)
    grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], -1)
    return F.grid_sample(
        images[rows], grid.to(images.dtype), padding_mode="border", align_corners=False
    )
