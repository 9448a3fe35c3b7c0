"""Sharding over processes: FSDP2 shards the trained weights, ZeRO-2 the optimizer's state."""

from __future__ import annotations

import copy
import os
import sys
from typing import Any, Literal

import torch
from torch import nn

from customize.errors import ConfigError
from customize.training.references.config import ReferenceTrainConfig
from customize.training.references.trained_parts import TrainedParts
from customize.training.sharded_tensors import full_tensor

#: FSDP2: each process has a part of the trained weights, their gradients and the optimizer's state.
#: ZeRO-2: each process has all weights, and a part of the gradients and of the optimizer's state.
Sharding = Literal["none", "fsdp2", "zero2"]

_PRESETS = "scripts/presets/accelerate"


def choose_sharding(accelerator: Any, config: ReferenceTrainConfig) -> Sharding:
    """Return how accelerate's configuration shards.

    Raises:
        ConfigError: It shards in a way, or has an option, that does not work here.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind == "MULTI_CPU":  # accelerate ignores the configuration
        kind = _kind_on_cpu(accelerator)
    if kind == "FSDP":
        return _check_fsdp(accelerator)
    if kind == "DEEPSPEED":
        return _check_zero(zero_options(accelerator), config)
    if kind in ("MEGATRON_LM", "TP"):
        raise ConfigError(
            f"accelerate is configured for {kind}, which does not work for references",
            where="accelerate",
            fix=f"choose a configuration of {_PRESETS}",
        )
    return "none"


def _kind_on_cpu(accelerator: Any) -> str:
    """Read the environment of accelerate's launcher, and store the plugin as accelerate would."""
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        return "FSDP"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        accelerator.state.deepspeed_plugins = DeepSpeedPlugin()
        return "DEEPSPEED"
    return "none"


def zero_options(accelerator: Any) -> dict[str, Any]:
    """Return the options of ZeRO in accelerate's configuration, by DeepSpeed's names."""
    plugin = accelerator.state.deepspeed_plugins
    plugin = next(iter(plugin.values())) if isinstance(plugin, dict) else plugin
    options: dict[str, Any] = plugin.deepspeed_config["zero_optimization"]
    return options


def _check_fsdp(accelerator: Any) -> Sharding:
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    plugin, dimensions = accelerator.state.fsdp_plugin, accelerator.parallelism_config
    wrap = plugin.auto_wrap_policy
    problems = {
        "fsdp_version": plugin.fsdp_version != 2 and f"is {plugin.fsdp_version}; set it to 2",
        "fsdp_auto_wrap_policy": getattr(wrap, "func", wrap) is size_based_auto_wrap_policy
        and "shards modules that are never called; set it to TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading
        and "loads the base in the first process alone; set it to false",
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy)
        and "is not supported; set it to false",
        "fsdp_activation_checkpointing": plugin.activation_checkpointing
        and "is a setting of the training; set it to false, and use --gradient-checkpointing",
        "parallelism_config": dimensions is not None
        and any(getattr(dimensions, f"{name}_enabled", False) for name in ("tp", "cp", "sp"))
        and "splits samples; leave it out",
    }
    _refuse(problems, "fsdp2.yaml")
    # The settings decide the precision: weights are float32, and autocast computes in another.
    plugin.mixed_precision_policy = None
    return "fsdp2"


def _check_zero(options: dict[str, Any], config: ReferenceTrainConfig) -> Sharding:
    stage = options.get("stage")
    offloads = any(
        options.get(key, {}).get("device", "none") != "none"
        for key in ("offload_optimizer", "offload_param")
    )
    problems = {
        "zero_stage": stage != 2 and f"is {stage}; set it to 2, or use FSDP2 to shard weights too",
        "offload_optimizer_device": offloads and "is not supported; set it to none",
    }
    _refuse(problems, "deepspeed_zero2.yaml")
    if config.mixed_precision == "fp16":
        raise ConfigError(
            "fp16 needs a scaled loss, which ZeRO-2 does not take here",
            where="mixed_precision",
            fix="set mixed_precision to bf16 (--mixed-precision bf16) or no",
        )
    return "zero2"


def _refuse(problems: dict[str, Any], preset: str) -> None:
    """Raise an error for the first option that has a problem, "what is wrong; what to do"."""
    for option, text in problems.items():
        if text:
            problem, _, fix = str(text).partition("; ")
            raise ConfigError(
                f"accelerate's option {option} {problem}",
                where="accelerate",
                fix=f"{fix}; {_PRESETS}/{preset} has what works",
            )


def shard(parts: TrainedParts, sharding: Sharding, accelerator: Any) -> TrainedParts:
    """Move weights to the process's device, sharded over all processes with FSDP2.

    Args:
        parts: The whole modules, on the CPU. Their weights are emptied, so that each weight is in
            memory once; :func:`gather` fills them again.
        sharding: "fsdp2" or "zero2".
        accelerator: The ``accelerate.Accelerator`` of this process.

    Returns:
        Copies of the modules, which are trained in place of them.
    """
    weights = list(parts.parameters())
    moved = {id(w): nn.Parameter(w.data, requires_grad=w.requires_grad) for w in weights}
    copied = copy.deepcopy(parts, dict(moved))
    del moved
    for weight in weights:
        weight.data = weight.data.new_empty(0)
    if sharding == "zero2":
        return copied.to(accelerator.device)

    from accelerate.utils import fsdp2_prepare_model

    fsdp2_prepare_model(accelerator, copied)
    # All processes must call a sharded module equally often, and their groups differ in size.
    copied.encoder.vision_batch = sys.maxsize
    return copied


@torch.no_grad()
def gather(trained: TrainedParts, parts: TrainedParts) -> None:
    """Fill the emptied weights of modules, on the CPU, from those that :func:`shard` returned."""
    for weight, source in zip(parts.parameters(), trained.parameters(), strict=True):
        whole = full_tensor(source)
        weight.data = torch.empty(whole.shape, dtype=whole.dtype)
        weight.copy_(whole)  # in place, so that what was computed from other weights is found stale
