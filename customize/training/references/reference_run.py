"""The state of a training of references that the steps of its recipe share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from customize.families import Family
from customize.references.encoder_inputs import GroupRequest
from customize.references.model import ReferenceModel
from customize.references.seams.attachment import Attachment
from customize.training.distributed import Autocast
from customize.training.latents_and_embeddings import Encode
from customize.training.progress import Progress
from customize.training.references.config import ReferenceTrainConfig
from customize.training.references.group_dataset import GroupDataset
from customize.training.references.sharding import Sharding
from customize.training.references.trained_parts import TrainedParts


@dataclass(eq=False)
class ReferenceRun:
    """One training of references.

    Attributes:
        config: The settings.
        accelerator: The ``accelerate.Accelerator`` of this process.
        device: Device of the models.
        autocast: Returns the context in which models are called.
        progress: Shows phases and bars.
        cleanup: Undoes the changes to the models, in reverse order, when the run ends.
        sharding: What is sharded over the processes.
        owns_base: Whether the base was loaded for this run, so that its models may be freed.
        weights: Component -> digest of the base's weights. Empty until they can be read.
        family: The base model. Set when it is loaded.
        resolution: Side of the square targets, in pixels. Set with ``family``.
        model: Encoder, adapter and processor. Set when they are loaded.
        parts: The encoder and the adapter that are trained: those of ``model``, or their shards.
            Set when they are attached.
        attachment: The adapter's attachment to the denoiser. Set when it is attached.
        dataset: The samples. Set when images are encoded.
        encode: Returns the conditions of a batch of captions. Set when prompts are encoded.
    """

    config: ReferenceTrainConfig
    accelerator: Any
    device: torch.device
    autocast: Autocast
    progress: Progress
    cleanup: ExitStack
    sharding: Sharding
    owns_base: bool
    weights: dict[str, str]
    family: Family = field(init=False)
    resolution: int = field(init=False)
    model: ReferenceModel = field(init=False)
    parts: TrainedParts = field(init=False)
    attachment: Attachment = field(init=False)
    dataset: GroupDataset = field(init=False)
    encode: Encode = field(init=False)

    @property
    def is_sharded(self) -> bool:
        """Whether the processes exchange parts of the weights or gradients in each pass."""
        return self.sharding != "none"

    def read_references(self, requests: Sequence[GroupRequest]) -> Tensor:
        """Return the reference tokens (groups, num_tokens, width) of groups.

        It is called within autocast, and by what ``parts`` computes.
        """
        inputs = self.model.processor.make_inputs(requests, self.model.config)
        tokens: Tensor = self.parts.encoder(inputs.to(self.device))
        return tokens
