"""Contact sheets of generated images, and of scenes with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
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


def save_captioned_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], path: Path, columns: int = 5
) -> None:
    """Save RGB images, each enlarged three times above its caption, as one PNG.

    Args:
        images: All 64 pixels high; the widest decides how wide columns are.
        captions: One for each image.
        path: The PNG.
        columns: Images in a row.
    """
    font = ImageFont.load_default(11)
    scale, gap, line = 3, 8, 14
    width = max(image.width for image in images) * scale
    wrapped = [_wrap(caption, font, width) for caption in captions]
    height = 64 * scale + gap + line * max(len(lines) for lines in wrapped)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap), rows * (height + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = index % columns * (width + gap), index // columns * (height + gap)
        enlarged = image.resize((image.width * scale, 64 * scale), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (x, y))
        for number, text in enumerate(lines):
            pen.text((x, y + 64 * scale + 2 + line * number), text, "black", font)
    sheet.save(path)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of a text that are at most `width` pixels wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
