"""The optimizer steps of the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from customize.training.checkpoint import Checkpoint, optimizer_tensors, restore_optimizer
from customize.training.distributed import average_gradients
from customize.training.loop_settings import LoopSettings
from customize.training.sharded_tensors import gather_tensor, shard_like
from customize.training.training_task import TrainingTask

_FUSED = ("cuda", "cpu", "mps", "xpu")  # devices with a fused AdamW


class Optimization:
    """Steps of AdamW on the parameters of a task, with gradients averaged over all processes.

    Args:
        task: The parameters and their losses.
        config: Settings of the loop.
        accelerator: The ``accelerate.Accelerator`` of this process.
        device: Device of the parameters.

    Attributes:
        task: The task.
        parameters: Its trained parameters by name.
    """

    def __init__(
        self, task: TrainingTask, config: LoopSettings, accelerator: Any, device: torch.device
    ) -> None:
        self.task, self.parameters = task, task.named_parameters()
        self._accelerator, self._max_grad_norm = accelerator, config.max_grad_norm
        self._optimizer = torch.optim.AdamW(
            task.parameter_groups(), lr=0.0, fused=device.type in _FUSED
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.mixed_precision == "fp16")

    def set_learning_rates(self, factor: float) -> None:
        """Set the learning rate of each parameter group to this fraction of its peak."""
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate of each parameter group by the group's name."""
        return {group["name"]: group["lr"] for group in self._optimizer.param_groups}

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, a scalar."""
        self._scaler.scale(loss).backward()

    def step(self) -> None:
        """Update the parameters by the gradients of all losses since the previous step."""
        weights = list(self.parameters.values())
        if self._accelerator.num_processes > 1:
            average_gradients(self._accelerator, weights)
        self._scaler.unscale_(self._optimizer)
        self.task.adjust_gradients()
        if self._max_grad_norm:
            clip_grad_norm_(weights, self._max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self.task.constrain_parameters()

    def capture(
        self, step: int, settings: Mapping[str, Any], history: list[list[float]]
    ) -> Checkpoint:
        """Return the state after a step; tensors share memory with the parameters.

        All processes have to call it. If the state is sharded, it is complete in the first one.

        Args:
            step: Optimizer steps done.
            settings: Settings that the result depends on.
            history: Pairs of step and mean loss.
        """
        tensors = {name: gather_tensor(p.detach()) for name, p in self.parameters.items()}
        tensors |= self.task.fixed_tensors()
        tensors |= self._optimizer_tensors()
        return Checkpoint(step, tensors, settings, history, {"scaler": self._scaler.state_dict()})

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore a state from :meth:`capture`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(shard_like(checkpoint.tensors[name], parameter))
        self._restore_optimizer(checkpoint.tensors)
        self._scaler.load_state_dict(dict(checkpoint.extra["scaler"]))

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return optimizer_tensors(self._optimizer, self.parameters)

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        restore_optimizer(self._optimizer, self.parameters, tensors)
