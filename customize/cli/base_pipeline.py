"""The base pipeline of a command: loading it, and the Python lines that load it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from customize.errors import ConfigError, PipelineError
from customize.near_names import suggest_names

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")


def load_base_pipeline(
    base: str,
    device: torch.device,
    dtype: str | None = None,
    *,
    move: bool = True,
    variant: str | None = None,
    config: str | None = None,
) -> Any:
    """Load a complete diffusers pipeline from safetensors files.

    Args:
        base: Folder, hub id or single .safetensors file.
        device: Device that the pipeline will run on.
        dtype: One of :data:`DTYPES`; None: float32 on a CPU, else float16.
        move: Whether to move the pipeline to the device; a memory plan needs it on the CPU.
        variant: Variant of the weight files, such as ``"fp16"``.
        config: Folder or hub id of the pipeline whose configuration a single file uses.

    Raises:
        ConfigError: The dtype, the variant or the configuration is invalid.
        PipelineError: The base cannot be loaded, or exists in diffusers as a modular pipeline only.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"unknown dtype {dtype}", where="--dtype", fix=suggest_names(dtype, DTYPES)
        )
    import torch

    from customize.base.load_pipeline import load_pipeline
    from customize.families import family_of

    hide_loading_bars()
    name = dtype or ("float32" if device.type == "cpu" else "float16")
    pipe = load_pipeline(base, getattr(torch, name), variant=variant, config=config)
    if family_of(pipe.components).modular_only:
        raise PipelineError(
            "commands support standard pipelines only, and diffusers implements this model as a "
            "modular pipeline",
            where=f"base: {base}",
            fix="use it in Python, with the lines of the concept's README.md",
        )
    return pipe.to(device) if move else pipe


def hide_loading_bars() -> None:
    """Hide the progress bars of diffusers and transformers for a pipeline's files."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def check_steps(pipe: Any, steps: int | None) -> None:
    """Check that the scheduler has at least as many timesteps as sampling steps are requested.

    Raises:
        ConfigError: The scheduler has fewer timesteps.
    """
    limit = pipe.scheduler.config.get("num_train_timesteps")
    if steps is not None and limit is not None and steps > limit:
        raise ConfigError(
            f"{steps} sampling steps exceed the scheduler's {limit} timesteps",
            where="--steps",
            fix=f"choose at most {limit}; 25 to 50 are usual",
        )


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
