"""The base pipeline of a command: loading it, and the Python lines that load it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from customize.base.standard_pipeline import load_standard_pipeline

if TYPE_CHECKING:
    import torch


def load_base_pipeline(
    base: str, device: torch.device, dtype: str | None = None, **kwargs: Any
) -> Any:
    """Load a base pipeline without progress bars.

    Args and errors: see :func:`customize.base.standard_pipeline.load_standard_pipeline`.
    """
    hide_loading_bars()
    return load_standard_pipeline(base, device, dtype, **kwargs)


def hide_loading_bars() -> None:
    """Hide the progress bars of diffusers and transformers for a pipeline's files."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def python_snippet(
    base: str, concepts: Sequence[str], triggers: Sequence[str], family: str, output: str
) -> str:
    """Return Python lines that load a base with concepts and generate an image.

    Args:
        base: Folder or hub id of the pipeline.
        concepts: Sources for ``load_custom``; empty if the base contains the concepts.
        triggers: Triggers in the prompt.
        family: Name of the model family.
        output: Attribute of the pipeline's output, "images" or "frames".
    """
    from customize.concepts.io import model_card

    opening = model_card.base_loading_code(family, json.dumps(base))
    drawing = model_card.inference_code(family, "a photo of " + " and ".join(triggers), output)
    if not concepts:
        return "\n".join([*opening, drawing])
    arguments = [json.dumps(concept) for concept in concepts]
    loading = f"pipe.load_custom({', '.join(arguments)})"
    return "\n".join(["import customize", *opening, loading, drawing])
