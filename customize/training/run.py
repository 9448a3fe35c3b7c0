"""The state of a training run that the steps of the recipe share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from customize.families import Family
from customize.training.config import TrainConfig
from customize.training.distributed import Autocast
from customize.training.latents_and_embeddings import CachedImages, Encode
from customize.training.progress import Progress
from customize.training.trainable import Trainable


@dataclass(eq=False)
class Run:
    """One training run: where it computes, and the models and data that its steps add.

    Attributes:
        configs: Settings of each concept, sorted by name. Settings of the run are equal in all.
        accelerator: The ``accelerate.Accelerator`` of this process.
        device: Device of the models.
        autocast: Returns the context in which the base model is called.
        progress: Shows phases and bars.
        cleanup: Undoes the changes to the models, in reverse order, when the run ends.
        owns_base: Whether the base was loaded for this run, so that its models may be freed.
        weights: Component -> digest of the base's weights. Empty until they can be read.
        family: The base model. Set by :func:`customize.training.prepare_base.load_base`.
        fingerprint: The family's fingerprint, taken before any model is freed. Set with ``family``.
        resolution: Side of the square training images, in pixels. Set with ``family``.
        images: Latents, masks and captions. Set when the images are encoded.
        concept_images: Numbers of each concept's images, which precede all class images.
        class_images: Numbers of each concept's class images; empty without prior preservation.
        trainable: Adapters and token embeddings of all concepts. Set when they are attached.
        encode: Returns the conditions of a batch of captions. Set when prompts are encoded.
    """

    configs: Sequence[TrainConfig]
    accelerator: Any
    device: torch.device
    autocast: Autocast
    progress: Progress
    cleanup: ExitStack
    owns_base: bool
    weights: dict[str, str]
    family: Family = field(init=False)
    fingerprint: dict[str, Any] = field(init=False)
    resolution: int = field(init=False)
    images: CachedImages = field(init=False)
    concept_images: Sequence[range] = field(init=False)
    class_images: Sequence[range] = field(init=False)
    trainable: Trainable = field(init=False)
    encode: Encode = field(init=False)

    @property
    def config(self) -> TrainConfig:
        """The first concept's settings, for everything that belongs to the run."""
        return self.configs[0]

    @property
    def captions_by_concept(self) -> list[list[str]]:
        """The captions of each concept's images."""
        captions = self.images.captions
        return [list(captions[numbers.start : numbers.stop]) for numbers in self.concept_images]
