"""Aspect-ratio buckets: image sizes of about the area of the square resolution.

As in the training of Stable Diffusion XL (arXiv 2307.01952, appendix I): sides are multiples of a
step, 64 pixels at a resolution of 1024; areas are at most the square's; ratios from 1:4 to 4:1.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from customize.training.data.dataset import Size

_STEPS_PER_SIDE = 16


def bucket_sizes(resolution: int, multiple: int) -> list[Size]:
    """Return all bucket sizes (width, height) in ascending order, including the square.

    Args:
        resolution: Side of the square in pixels, a multiple of ``multiple``.
        multiple: Number that the model requires sides to be multiples of.
    """
    step = multiple * max(1, round(Fraction(resolution, _STEPS_PER_SIDE * multiple)))
    sizes = {(resolution, resolution)}
    for width in range(-(-resolution // 2 // step) * step, resolution + 1, step):
        height = min(resolution**2 // width, 2 * resolution) // step * step
        sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> Size:
    """Return the bucket with the nearest aspect ratio; among equals the largest."""
    return min(sizes, key=lambda bucket: (_ratio_factor(size, bucket), -bucket[0] * bucket[1]))


def _ratio_factor(a: Size, b: Size) -> float:
    """Return the factor between two aspect ratios, 1 or more."""
    across, down = a[0] * b[1], a[1] * b[0]
    return max(across, down) / min(across, down)
