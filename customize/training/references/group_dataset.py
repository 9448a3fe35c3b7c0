"""What the training loop asks of a data set, and the data sets of files and of arrays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from customize.errors import DataError
from customize.families import Family
from customize.references.encoder_inputs import ImagePatches, ReferenceProcessor
from customize.training.data import dataset
from customize.training.latents_and_embeddings import CachedImages
from customize.training.references.config import ReferenceTrainConfig
from customize.training.references.image_groups import ImageGroups, targets_with_references
from customize.training.references.stages import choose_crop, choose_references

_PATCH_CACHE_BYTES = 2 * 1024**3


@dataclass(frozen=True, eq=False)
class GroupSample:
    """A target and its references.

    Attributes:
        latents: Mean and standard deviation of the target's latents, each float32 (channels,
            height, width).
        caption: Its caption, possibly empty.
        references: RGB images or their patches, at least one.
        attributes: For each reference the attribute to take from it, "" for all; () for no
            attributes.
    """

    latents: tuple[Tensor, Tensor]
    caption: str
    references: Sequence[Image.Image | ImagePatches]
    attributes: Sequence[str] = field(default=())


class GroupDataset(Protocol):
    """A source of samples, such as files, arrays or drawn scenes.

    One that has ``attributes``, a collection of all attributes of its samples, lets the trained
    references warn of others.
    """

    def __len__(self) -> int:
        """Return the number of targets of one pass."""

    def sample(self, index: int, rng: Random) -> GroupSample:
        """Return a sample.

        Args:
            index: Number of the target, from 0 to ``len() - 1``; each pass has all numbers in
                random order. Data sets that draw their samples may ignore it.
            rng: Source of all random numbers. Its state depends on the seed of the run, the step
                and the row of the batch, so that a resumed run has the same samples.
        """


class PatchCache:
    """Patches of images, of which the most recently used are kept.

    Args:
        processor: Cuts the images.
        limit: Largest size of the kept patches in bytes.
    """

    def __init__(self, processor: ReferenceProcessor, limit: int = _PATCH_CACHE_BYTES) -> None:
        self._processor, self._limit, self._size = processor, limit, 0
        self._patches: OrderedDict[Any, ImagePatches] = OrderedDict()

    def get(self, key: Any, load: Callable[[], Image.Image]) -> ImagePatches:
        """Return the patches of an image, which is loaded if they are not kept.

        Args:
            key: Identifies the image.
            load: Returns the RGB image.
        """
        if key in self._patches:
            self._patches.move_to_end(key)
            return self._patches[key]
        patches = self._processor.cut_images([load()])[0]
        self._patches[key] = patches
        self._size += patches.values.nbytes
        while self._size > self._limit and len(self._patches) > 1:
            self._size -= self._patches.popitem(last=False)[1].values.nbytes
        return patches


class FileGroups:
    """Groups of image files.

    Args:
        groups: The groups.
        images: Their encoded images, in the same order.
        family: The base model, which encodes targets if latents are not cached.
        processor: Cuts references to patches.
        config: Settings of the run.

    Raises:
        DataError: The stage holds out targets, and every group has one image.
    """

    def __init__(
        self,
        groups: ImageGroups,
        images: CachedImages,
        family: Family,
        processor: ReferenceProcessor,
        config: ReferenceTrainConfig,
    ) -> None:
        self._groups, self._images, self._family, self._config = groups, images, family, config
        self._patches = PatchCache(processor)
        self._targets = list(range(len(groups.images)))
        if config.rules.holds_out_target:
            self._targets = targets_with_references(groups, config.images)

    def __len__(self) -> int:
        return len(self._targets)

    @property
    def attributes(self) -> set[str]:
        """The attributes of all samples."""
        if not self._config.rules.holds_out_target:
            return set()
        references = (self._groups.references[number] for number in self._targets)
        return {name for others in references for _, name in others if name}

    def sample(self, index: int, rng: Random) -> GroupSample:
        """See :meth:`GroupDataset.sample`."""
        number, config = self._targets[index], self._config
        mean, std = self._images.latent_distribution(self._family, [number], [False])
        caption = rng.choice(self._groups.images[number].captions)
        latents = mean[0], std[0]
        if config.rules.holds_out_target:
            chosen = choose_references(
                self._groups.references[number],
                rng,
                config.max_references,
                config.subset_probability,
            )
            patches = [self._cut(other) for other, _ in chosen]
            return GroupSample(latents, caption, patches, [name for _, name in chosen])
        if config.stage == "single" and rng.random() < config.crop_probability:
            image = self._load(number)
            return GroupSample(latents, caption, [crop_reference(image, rng)])
        return GroupSample(latents, caption, [self._cut(number)])

    def _cut(self, number: int) -> ImagePatches:
        return self._patches.get(number, lambda: self._load(number))

    def _load(self, number: int) -> Image.Image:
        """Return an image; a target's own reference has the target's crop."""
        image = self._groups.images[number].sample.image
        if self._config.rules.holds_out_target:
            return image
        size = self._images.sizes[number]
        return dataset.crop_and_resize(image, size, Image.Resampling.LANCZOS)


class ArrayGroups:
    """Groups of images in memory, all of one size.

    Args:
        images: (groups, images, height, width, 3), uint8; a memory-mapped array is read as needed.
        captions: For each image of each group its caption, or a list of which one is drawn.
        latents: Mean and standard deviation of each image's latents, each float32 (groups, images,
            channels, height, width).
        processor: Cuts references to patches.
        config: Settings of the run.

    Raises:
        DataError: The shapes differ, or the stage holds out targets of groups of one image.
    """

    def __init__(
        self,
        images: np.ndarray[Any, Any],
        captions: Sequence[Sequence[str | Sequence[str]]],
        latents: tuple[Tensor, Tensor],
        processor: ReferenceProcessor,
        config: ReferenceTrainConfig,
    ) -> None:
        shape = images.shape[:2]
        if images.ndim != 5 or images.shape[4] != 3 or images.dtype != np.uint8:
            raise DataError(
                f"images are {images.dtype} of the shape {images.shape}",
                where="images",
                fix="give uint8 of (groups, images, height, width, 3)",
            )
        sizes = {len(captions), *(len(group) for group in captions)}
        if sizes != {*shape} or any(values.shape[:2] != shape for values in latents):
            raise DataError(
                f"captions and latents do not fit {shape[0]} groups of {shape[1]} images",
                where="captions",
                fix="give a caption and latents for each image of each group",
            )
        if config.rules.holds_out_target and shape[1] < 2:
            raise DataError(
                "every group has one image", where="images", fix="give at least two of each group"
            )
        self._images, self._captions, self._latents = images, captions, latents
        self._config, self._patches = config, PatchCache(processor)

    #: No sample has attributes.
    attributes = frozenset[str]()

    def __len__(self) -> int:
        return self._images.shape[0] * self._images.shape[1]

    def sample(self, index: int, rng: Random) -> GroupSample:
        """See :meth:`GroupDataset.sample`."""
        config, count = self._config, self._images.shape[1]
        group, number = divmod(index, count)
        mean, std = self._latents
        latents = mean[group, number], std[group, number]
        captions = self._captions[group][number]
        caption = captions if isinstance(captions, str) else rng.choice(captions)
        chosen = [number]
        if config.rules.holds_out_target:
            others = [other for other in range(count) if other != number]
            chosen = choose_references(
                others, rng, config.max_references, config.subset_probability
            )
        elif config.stage == "single" and rng.random() < config.crop_probability:
            image = Image.fromarray(np.ascontiguousarray(self._images[group, number]))
            return GroupSample(latents, caption, [crop_reference(image, rng)])
        return GroupSample(latents, caption, [self._cut(group, other) for other in chosen])

    def _cut(self, group: int, number: int) -> ImagePatches:
        def load() -> Image.Image:
            return Image.fromarray(np.ascontiguousarray(self._images[group, number]))

        return self._patches.get((group, number), load)


def crop_reference(image: Image.Image, rng: Random) -> Image.Image:
    """Return a random square part of an image, mirrored with probability 0.5."""
    part = image.crop(choose_crop(image.size, rng))
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return part
