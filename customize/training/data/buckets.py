"""Sizes of training pictures by their aspect ratios, of about as many pixels as the square.

As Stable Diffusion XL was trained (arXiv 2307.01952, appendix I): sides in steps, areas at most
the square's, ratios from 1:4 to 4:1. There the steps are 64 pixels at a resolution of 1024.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from customize.training.data.dataset import Size

_STEPS = 16  # in the side of the square


def bucket_sizes(resolution: int, multiple: int) -> list[Size]:
    """All (width, height), each once, ascending; the square of this resolution is among them.

    Args:
        resolution: the square's side in pixels, a multiple of ``multiple``.
        multiple: sides are multiples of this, too: of what the model takes.
    """
    step = multiple * max(1, round(Fraction(resolution, _STEPS * multiple)))
    found = {(resolution, resolution)}
    for width in range(-(-resolution // 2 // step) * step, resolution + 1, step):
        height = min(resolution**2 // width, 2 * resolution) // step * step
        found |= {(width, height), (height, width)}
    return sorted(found)


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> Size:
    """The one whose aspect ratio is nearest to that of a picture; of several the largest."""
    return min(sizes, key=lambda each: (_apart(size, each), -each[0] * each[1]))


def _apart(a: Size, b: Size) -> float:
    """By which factor the ratios differ: what of the one is cropped to get the other."""
    across, down = a[0] * b[1], a[1] * b[0]
    return max(across, down) / min(across, down)
