"""Class images for prior preservation (DreamBooth, arXiv 2208.12242), drawn by the base model.

They are drawn before any adapter is attached, with the sampling steps and guidance of validation
images.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from customize.families.pipeline_components import class_name
from customize.training.config import TrainConfig
from customize.training.data.batches import stream_seed
from customize.training.data.dataset import TrainingImage, read_training_images
from customize.training.prepare_base import move_to_device
from customize.training.run import Run
from customize.training.validation_images import draw_images, guidance_scale, write_png

_CHUNK = 4  # images per batch; fixed, so that a repeated run draws the same images


def load_or_draw_class_images(run: Run, config: TrainConfig) -> list[TrainingImage]:
    """Load a concept's class images after drawing the missing ones.

    Concepts of one class share the images, in the output folder of the first of them. The name of
    the images' folder is a hash of all they depend on. All models are on the device afterwards.

    Args:
        run: The run, with the base model.
        config: Settings of the concept.

    Raises:
        StorageError: An image cannot be written; the images before it are kept.
    """
    same_class = (
        other
        for other in run.configs
        if other.prior_images is None and other.class_prompt == config.class_prompt
    )
    folder = next(same_class).output / ".class_pictures" / _content_key(run, config)
    family = run.family
    move_to_device({**family.denoisers, "vae": family.vae, **family.all_text_encoders}, run.device)
    if run.accelerator.is_main_process:
        _draw_class_images(run, config, folder)
    run.accelerator.wait_for_everyone()
    return read_training_images(
        folder, trigger=None, caption=config.class_prompt, limit=config.prior_count
    )


@torch.no_grad()
def _draw_class_images(run: Run, config: TrainConfig, folder: Path) -> None:
    """Draw ``class-00000.png`` and so on; existing files are kept."""
    family = run.family
    paths = [folder / f"class-{number:05d}.png" for number in range(config.prior_count)]
    conditions = family.encode_prompts([config.class_prompt])
    empty = family.unconditional(family.encode_prompts([""]))
    shape = family.encode_images(torch.zeros(1, 3, run.resolution, run.resolution))[0].shape[1:]
    for first in run.progress.track(range(0, len(paths), _CHUNK), "drawing class images"):
        chunk = range(first, min(first + _CHUNK, len(paths)))
        if all(paths[number].is_file() for number in chunk):
            continue
        images = draw_images(
            family,
            {key: value.expand(len(chunk), *value.shape[1:]) for key, value in conditions.items()},
            empty,
            shape,
            steps=config.validation_steps,
            guidance=guidance_scale(config, family),
            seeds=[stream_seed(config.seed, "class", number) for number in chunk],
            autocast=run.autocast,
        )
        for number, image in zip(chunk, images, strict=True):
            write_png(image, paths[number], "class images")


def _content_key(run: Run, config: TrainConfig) -> str:
    """A hash of all that the class images depend on."""
    family = run.family
    scheduler = {k: v for k, v in family.scheduler.config.items() if not k.startswith("_")}
    facts = [
        config.base,
        family.fingerprint(),
        config.class_prompt,
        config.seed,
        run.resolution,
        dict(run.weights),
        config.validation_steps,
        guidance_scale(config, family),
        config.mixed_precision,
        family.relevant_config(),
        class_name(family.scheduler),
        scheduler,
        config.quantize,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
