"""Loading of base and rewards into a renderer of rewritings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from customize.base.standard_pipeline import check_steps, load_standard_pipeline
from customize.errors import ConfigError
from customize.evaluation.rewards.registry import find_reward, load_reward
from customize.evaluation.rewards.weighted_sum import WeightedSum
from customize.near_names import did_you_mean
from customize.training.rewriting.picture_renderer import PictureRenderer


@dataclass(frozen=True)
class RendererSettings:
    """How rewritings are drawn and scored.

    Attributes:
        base: Base pipeline: a folder, a hub id or a .safetensors checkpoint.
        weights: Name of a reward -> its weight.
        floors: Name of a reward -> its least score.
        models: Name of a reward -> folder or hub id of its model; others have the usual one.
        seeds: Seeds of the pictures of each rewriting.
        steps: Sampling steps; None: the pipeline's.
        guidance: Guidance scale; None: the pipeline's.
        dtype: Name of the base's dtype; None: float32 on a CPU, else float16.
    """

    base: str
    weights: Mapping[str, float]
    floors: Mapping[str, float]
    models: Mapping[str, str]
    seeds: Sequence[int] = (0, 1)
    steps: int | None = None
    guidance: float | None = None
    dtype: str | None = None


def load_renderer(
    settings: RendererSettings, folder: Path, device: torch.device, where_steps: str = "--steps"
) -> PictureRenderer:
    """Load rewards and base, and return the renderer, which stores pictures in a folder.

    Args:
        settings: How rewritings are drawn and scored.
        folder: Folder of the pictures; it is made once all models are loaded.
        device: Device of base and rewards.
        where_steps: The flag or setting of the sampling steps, for an error.

    Raises:
        ConfigError: A name is unknown, a model or floor belongs to no weight, or there are more
            steps than the scheduler has.
        PipelineError: A model cannot be loaded.
    """
    weighted = load_rewards(settings.weights, settings.floors, settings.models, device)
    pipe = load_standard_pipeline(settings.base, device, settings.dtype)
    check_steps(pipe, settings.steps, where_steps)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance}
    return PictureRenderer(
        pipe,
        weighted,
        folder,
        settings.seeds,
        {name: value for name, value in call.items() if value is not None},
        f"{settings.base} {pipe.dtype}",
    )


def load_rewards(
    weights: Mapping[str, float],
    floors: Mapping[str, float],
    models: Mapping[str, str],
    device: torch.device,
) -> WeightedSum:
    """Load the rewards of a weighted sum.

    Raises:
        ConfigError: A name is unknown, or a model or floor belongs to no weight.
        PipelineError: A model cannot be loaded.
    """
    for name in weights:
        find_reward(name)
    for where, given in (("reward model", models), ("floor", floors)):
        for name in given:
            if name not in weights:
                raise ConfigError(
                    f"the {where} {name}={given[name]} belongs to no reward",
                    where=f"{where} {name}",
                    fix=did_you_mean(name, weights) or f"add the reward {name}=1",
                )
    loaded = {name: load_reward(name, models.get(name), device) for name in weights}
    return WeightedSum(weights, floors, loaded)
