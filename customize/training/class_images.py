"""Class pictures for prior preservation (DreamBooth, arXiv 2208.12242), drawn by the base.

They are drawn before anything is attached to it, with the steps and guidance of validation.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from customize.errors import storage_error
from customize.families.family import Family
from customize.families.pipeline_components import class_name
from customize.training.checkpoint import write_whole
from customize.training.config import TrainConfig
from customize.training.data import dataset
from customize.training.data.batches import stream_seed
from customize.training.prepare_base import move_to_device
from customize.training.progress import Progress
from customize.training.validation_images import draw_images, guidance_scale

_CHUNK = 4  # pictures drawn together; fixed, so that drawing again gives the same ones


def class_images_output(config: TrainConfig, configs: Sequence[TrainConfig]) -> Path:
    """The concept's folder whose class pictures a concept of a run has: of the first of its class,
    so that none are drawn twice."""
    same = [c for c in configs if c.prior_images is None and c.class_prompt == config.class_prompt]
    return same[0].output


def load_or_draw_class_images(
    config: TrainConfig,
    output: Path,
    family: Family,
    weights: Mapping[str, str],
    resolution: int,
    device: torch.device,
    accelerator: Any,
    autocast: Callable[[], AbstractContextManager[Any]],
    progress: Progress,
) -> list[dataset.TrainingImage]:
    """The class pictures in a concept's folder, after drawing those that are missing.

    They lie in a folder that is named by all they depend on, so that others are never taken.

    Args:
        output: the concept's folder.
        weights: of the base, from :func:`customize.training.base_fingerprint.weight_digests`.

    Leaves all models on the device.

    Raises:
        StorageError: a picture cannot be written; those before are kept.
    """
    folder = output / ".class_pictures" / _origin(config, family, weights, resolution)
    move_to_device({**family.denoisers, "vae": family.vae, **family.all_text_encoders}, device)
    if accelerator.is_main_process:
        draw_class_images(config, family, folder, resolution, autocast, progress)
    accelerator.wait_for_everyone()
    return dataset.read_training_images(
        folder, trigger=None, caption=config.class_prompt, limit=config.prior_count
    )


@torch.no_grad()
def draw_class_images(
    config: TrainConfig,
    family: Family,
    folder: Path,
    resolution: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    progress: Progress,
) -> None:
    """Fill a folder with ``class-00000.png`` and on; those that are there stay."""
    paths = [folder / f"class-{number:05d}.png" for number in range(config.prior_count)]
    asked = family.encode_prompts([config.class_prompt])
    empty = family.unconditional(family.encode_prompts([""]))
    shape = family.encode_images(torch.zeros(1, 3, resolution, resolution))[0].shape[1:]
    chunks = range(0, len(paths), _CHUNK)
    for first in progress.track(chunks, "drawing class pictures"):
        chunk = range(first, min(first + _CHUNK, len(paths)))
        if all(paths[number].is_file() for number in chunk):
            continue
        pictures = draw_images(
            family,
            {k: v.expand(len(chunk), *v.shape[1:]) for k, v in asked.items()},
            empty,
            shape,
            steps=config.validation_steps,
            guidance=guidance_scale(config, family),
            seeds=[stream_seed(config.seed, "class", number) for number in chunk],
            autocast=autocast,
        )
        for number, picture in zip(chunk, pictures, strict=True):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            _write(paths[number], buffer.getvalue())


def _origin(
    config: TrainConfig, family: Family, weights: Mapping[str, str], resolution: int
) -> str:
    facts = [config.base, family.fingerprint(), config.class_prompt, config.seed, resolution]
    facts += [
        dict(weights),
        config.validation_steps,
        guidance_scale(config, family),
        config.mixed_precision,
        family.relevant_config(),
        class_name(family.scheduler),
        {k: v for k, v in family.scheduler.config.items() if not k.startswith("_")},
        config.quantize,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _write(path: Path, data: bytes) -> None:
    try:
        write_whole(path, data)
    except OSError as error:
        fix = "allow writing there, then run again: those drawn are kept"
        raise storage_error(error, path, "class pictures", fix) from error
