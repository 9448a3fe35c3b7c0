"""Conversion between PIL images and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor


def images_to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Convert RGB images of one size to a tensor.

    Args:
        images: Images of mode RGB.

    Returns:
        (batch, 3, height, width), float32 in [-1, 1], in channels-last memory format.
    """
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def tensor_to_images(pixels: Tensor) -> list[Image.Image]:
    """Convert a tensor to RGB images, rounding to 8 bits.

    Args:
        pixels: (batch, 3, height, width), floating-point; values outside of [-1, 1] are clamped.
    """
    import torch

    values = ((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(array.numpy()) for array in values.permute(0, 2, 3, 1).cpu()]
