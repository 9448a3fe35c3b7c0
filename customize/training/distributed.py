"""The process that trains: its device and precision, its fellow processes, its terminal."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from customize.base.device import choose_device
from customize.core.precision import model_autocast
from customize.errors import ConfigError, CustomizeError
from customize.training.config import TrainConfig

Autocast = Callable[[], AbstractContextManager[Any]]

_STOPS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")

#: The settings of mixed precision that have a dtype of their own.
MIXED_PRECISION_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def create_accelerator(config: TrainConfig) -> Any:
    """accelerate's view of this process: its number, its device, the trackers.

    Raises:
        ConfigError: the tracker is not installed.
    """
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    if config.tracker == "none":
        return _told(Accelerator(), config)
    if config.tracker not in map(str, get_available_trackers()):
        raise ConfigError(
            f"the tracker {config.tracker} is not installed",
            where="tracker",
            fix=f"pip install {config.tracker}, or set tracker to none (--tracker none)",
        )
    folder = str(config.output / "logs")
    return _told(Accelerator(log_with=config.tracker, project_dir=folder), config)


def _told(accelerator: Any, config: TrainConfig) -> Any:
    """The same, after a warning of what accelerate was configured for and training won't do."""
    theirs = {
        "mixed_precision": accelerator.mixed_precision,
        "gradient_accumulation": accelerator.gradient_accumulation_steps,
    }
    for field, unset in (("mixed_precision", "no"), ("gradient_accumulation", 1)):
        ours = getattr(config, field)
        if theirs[field] not in (unset, ours):
            warnings.warn(
                f"accelerate is configured for {field} {theirs[field]}, but the setting {field} "
                f"is {ours}, and the setting counts",
                stacklevel=2,
            )
    return accelerator


def run_on_main_process(accelerator: Any, action: Callable[[], object]) -> None:
    """Do something in the first process alone; if that is refused, all processes stop for it.

    Raises:
        CustomizeError: the action raised it.
    """
    error: list[CustomizeError | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except CustomizeError as refused:
            error = [refused]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(error)
    if error[0] is not None:
        raise error[0]


def training_device(config: TrainConfig, accelerator: Any) -> torch.device:
    """The device of the settings, or accelerate's choice.

    Raises:
        ConfigError: it is not available, or does not support the settings.
    """
    device = torch.device(accelerator.device)
    if config.device is not None:
        device = choose_device(config.device, "device")
        if accelerator.num_processes > 1 and device != accelerator.device:
            raise ConfigError(
                f"the device {config.device} is not that of this process, {accelerator.device}",
                where="device",
                fix="leave it out, and choose with accelerate launch (--cpu, --gpu_ids)",
            )
    if config.mixed_precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "fp16 arithmetic is not for the CPU",
            where="mixed_precision",
            fix="set mixed_precision to bf16 (--mixed-precision bf16) or no",
        )
    return device


def create_autocast(config: TrainConfig, device: torch.device) -> Autocast:
    """Makes the context of the model's calls; one that does nothing without mixed precision."""
    if config.mixed_precision == "no":
        return nullcontext
    return partial(model_autocast, device.type, MIXED_PRECISION_DTYPES[config.mixed_precision])


def average_gradients(accelerator: Any, weights: Sequence[Tensor]) -> None:
    """The mean over all processes, in one message.

    An adapter is small, so there is nothing to gain from sending parts of it early; and a model
    that isn't wrapped can be called, checkpointed and drawn from as it is.
    """
    lacking = [w.grad is None for w in weights]
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    there = gradients[0].new_tensor([0.0 if lacks else 1.0 for lacks in lacking])
    sent = torch.cat([*(gradient.flatten() for gradient in gradients), there])
    mean = accelerator.reduce(sent, "mean")
    *parts, there = mean.split([*(w.numel() for w in weights), len(weights)])
    # What no process has a gradient of must stay without one, as where all samples went to the
    # other of two denoisers: of a zero, the optimizer's momentum and decay would make a step.
    # Only then does the CPU wait for the answer.
    shares = there.tolist() if any(lacking) else [1.0] * len(weights)
    for weight, part, share in zip(weights, parts, shares, strict=True):
        weight.grad = part.view_as(weight) if share else None


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C, SIGTERM or SIGHUP arrives (on Windows Ctrl-Break too); a
    second one, but for SIGHUP, acts as it always does. A SIGHUP that is ignored, as under nohup,
    stays ignored."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    numbers = [getattr(signal, name) for name in _STOPS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    hangup = getattr(signal, "SIGHUP", None)
    if before.get(hangup) is signal.SIG_IGN:
        del before[hangup]

    def note(number: int, frame: object) -> None:
        received.append(number)
        for each, handler in before.items():
            # When a terminal closes, the system and the shell both send SIGHUP.
            if each != hangup:
                signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
