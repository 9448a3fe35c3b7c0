"""Optimizer steps by DeepSpeed's ZeRO-2 (arXiv 1910.02054, section 5.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from customize.errors import ConfigError
from customize.training.loop_settings import LoopSettings
from customize.training.optimization import Optimization
from customize.training.sharded_tensors import keep_in_first
from customize.training.training_task import TrainingTask

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroOptimization(Optimization):
    """Steps of AdamW whose gradients and moments are sharded over all processes.

    Gradients are averaged in the backward pass, and clipped by the norm over all processes. All
    processes run as many backward passes. A task cannot change the gradients.

    Args:
        task: The parameters and their losses.
        config: Settings of the loop, without fp16.
        accelerator: The ``accelerate.Accelerator`` of this process.
        device: Device of the parameters.
        model: The module of the parameters.
        options: Options of ZeRO, by DeepSpeed's names.

    Raises:
        ConfigError: DeepSpeed is missing or too old.
    """

    def __init__(
        self,
        task: TrainingTask,
        config: LoopSettings,
        accelerator: Any,
        device: torch.device,
        model: nn.Module,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(task, config, accelerator, device)
        import deepspeed

        self._engine: Any = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            config={
                "zero_optimization": dict(options),
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": config.max_grad_norm,
                "train_micro_batch_size_per_gpu": 1,  # only its logs use it
                "managed_gradient_accumulation": False,  # step() follows the last backward pass
                "steps_per_print": math.inf,
            },
        )[0]
        if not hasattr(self._engine, "managed_gradient_accumulation"):
            raise ConfigError(
                f"DeepSpeed {deepspeed.__version__} is too old",
                where="accelerate",
                fix="pip install -U deepspeed",
            )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, a scalar."""
        self._engine.backward(loss)

    def step(self) -> None:
        """Update the parameters by the gradients of all losses since the previous step."""
        self._engine.step()
        self.task.constrain_parameters()

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_moments()
        tensors = {
            f"optimizer/{name}/{key}": keep_in_first(safe_get_full_optimizer_state(parameter, key))
            for name, parameter in self.parameters.items()
            for key in _MOMENTS
        }
        steps = next(iter(self._optimizer.state.values()))["step"]  # equal for all
        return tensors | {f"optimizer/{name}/step": steps.clone() for name in self.parameters}

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        steps = tensors[f"optimizer/{next(iter(self.parameters))}/step"]
        # AdamW makes its state at the first step otherwise.
        for group in self._optimizer.param_groups:
            (part,) = group["params"]
            moments = {key: torch.zeros_like(part) for key in _MOMENTS}
            self._optimizer.state[part] = {"step": steps.to(part.device, copy=True), **moments}
        self._link_moments()
        for name, parameter in self.parameters.items():
            safe_set_full_fp32_param(parameter, parameter.detach())
            for key in _MOMENTS:
                moment = tensors[f"optimizer/{name}/{key}"].to(parameter.device)
                safe_set_full_optimizer_state(parameter, moment, key)

    def _link_moments(self) -> None:
        """Let DeepSpeed find the moments of parameters; it does so for the first group only."""
        parameters: Any = self.parameters
        for parameter in parameters.values():
            fragment = parameter._hp_mapping
            if fragment is not None:  # some of the parameter belongs to this process
                # A group has this process's part of all its parameters, in one tensor.
                (part,) = self._optimizer.param_groups[fragment.param_group_index]["params"]
                fragment.set_optim_state_fragment(part, self._optimizer.state[part])
