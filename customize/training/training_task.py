"""The interface between the training loop and what is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from customize.training.checkpoint import Checkpoint


class TrainingTask(ABC):
    """Parameters and their losses."""

    @abstractmethod
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters under names that depend on the settings alone."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups.

        Each group has a "name" for trackers, "params", "weight_decay" and its largest learning
        rate as "peak".
        """

    @abstractmethod
    def losses(self, step: int, batch: int, batches: int) -> Iterator[Tensor]:
        """Yield the losses of one batch, whose sum is the loss of the batch.

        The caller runs the backward pass of a loss before it requests the next, so that only one
        graph is in memory. The sum over the batches of a step is the loss of the step.

        Args:
            step: Optimizer steps done before.
            batch: Number of the batch in the step.
            batches: Batches in a step, over all processes and gradient accumulation.

        Yields:
            Scalars, float32, on the device.
        """

    @abstractmethod
    def suggest_fix(self) -> str:
        """Return what to do if the loss is not finite before the first update."""

    def step_loss(self, step: int) -> Tensor | None:
        """Return a loss of the step that depends on no batch, a scalar; None: there is none."""
        return None

    def adjust_gradients(self) -> None:
        """Change the averaged gradients before they are clipped."""
        return

    def constrain_parameters(self) -> None:
        """Change the parameters after the optimizer's step."""
        return

    def fixed_tensors(self) -> Mapping[str, Tensor]:
        """Return tensors that checkpoints contain besides the trained ones."""
        return {}

    def check_checkpoint(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Refuse a checkpoint that does not fit.

        Raises:
            SettingsError: It does not fit.
        """
        return
