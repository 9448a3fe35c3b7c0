"""Device, precision and signals of a training process, and its exchange with other processes."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from customize.base.device import choose_device
from customize.core.precision import model_autocast
from customize.errors import ConfigError, CustomizeError
from customize.text import one_line
from customize.training.loop_settings import LoopSettings
from customize.training.sharded_tensors import is_sharded

T = TypeVar("T")

Autocast = Callable[[], AbstractContextManager[Any]]

_STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")

#: Setting ``mixed_precision`` -> dtype of the frozen weights and of autocast.
MIXED_PRECISION_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def create_accelerator(config: LoopSettings) -> Any:
    """Create the ``accelerate.Accelerator`` of this process, with the tracker of the settings.

    Warns if accelerate is configured for a mixed precision or gradient accumulation that differs
    from the settings, because the settings take precedence.

    Raises:
        ConfigError: The tracker is not installed, or a package that accelerate is configured for.
    """
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    options: dict[str, Any] = {}
    if config.tracker != "none":
        if config.tracker not in map(str, get_available_trackers()):
            raise ConfigError(
                f"the tracker {config.tracker} is not installed",
                where="tracker",
                fix=f"pip install {config.tracker}, or set tracker to none (--tracker none)",
            )
        options = {"log_with": config.tracker, "project_dir": str(config.output / "logs")}
    try:
        accelerator = Accelerator(**options)
    except ImportError as error:
        raise ConfigError(
            one_line(f"accelerate's configuration needs a package: {error}"),
            where="accelerate",
            fix="install the package, or choose another configuration",
        ) from error
    for field, configured, unset in (
        ("mixed_precision", accelerator.mixed_precision, "no"),
        ("gradient_accumulation", accelerator.gradient_accumulation_steps, 1),
    ):
        setting = getattr(config, field)
        if configured not in (unset, setting):
            warnings.warn(
                f"accelerate is configured for {field} {configured}, but the setting {field} is "
                f"{setting}, and the setting takes precedence",
                stacklevel=2,
            )
    return accelerator


def run_on_main_process(accelerator: Any, action: Callable[[], T]) -> T:
    """Run an action in the main process and return its result in all processes.

    Raises:
        CustomizeError: The action raised it; all processes raise the same error.
    """
    result: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            result = [action()]
        except CustomizeError as error:
            result = [error]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(result)
    if isinstance(result[0], CustomizeError):
        raise result[0]
    return result[0]


def training_device(config: LoopSettings, accelerator: Any) -> torch.device:
    """Return the device of the settings, or accelerate's default.

    Raises:
        ConfigError: The device is not available, is not that of this process, or does not support
            the mixed precision of the settings.
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
            "fp16 arithmetic is not supported on the CPU",
            where="mixed_precision",
            fix="set mixed_precision to bf16 (--mixed-precision bf16) or no",
        )
    return device


def create_autocast(config: LoopSettings, device: torch.device) -> Autocast:
    """Return a function that makes the autocast context; a null context without mixed precision."""
    if config.mixed_precision == "no":
        return nullcontext
    return partial(model_autocast, device.type, MIXED_PRECISION_DTYPES[config.mixed_precision])


def average_gradients(accelerator: Any, weights: Sequence[Tensor]) -> None:
    """Average the gradients over all processes, in one message.

    An adapter is small, so sending parts of it during the backward pass gains nothing; and a model
    without a distributed wrapper can be called, checkpointed and sampled from directly.

    Args:
        accelerator: The ``accelerate.Accelerator`` of this process.
        weights: Trained parameters, float32, in the same order in all processes. Sharded ones are
            left alone, as their gradients are averaged in the backward pass.
    """
    weights = [weight for weight in weights if not is_sharded(weight)]
    if not weights:
        return
    is_missing = [weight.grad is None for weight in weights]
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    presence = gradients[0].new_tensor([0.0 if missing else 1.0 for missing in is_missing])
    message = torch.cat([*(gradient.flatten() for gradient in gradients), presence])
    *means, presence = accelerator.reduce(message, "mean").split(
        [*(weight.numel() for weight in weights), len(weights)]
    )
    # A weight without a gradient in any process must keep None, for example when all samples went
    # to the other of two denoisers: on a zero gradient, momentum and weight decay make a step.
    # Reading the shares waits for the device, so it is done only if a gradient is missing.
    shares = presence.tolist() if any(is_missing) else [1.0] * len(weights)
    for weight, mean, share in zip(weights, means, shares, strict=True):
        weight.grad = mean.view_as(weight) if share else None


def max_over_processes(accelerator: Any, number: int) -> int:
    """Return the largest of the numbers that all processes call this with."""
    numbers = accelerator.gather(torch.tensor([number], device=accelerator.device))
    return int(numbers.max())


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect stop signals in a list instead of ending the process.

    The signals are SIGINT (Ctrl-C), SIGTERM, SIGHUP and, on Windows, SIGBREAK. A second signal has
    its previous effect, except SIGHUP. A SIGHUP that is ignored, as under nohup, stays ignored.

    Yields:
        The received signal numbers.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    numbers = [getattr(signal, name) for name in _STOP_SIGNALS if hasattr(signal, name)]
    previous = {number: signal.getsignal(number) for number in numbers}
    hangup = getattr(signal, "SIGHUP", None)
    if previous.get(hangup) is signal.SIG_IGN:
        del previous[hangup]

    def record_signal(number: int, frame: object) -> None:
        received.append(number)
        for other, handler in previous.items():
            # When a terminal closes, the system and the shell both send SIGHUP.
            if other != hangup:
                signal.signal(other, handler)

    for number in previous:
        signal.signal(number, record_signal)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
