"""The training loop: batches, gradients, optimizer steps, logging and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from customize.errors import TrainingError, TrainingStopped
from customize.training.checkpoint import (
    Checkpoint,
    check_finite,
    latest_step,
    save_checkpoint,
)
from customize.training.distributed import stop_signals
from customize.training.loop_settings import LoopSettings
from customize.training.optimization import Optimization
from customize.training.progress import Progress
from customize.training.training_task import TrainingTask

#: Called after each step with its number, from 1, and its loss, a scalar on the device.
OnStep = Callable[[int, Tensor], object]


class StepImages(Protocol):
    """Images that are drawn after some of the steps."""

    def draw_if_due(self, step: int) -> None:
        """Draw the images if they are due after this step."""


class LoopRun(Protocol):
    """What the loop reads of a run."""

    @property
    def config(self) -> LoopSettings:
        """The settings of the loop."""

    @property
    def accelerator(self) -> Any:
        """The ``accelerate.Accelerator`` of this process."""

    @property
    def device(self) -> torch.device:
        """Device of the parameters and losses."""

    @property
    def progress(self) -> Progress:
        """Shows the bar."""


def run_training_loop(
    run: LoopRun,
    optimization: Optimization,
    checkpoint: Checkpoint | None,
    folder: Path,
    settings: Mapping[str, Any],
    step_images: Sequence[StepImages],
    on_step: OnStep | None,
) -> tuple[list[list[float]], float]:
    """Train the parameters of a task in place up to ``config.steps``.

    Args:
        run: The run, with everything attached and encoded.
        optimization: The task and the steps on its parameters.
        checkpoint: Checkpoint to resume from; None: start at the first step.
        folder: Folder of the run's checkpoints.
        settings: Settings to write into checkpoints.
        step_images: Images to draw while training; their time does not count.
        on_step: Called after each step.

    Returns:
        Pairs of step and mean loss, and the seconds per step.

    Raises:
        SettingsError: The checkpoint does not fit the task.
        TrainingError: A loss or a trained parameter is not finite.
        TrainingStopped: A stop signal arrived, and a checkpoint is written.
    """
    config, accelerator = run.config, run.accelerator
    task = optimization.task
    history: list[list[float]] = []
    if checkpoint is not None:
        task.check_checkpoint(checkpoint, folder)
        optimization.restore(checkpoint)
        history = [list(pair) for pair in checkpoint.history]

    first = checkpoint.step if checkpoint else 0
    accumulation = config.gradient_accumulation
    batches = accumulation * accelerator.num_processes
    unread_losses: list[Tensor] = []
    paused, started = 0.0, time.perf_counter()

    with (
        stop_signals() as received,
        run.progress.bar(config.steps, "learning", "step", first) as bar,
    ):
        for step in range(first, config.steps):
            factor = learning_rate_factor(
                step, config.steps, config.warmup_steps, config.lr_schedule
            )
            optimization.set_learning_rates(factor)

            total = torch.zeros((), device=run.device)
            for micro_batch in range(accumulation):
                batch = micro_batch * accelerator.num_processes + accelerator.process_index
                for loss in task.losses(step, batch, batches):
                    optimization.backward(loss)
                    total += loss.detach()
            step_loss = task.step_loss(step)
            if step_loss is not None:
                optimization.backward(step_loss)
                total += step_loss.detach()
            optimization.step()

            # Nothing above waits for the device. Reading the losses does, so it is done rarely.
            unread_losses.append(total)
            done = step + 1
            bar.update()
            if on_step is not None:
                on_step(done, total)
            is_last = done == config.steps
            stopping = bool(received) and accelerator.num_processes == 1
            saving = config.checkpoint_every and (is_last or done % config.checkpoint_every == 0)
            if is_last or saving or stopping or done % config.log_every == 0:
                mean_loss, stopping = _read_losses(
                    run, task, unread_losses, bool(received), step, folder
                )
                unread_losses.clear()
                history.append([done, mean_loss])
                bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
                rates = optimization.learning_rates()
                accelerator.log({"loss": mean_loss} | rates, step=done)
            pause_started = time.perf_counter()
            if saving or stopping:
                state = optimization.capture(done, settings, history)
                if accelerator.is_main_process:
                    save_checkpoint(folder, state, config.keep_checkpoints)
            if stopping and not is_last:
                raise TrainingStopped(
                    f"training was stopped after step {done} of {config.steps}",
                    where=folder,
                    fix="run the same again to resume from there"
                    if config.resume
                    else "run it again, and set resume to true (--resume), to resume from there",
                )
            for images in step_images:
                images.draw_if_due(done)
            paused += time.perf_counter() - pause_started
    if first == config.steps:  # a resumed run that ended after the last step, before saving
        for images in step_images:
            images.draw_if_due(first)
    check_finite(config.steps, optimization.parameters)
    seconds = time.perf_counter() - started - paused
    return history, seconds / max(config.steps - first, 1)


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Return the fraction of the peak learning rate at a step.

    Args:
        step: Number of the step, from 0.
        steps: Number of all steps.
        warmup: Number of steps with a linear increase.
        schedule: After the warm-up "constant", "linear" to 0, or "cosine" to 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0


def _read_losses(
    run: LoopRun,
    task: TrainingTask,
    losses: Sequence[Tensor],
    stop: bool,
    step: int,
    folder: Path,
) -> tuple[float, bool]:
    """The mean loss over steps and processes, and whether any process received a stop signal.

    Raises:
        TrainingError: A loss is not finite.
    """
    values = torch.stack([*losses, losses[0].new_tensor(float(stop))])
    *means, stopping = run.accelerator.reduce(values, "mean").tolist()
    if not all(map(math.isfinite, means)):
        position = next(i for i, loss in enumerate(means) if not math.isfinite(loss))
        bad_step = step - len(means) + position + 2
        problem = f"the loss is {means[position]} at step {bad_step}"
        if bad_step == 1:
            raise TrainingError(
                f"{problem}, before the first update, so the cause is the base or the images",
                fix=task.suggest_fix(),
            )
        fix = "lower the learning rates, or set mixed_precision to bf16 (--mixed-precision bf16)"
        saved_step = latest_step(folder)
        if saved_step is None:
            raise TrainingError(problem, fix=fix)
        raise TrainingError(
            f"{problem}; the checkpoint of step {saved_step} is kept",
            where=folder,
            fix=f"{fix}, and train into another output folder, or set resume to false "
            "(--no-resume), which deletes the checkpoints",
        )
    return sum(means) / len(means), stopping > 0
