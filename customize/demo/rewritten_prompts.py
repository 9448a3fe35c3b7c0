"""Three prompts of the demo, drawn as they are written and as the bundled model rewrites them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from customize.demo.figures import draw_captioned_rows
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
    rows = ((drawn.before, PROMPTS), (drawn.after, drawn.rewritings))
    return draw_captioned_rows(
        [[*zip(tensor_to_images(images), texts, strict=True)] for images, texts in rows]
    )
