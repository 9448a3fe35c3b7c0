"""Concept training as a task of the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from customize.training.checkpoint import Checkpoint, check_slices_match
from customize.training.class_preservation import PreservationTargets
from customize.training.finite_checks import suggest_base_fix
from customize.training.losses import ImageLosses
from customize.training.run import Run
from customize.training.training_task import TrainingTask


class ConceptTask(TrainingTask):
    """Adapters and token embeddings of a run's concepts.

    Args:
        run: The run, with everything attached and encoded.
        targets: Outputs of the base model for the preservation losses.
    """

    def __init__(self, run: Run, targets: PreservationTargets) -> None:
        self.run, self.targets = run, targets
        self._image_losses = ImageLosses(run, targets)
        self._sketches = run.trainable.slice_sketches()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters under names that depend on the settings alone."""
        return self.run.trainable.named_parameters()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups of :meth:`Trainable.parameter_groups`."""
        return self.run.trainable.parameter_groups(self.run.family, self.run.config)

    def losses(self, step: int, batch: int, batches: int) -> Iterator[Tensor]:
        """Yield the losses of :meth:`ImageLosses.compute`."""
        return self._image_losses.compute(step, batch, batches)

    def step_loss(self, step: int) -> Tensor | None:
        """Return the preservation loss on text features; None if there is none."""
        with self.run.autocast():
            return self.targets.text_loss(step)

    def adjust_gradients(self) -> None:
        """Add the gradient of the penalty on changes to generic prompts."""
        self.run.trainable.add_penalty_grad()

    def constrain_parameters(self) -> None:
        """Clamp the norms of the token embeddings."""
        self.run.trainable.clamp_norms_()

    def fixed_tensors(self) -> Mapping[str, Tensor]:
        """Return the sketches of the slices."""
        return self._sketches

    def check_checkpoint(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Refuse a checkpoint of other slices."""
        check_slices_match(checkpoint, self._sketches, folder)

    def suggest_fix(self) -> str:
        """Return what to do about a base with values that are not finite."""
        return suggest_base_fix(self.run.family, self.run.config.mixed_precision == "fp16")
