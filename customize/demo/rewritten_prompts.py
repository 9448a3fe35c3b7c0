"""Three prompts of the demo, drawn as they are written and as the bundled model rewrites them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from customize.demo.figures import wrap_text
from customize.evaluation.storybook_rates import draw_prompts
from customize.image_tensors import tensor_to_images
from customize.storybook.bundled_assets import rewriter_folder

if TYPE_CHECKING:
    from torch import Tensor

#: Words that the base never saw, a mistake, and an odd order.
PROMPTS = (
    "crimson kitty wih spectacles at the seaside",
    "an automobile in outer space, violet",
    "woods, a bunny wearing a muffler, emerald",
)
SEED = 7
_SIDE, _MARGIN, _TEXT = 192, 12, 44  # pixels


@dataclass(frozen=True)
class RewrittenPrompts:
    """The prompts, their rewritings, and both drawn with the same seeds.

    Attributes:
        rewritings: The rewriting of each of :data:`PROMPTS`.
        before: (3, 3, 64, 64) in [-1, 1], the prompts as they are.
        after: The same of the rewritings.
    """

    rewritings: tuple[str, ...]
    before: Tensor
    after: Tensor


def draw_rewritten_prompts(pipe: Any) -> RewrittenPrompts | None:
    """Draw the prompts before and after; None if no language model is bundled."""
    folder = rewriter_folder()
    if folder is None:
        return None
    from customize.stages.rewrite import Rewriter

    rewritings = [each.text for each in Rewriter.from_pretrained(folder).rewrite(PROMPTS)]
    return RewrittenPrompts(
        tuple(rewritings), draw_prompts(pipe, PROMPTS, SEED), draw_prompts(pipe, rewritings, SEED)
    )


def draw_sheet(drawn: RewrittenPrompts) -> Image.Image:
    """The prompts in columns: as they are above, rewritten below."""
    font = ImageFont.load_default(size=13)
    width = len(PROMPTS) * (_SIDE + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, 2 * (_SIDE + _TEXT) + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (texts, images) in enumerate(
        ((PROMPTS, drawn.before), (drawn.rewritings, drawn.after))
    ):
        top = row * (_SIDE + _TEXT)
        for column, (text, image) in enumerate(zip(texts, tensor_to_images(images), strict=True)):
            left = _MARGIN + column * (_SIDE + _MARGIN)
            pen.multiline_text(
                (left, top + 6), wrap_text(text, font, _SIDE), "black", font, spacing=1
            )
            large = image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            sheet.paste(large, (left, top + _TEXT))
    return sheet
