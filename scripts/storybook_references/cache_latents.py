"""Latents of drawn images, encoded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from customize.families import Family

#: Batches between two saves.
_SAVE_EVERY = 50


@torch.no_grad()
def cache_latents(path: Path, pixels: Any, family: Family, batch: int = 64) -> Any:
    """Encode images, or go on where a stopped run ended, or read what is there.

    Args:
        path: File for the latents.
        pixels: (groups, images, 64, 64, 3), uint8.
        family: The storybook's models.
        batch: Images at once.

    Returns:
        The mean latents (groups, images, 4, 16, 16), float16.
    """
    progress = path.with_suffix(".count")
    groups, images = pixels.shape[:2]
    total = groups * images
    done = int(progress.read_text()) if progress.exists() else 0
    if done == total:
        return np.load(path, mmap_mode="r")
    shape = (groups, images, 4, 16, 16)
    latents = np.lib.format.open_memmap(path, "r+" if done else "w+", np.float16, shape)
    flat = latents.reshape(total, 4, 16, 16)
    for first in range(done, total, batch):
        rows = range(first, min(first + batch, total))
        drawn = np.stack([pixels[row // images, row % images] for row in rows])
        scaled = torch.tensor(drawn).permute(0, 3, 1, 2) / 127.5 - 1
        flat[rows.start : rows.stop] = family.encode_images(scaled)[0].numpy()
        if first // batch % _SAVE_EVERY == _SAVE_EVERY - 1:
            latents.flush()
            progress.write_text(str(rows.stop))
    latents.flush()
    progress.write_text(str(total))
    return latents
