"""The demo's pictures: a grid of images by model and prompt, and heat maps of update overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from customize.concepts.adapter import flatten_layers
from customize.core import crosstalk
from customize.demo.experiment import (
    BASE,
    LORA_ALONE,
    LORA_MERGED,
    NAMES,
    ORTHOGONAL_ALONE,
    ORTHOGONAL_MERGED,
    PAIRS,
    REFERENCES,
    DrawnImages,
    pair_prompts,
)
from customize.evaluation.storybook_rates import evaluation_prompts
from customize.image_tensors import tensor_to_images
from customize.storybook.example_concepts import bundled_concept
from customize.storybook.judges import judge_inputs

if TYPE_CHECKING:
    from customize.concepts.types import Concept

IMAGE_SIZE, MARGIN, LABEL_WIDTH, HEADER_HEIGHT = 80, 4, 150, 64  # pixels
#: The models of the grid from top to bottom; those that were not drawn are left out.
GRID_ROWS = (ORTHOGONAL_ALONE, ORTHOGONAL_MERGED, REFERENCES, BASE, LORA_ALONE, LORA_MERGED)


def draw_grid(drawn: Mapping[str, DrawnImages], per_concept: int = 4) -> Image.Image:
    """All models on the same prompts: one row per model, `per_concept` images per concept."""
    font = ImageFont.load_default(size=13)
    cell = IMAGE_SIZE + MARGIN
    columns = len(NAMES) * per_concept + 2 * len(PAIRS)
    models = [model for model in GRID_ROWS if model in drawn]
    height = IMAGE_SIZE + 40 + HEADER_HEIGHT + len(models) * cell
    sheet = Image.new("RGB", (LABEL_WIDTH + columns * cell, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((6, 30 + IMAGE_SIZE / 2 - 14), "five pictures\nto learn from", "black", font)
    for index, name in enumerate(NAMES):
        references = judge_inputs(bundled_concept(name).images())
        pen.text((LABEL_WIDTH + index * 6 * cell, 4), f"<{name}>", "black", font)
        for k, tensor in enumerate(references):
            _paste(sheet, tensor, index * 6 + k, 24)
    top = IMAGE_SIZE + 36
    concept_prompts = [evaluation_prompts(f"<{name}>")[:per_concept] for name in NAMES]
    prompts_of_pairs = [pair_prompts((f"<{a}>", f"<{b}>")) for a, b in PAIRS]
    per_pair = len(prompts_of_pairs[0])  # of the first seed
    prompts = [prompt for group in (*concept_prompts, *prompts_of_pairs) for prompt in group]
    for column, prompt in enumerate(prompts):
        text = wrap_text(prompt.removeprefix("a photo of ").replace("wearing ", ""), font)
        pen.multiline_text((LABEL_WIDTH + column * cell, top), text, "black", font, spacing=1)
    for index, model in enumerate(models):
        y = top + HEADER_HEIGHT + index * cell
        label = model.replace(", ", ",\n")
        pen.text((6, y + IMAGE_SIZE / 2 - 8 * (1 + label.count("\n"))), label, "black", font)
        images = [
            *(tensor for name in NAMES for tensor in drawn[model].concepts[name][:per_concept]),
            *(tensor for pair in PAIRS for tensor in drawn[model].pairs.get(pair, ())[:per_pair]),
        ]
        for column, tensor in enumerate(images):
            _paste(sheet, tensor, column, y)
    return sheet


def _paste(sheet: Image.Image, tensor: Tensor, column: int, top: int) -> None:
    (image,) = tensor_to_images(tensor[None])
    small = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    sheet.paste(small, (LABEL_WIDTH + column * (IMAGE_SIZE + MARGIN), top))


def draw_captioned_rows(
    rows: Sequence[Sequence[tuple[Image.Image, str]]], side: int = 192
) -> Image.Image:
    """Square images in rows, each scaled to the same side, with a text below.

    Args:
        rows: Images and texts from left to right.
        side: Of each image on the sheet in pixels.
    """
    font, margin, line = ImageFont.load_default(size=13), 12, 16
    texts = [[wrap_text(text, font, side) for _, text in row] for row in rows]
    heights = [side + margin + line * (1 + max(text.count("\n") for text in row)) for row in texts]
    width = max(map(len, rows)) * (side + margin) + margin
    sheet = Image.new("RGB", (width, sum(heights) + margin), "white")
    pen, top = ImageDraw.Draw(sheet), margin
    for row, wrapped, height in zip(rows, texts, heights, strict=True):
        for column, ((image, _), text) in enumerate(zip(row, wrapped, strict=True)):
            left = margin + column * (side + margin)
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (left, top))
            pen.multiline_text((left, top + side + 2), text, "black", font, spacing=1)
        top += height
    return sheet


def wrap_text(text: str, font: Any, width: float = IMAGE_SIZE) -> str:
    """Break a text into lines of at most ``width`` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def plot_overlap(concepts: Mapping[str, Mapping[str, Concept]], path: Path) -> None:
    """Save heat maps of the overlap ||dW_i dW_j^T|| / (||dW_i|| ||dW_j||) for both methods."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    titles = {"concepts": "Orthogonal Adaptation", "ordinary": "ordinary LoRA"}
    for axes, (subfolder, trained) in zip(figure.subplots(1, 2), concepts.items(), strict=True):
        updates = {name: flatten_layers(concept.updates) for name, concept in trained.items()}
        values = crosstalk.overlap_matrix(updates).numpy()
        image = axes.imshow(values, vmin=0, vmax=1, cmap="magma")
        axes.set_title(titles[subfolder])
        axes.set_xticks(range(len(trained)), trained)
        axes.set_yticks(range(len(trained)), trained)
        for i, j in product(range(len(trained)), repeat=2):
            color = "white" if values[i, j] < 0.6 else "black"
            axes.text(j, i, f"{values[i, j]:.2f}", ha="center", color=color)
    figure.colorbar(image, ax=figure.axes, label="overlap of the updates")
    figure.savefig(path, dpi=120)
