"""Latents of the drawn groups, encoded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from customize.families import Family

from .render_groups import IMAGES, Groups


@torch.no_grad()
def cache_latents(
    folder: Path, groups: Groups, family: Family, batch: int = 64
) -> np.ndarray[Any, Any]:
    """Return the mean latents (groups, images, 4, 16, 16), float16; resumes a stopped run."""
    path, progress = folder / "latents.npy", folder / "latents.count"
    shape = (len(groups.identities), IMAGES, 4, 16, 16)
    total = shape[0] * IMAGES
    done = int(progress.read_text()) if progress.exists() else 0
    latents = np.lib.format.open_memmap(path, "r+" if done else "w+", np.float16, shape)
    flat, pixels = latents.reshape(total, 4, 16, 16), groups.pixels.reshape(total, 64, 64, 3)
    for first in range(done, total, batch):
        images = torch.tensor(pixels[first : first + batch]).permute(0, 3, 1, 2)
        flat[first : first + batch] = family.encode_images(images / 127.5 - 1)[0].numpy()
        if first // batch % 50 == 49:
            latents.flush()
            progress.write_text(str(first + batch))
    latents.flush()
    progress.write_text(str(total))
    return latents
