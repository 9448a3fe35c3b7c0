"""Standard pipelines, moved to a device in the dtype that suits it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from customize.errors import ConfigError, PipelineError
from customize.near_names import suggest_names

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")


def load_standard_pipeline(
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


def check_steps(pipe: Any, steps: int | None, where: str = "--steps") -> None:
    """Check that the scheduler has at least as many timesteps as sampling steps are requested.

    Args:
        pipe: The pipeline.
        steps: Sampling steps; None: the pipeline's default.
        where: The flag or setting with the number, for the error.

    Raises:
        ConfigError: The scheduler has fewer timesteps.
    """
    limit = pipe.scheduler.config.get("num_train_timesteps")
    if steps is not None and limit is not None and steps > limit:
        raise ConfigError(
            f"{steps} sampling steps exceed the scheduler's {limit} timesteps",
            where=where,
            fix=f"choose at most {limit}; 25 to 50 are usual",
        )
