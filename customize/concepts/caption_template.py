"""The caption that a concept was trained with, which other texts are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: The default of :attr:`customize.TrainConfig.caption`.
DEFAULT_CAPTION = "a photo of {}"
# Longer ones leave no room for contexts in the 77 tokens of CLIP.
_MAX_LENGTH = 120


def caption_template(training: Mapping[str, Any]) -> str:
    """The caption of a concept's training, with {} for its words.

    Args:
        training: Facts about the training, as concept files have them. Those of other programs, and
            templates that are long or have no {}, give :data:`DEFAULT_CAPTION`.
    """
    settings = training.get("settings")
    caption = settings.get("caption") if isinstance(settings, Mapping) else None
    if not isinstance(caption, str) or len(caption) > _MAX_LENGTH or caption.count("{}") != 1:
        return DEFAULT_CAPTION
    return " ".join(caption.split())


def prefix_of(template: str) -> str:
    """What a template has before {}; that of the default if a concept comes first."""
    prefix, _, _ = template.partition("{}")
    return prefix or prefix_of(DEFAULT_CAPTION)
