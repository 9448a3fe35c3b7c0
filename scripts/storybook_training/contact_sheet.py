"""Contact sheets of generated images."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor

from customize.image_tensors import tensor_to_images


def save_contact_sheet(images: Tensor, path: Path, columns: int = 10) -> None:
    """Save images (n, 3, 64, 64) in [-1, 1] as one PNG, enlarged to 128 x 128 pixels each."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * 130, rows * 130), "white")
    for index, image in enumerate(tensor_to_images(images)):
        enlarged = image.resize((128, 128), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (index % columns * 130, index // columns * 130))
    sheet.save(path)
