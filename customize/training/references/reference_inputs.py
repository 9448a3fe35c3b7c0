"""The inputs of a training of references: groups of images, and prompts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from customize.families import Family
from customize.training.latents_and_embeddings import (
    Encode,
    cache_conditions,
    cache_images,
    encode_prompts_once,
    lookup_conditions,
)
from customize.training.prepare_base import move_to_device, offload
from customize.training.references.config import ReferenceTrainConfig
from customize.training.references.group_dataset import FileGroups, GroupDataset
from customize.training.references.image_groups import (
    ImageGroups,
    content_digests,
    read_image_groups,
    targets_with_references,
)
from customize.training.references.reference_run import ReferenceRun

_KEPT_CAPTIONS = 20_000


def read_groups(
    config: ReferenceTrainConfig, path: Path | None, run: ReferenceRun
) -> ImageGroups | None:
    """Read and check the groups of a folder or metadata file; None without a path.

    Groups of one image are counted where the stage holds out targets.

    Raises:
        DataError: See :func:`customize.training.references.image_groups.read_image_groups`; or no
            group has two images in a stage that needs them.
    """
    if path is None:
        return None
    with run.progress.phase("reading images", after=1.0):
        groups = read_image_groups(path, config.caption)
    text = f"{len(groups.images)} images in {groups.num_groups} groups"
    if config.rules.holds_out_target:
        alone = len(groups.images) - len(targets_with_references(groups, path))
        text += f", of which {alone} are alone in theirs and left out" if alone else ""
    run.progress.line(f"{path}: {text}")
    return groups


def data_digests(groups: ImageGroups | None, dataset: GroupDataset | None) -> dict[str, str] | int:
    """Return name -> digest of the training images, or the number of targets in memory."""
    if groups is not None:
        return content_digests(groups.images)
    assert dataset is not None
    return len(dataset)


def cache_groups(run: ReferenceRun, groups: ImageGroups) -> FileGroups:
    """Encode the images of groups, with the autoencoder on the device.

    Raises:
        PipelineError: The autoencoder gives values that are not finite.
    """
    config, family = run.config, run.family
    family.vae.to(run.device)
    images = cache_images(
        family,
        [image.sample for image in groups.images],
        run.resolution,
        torch.device("cpu"),  # data sets can be larger than the device's memory
        flip=False,
        keep_latents=config.cache_latents,
        buckets=config.buckets,
        track=run.progress.track,
    )
    return FileGroups(groups, images, family, run.model.processor, config)


def cache_prompts(run: ReferenceRun, groups: Sequence[ImageGroups] | None) -> None:
    """Encode all captions, then offload the text encoders; captions in memory are encoded later.

    Args:
        run: The run.
        groups: All groups of the run; None if the captions are not known before they are used.

    Raises:
        PipelineError: A text encoder gives values that are not finite.
    """
    family, prompts = run.family, ["", *run.config.validation_prompts]
    move_to_device(family.all_text_encoders, run.device)
    if groups is None:
        run.encode = encode_when_used(family)
        return
    prompts += [text for part in groups for image in part.images for text in image.captions]
    with run.progress.phase("encoding prompts", after=1.0), run.autocast():
        run.encode = cache_conditions(family, prompts, live=False, to_encoder=str)
    offload(family, family.all_text_encoders, free=run.owns_base)


def encode_when_used(family: Family) -> Encode:
    """Return a function that encodes each caption at its first use and keeps the latest 20,000."""
    cache: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def encode(captions: Sequence[str]) -> dict[str, Tensor]:
        missing = [caption for caption in captions if caption not in cache]
        cache.update(encode_prompts_once(family, missing))
        conditions = lookup_conditions(cache, captions)
        while len(cache) > _KEPT_CAPTIONS:
            cache.popitem(last=False)
        return conditions

    return encode
