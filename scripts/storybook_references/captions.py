"""Captions of targets: class, accessory and background, never what the references show."""

from __future__ import annotations

from customize.storybook.caption_grammar import ACCESSORY_PHRASES, BACKGROUND_PHRASES


def class_caption(kind: str, accessory: str | None, background: str | None) -> str:
    """The caption of a thing of a class; None leaves a part out, which a reference then gives."""
    parts = [f"a photo of a {kind}"]
    if accessory not in (None, "none"):
        parts.append(ACCESSORY_PHRASES[str(accessory)])
    if background is not None:
        parts.append(BACKGROUND_PHRASES[background])
    return " ".join(parts)
