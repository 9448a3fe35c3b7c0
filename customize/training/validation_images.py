"""Pictures from the model in training: the live denoiser, cached or freshly encoded prompts.

No pipeline is built and nothing is loaded. The scheduler is the base's own, copied, so neither it
nor any random stream of the training changes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from customize.atomic import write_atomic
from customize.concepts.library.library import TRIGGER_PATTERN
from customize.errors import PipelineError, storage_error
from customize.families.family import Family
from customize.families.sampling import sample
from customize.image_tensors import tensor_to_images
from customize.near_names import did_you_mean
from customize.training.config import TrainConfig
from customize.training.data.batches import stream_seed
from customize.training.field_values import contains_trigger
from customize.training.finite_checks import check_sampled
from customize.training.run import Run


def warn_about_triggers(family: Family, prompts: Sequence[str], triggers: Sequence[str]) -> None:
    """Warn of validation prompts that would not show what is learned.

    Args:
        prompts: the validation prompts of all concepts of the run.
        triggers: of these concepts.
    """
    if not prompts:
        return
    for trigger in triggers:
        if not any(contains_trigger(prompt, trigger) for prompt in prompts):
            warnings.warn(
                f"no validation prompt has the trigger {trigger}, so they do not show what is "
                "learned",
                stacklevel=2,
            )
    tokenizers = [each.tokenizer for each in family.token_dictionaries()]
    own = {name for tokenizer in tokenizers for name in tokenizer.get_added_vocab()}
    tokens = (
        token for prompt in prompts for token in re.findall(TRIGGER_PATTERN, prompt, re.IGNORECASE)
    )
    for token in dict.fromkeys(tokens):
        if token.lower() not in triggers and token not in own:
            hint = did_you_mean(token, triggers)
            warnings.warn(
                f"a validation prompt names {token}, and the trigger is {' or '.join(triggers)}"
                + (f"; {hint}" if hint else ""),
                stacklevel=2,
            )


class ValidationImages:
    """Draws the validation prompts of a concept, each from the same noise every time.

    Attributes:
        last: the pictures drawn latest.
    """

    def __init__(self, config: TrainConfig, run: Run) -> None:
        self.config, self.run = config, run
        self.last: list[Image.Image] = []

    def due(self, step: int) -> bool:
        """Whether this process is to draw after this step."""
        config = self.config
        if not config.validation_prompts or not self.run.accelerator.is_main_process:
            return False
        every = config.validation_every
        return step == config.steps or (every > 0 and step % every == 0)

    def draw_if_due(self, step: int) -> None:
        """:meth:`draw` where this process is to."""
        if self.due(step):
            self.draw(step)

    @torch.no_grad()
    def draw(self, step: int) -> None:
        """Draw the prompts, save them in a row, and hand them to the tracker.

        Raises:
            StorageError: the file cannot be written.
        """
        prompts, seed = self.config.validation_prompts, self.config.seed
        with self.run.autocast():
            asked = self.run.encode(prompts)
            empty = self.run.family.unconditional(self.run.encode([""]))
        try:
            # One at a time, which needs no more memory than training does.
            self.last = [
                draw_images(
                    self.run.family,
                    {k: v[i : i + 1] for k, v in asked.items()},
                    empty,
                    self.run.images.shape,
                    steps=self.config.validation_steps,
                    guidance=guidance_scale(self.config, self.run.family),
                    seeds=[stream_seed(seed, "validation", i)],
                    autocast=self.run.autocast,
                )[0]
                for i in range(len(prompts))
            ]
        except PipelineError as error:  # the loss decides whether the run goes on
            warnings.warn(f"no validation pictures at step {step}: {error}", stacklevel=2)
            return
        save_image_row(self.last, self.config.output / "validation" / f"step-{step}.png")
        log_images(self.run.accelerator.trackers, self.last, prompts, step)


def guidance_scale(config: TrainConfig, family: Family) -> float:
    """The guidance scale of pictures that a run draws."""
    asked = config.validation_guidance
    return family.default_guidance if asked is None else asked


@torch.no_grad()
def draw_images(
    family: Family,
    conditions: Mapping[str, Tensor],
    empty: Mapping[str, Tensor],
    shape: Sequence[int],
    *,
    steps: int,
    guidance: float,
    seeds: Sequence[int],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Image.Image]:
    """Draw one picture for each row of the conditions.

    Arguments as :func:`customize.families.sampling.sample`; the seeds fix the sampler's noise, too.
    """
    latents = sample(
        family,
        conditions,
        empty,
        shape,
        steps=steps,
        guidance=guidance,
        seeds=seeds,
        sampler_seed=stream_seed("sampler", *seeds),
        autocast=autocast,
    )
    return decode_images(family, latents)


def decode_images(family: Family, latents: Tensor) -> list[Image.Image]:
    """Decode latents on their device; the autoencoder goes back to where it was.

    Raises:
        PipelineError: they are not finite, or what the autoencoder makes of them.
    """
    check_sampled(family, latents, family.denoiser_key)
    vae, home = family.vae, family.vae.device
    vae.to(latents.device)
    try:
        pixels = torch.cat([family.decode_latents(one[None]) for one in latents])
    finally:
        vae.to(home)
    check_sampled(family, pixels, "vae")
    return tensor_to_images(pixels)


def save_image_row(pictures: Sequence[Image.Image], path: Path) -> None:
    """Save pictures of one size side by side.

    Raises:
        StorageError: the file cannot be written.
    """
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for number, picture in enumerate(pictures):
        row.paste(picture, (number * width, 0))
    write_png(row, path, "validation pictures")


def write_png(picture: Image.Image, path: Path, what: str) -> None:
    """Write a picture atomically, with the folders that it is in.

    Args:
        what: the name of such pictures, for the error.

    Raises:
        StorageError: the file cannot be written.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise storage_error(error, path, what, "allow writing there, then run again") from error


def log_images(
    trackers: Sequence[Any], pictures: Sequence[Image.Image], prompts: Sequence[str], step: int
) -> None:
    """Hand pictures to those of accelerate's trackers that take them."""
    import numpy as np

    for tracker in trackers:
        if not hasattr(tracker, "log_images"):
            continue
        for prompt, picture in zip(prompts, pictures, strict=True):
            if tracker.name == "tensorboard":
                array = np.asarray(picture)[None]
                tracker.log_images({prompt: array}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({prompt: [picture]}, step=step)
