"""The loop: batches, gradients and steps of the optimizer, and what is written on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from customize.errors import TrainingError, TrainingStopped
from customize.families import Family
from customize.training import checkpoint as checkpoints
from customize.training import distributed
from customize.training.checkpoint import Checkpoint
from customize.training.config import TrainConfig
from customize.training.finite_checks import suggest_base_fix
from customize.training.losses import TrainingLosses
from customize.training.progress import Progress
from customize.training.samples import SampleImages
from customize.training.trainable import Trainable
from customize.training.validation_images import ValidationImages

OnStep = Callable[[int, Tensor], object]

_FUSED = ("cuda", "cpu", "mps", "xpu")  # devices on which torch's AdamW is one kernel


def run_training_loop(
    config: TrainConfig,
    family: Family,
    trainable: Trainable,
    losses: TrainingLosses,
    start: Checkpoint | None,
    folder: Path,
    settings: Mapping[str, Any],
    *,
    accelerator: Any,
    device: torch.device,
    validations: Sequence[ValidationImages | SampleImages],
    progress: Progress,
    on_step: OnStep | None,
) -> tuple[list[list[float]], float]:
    """Train to ``config.steps``; what trains is changed in place.

    Args:
        config: of the run.
        start: where to go on from; None: from the beginning.
        folder: of the checkpoints.
        settings: to be written into them.

    Returns:
        [step, mean loss] pairs, and the seconds a step took.
    """
    parameters = trainable.named_parameters()
    weights = list(parameters.values())
    groups = trainable.parameter_groups(family, config)
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=device.type in _FUSED)
    scaler = torch.amp.GradScaler(device.type, enabled=config.mixed_precision == "fp16")
    history: list[list[float]] = []
    sketches = trainable.slice_sketches()
    if start is not None:
        checkpoints.check_slices_match(start, sketches, folder)
        checkpoints.restore_state(start, parameters, optimizer, scaler)
        history = [list(pair) for pair in start.history]

    accumulate = config.gradient_accumulation
    first = start.step if start else 0
    seen: list[Tensor] = []
    paused, began = 0.0, time.perf_counter()

    with (
        distributed.stop_signals() as stop,
        progress.bar(config.steps, "learning", "step", first) as bar,
    ):
        for step in range(first, config.steps):
            rate = learning_rate_factor(step, config.steps, config.warmup_steps, config.lr_schedule)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate

            total = torch.zeros((), device=device)
            for micro in range(accumulate):
                place = micro * accelerator.num_processes + accelerator.process_index
                for loss in losses.batch_losses(
                    step, place, accumulate * accelerator.num_processes
                ):
                    scaler.scale(loss).backward()
                    total += loss.detach()
            text_loss = losses.text_encoder_loss(step)
            if text_loss is not None:
                scaler.scale(text_loss).backward()
                total += text_loss.detach()

            if accelerator.num_processes > 1:
                distributed.average_gradients(accelerator, weights)
            scaler.unscale_(optimizer)
            trainable.add_penalty_grad()
            if config.max_grad_norm:
                clip_grad_norm_(weights, config.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            trainable.clamp_norms_()

            # Nothing above waits for the device; reading the losses does, so it is done rarely.
            seen.append(total)
            done = step + 1
            bar.update()
            if on_step is not None:
                on_step(done, total)
            last = done == config.steps
            stopping = bool(stop) and accelerator.num_processes == 1
            saving = config.checkpoint_every and (last or done % config.checkpoint_every == 0)
            if last or saving or stopping or done % config.log_every == 0:
                untouched = partial(suggest_base_fix, family, config.mixed_precision == "fp16")
                loss_now, stopping = _read_losses(
                    seen, bool(stop), accelerator, step, folder, untouched
                )
                seen.clear()
                history.append([done, loss_now])
                bar.set_postfix(loss=f"{loss_now:.4f}", refresh=False)
                rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
                accelerator.log({"loss": loss_now} | rates, step=done)
            if saving or stopping:
                paused -= time.perf_counter()
                if accelerator.is_main_process:
                    state = checkpoints.capture_state(
                        done, parameters, optimizer, scaler, settings, history, sketches
                    )
                    checkpoints.save_checkpoint(folder, state, config.keep_checkpoints)
                paused += time.perf_counter()
            if stopping and not last:
                raise TrainingStopped(
                    f"training was stopped after step {done} of {config.steps}",
                    where=folder,
                    fix="run the same again to go on from there"
                    if config.resume
                    else "run it again, and set resume to true (--resume), to go on from there",
                )
            paused -= time.perf_counter()
            for validation in validations:
                validation.draw_if_due(done)
            paused += time.perf_counter()
    for validation in validations if first == config.steps else ():
        validation.draw_if_due(first)  # cut off after the last step, before anything was saved
    checkpoints.check_finite(config.steps, parameters)
    seconds = time.perf_counter() - began - paused
    return history, seconds / max(config.steps - first, 1)


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The share of the full learning rate at a step, from 0: up over the warm-up, then down to 0
    on a line or half a cosine, or constant."""
    if step < warmup:
        return (step + 1) / warmup
    along = (step - warmup) / (steps - warmup)
    if schedule == "linear":
        return 1.0 - along
    return 0.5 * (1.0 + math.cos(math.pi * along)) if schedule == "cosine" else 1.0


def _read_losses(
    losses: Sequence[Tensor],
    stop: bool,
    accelerator: Any,
    step: int,
    folder: Path,
    cause: Callable[[], str],
) -> tuple[float, bool]:
    """The mean loss over steps and processes, and whether any process is to stop.

    Args:
        cause: what to do where the very first loss is not finite, as nothing is learned by then.

    Raises:
        TrainingError: a loss is not finite.
    """
    values = torch.stack([*losses, losses[0].new_tensor(float(stop))])
    *found, stopping = accelerator.reduce(values, "mean").tolist()
    if not all(map(math.isfinite, found)):
        bad = next(i for i, loss in enumerate(found) if not math.isfinite(loss))
        first = step - len(found) + bad + 2
        what = f"the loss is {found[bad]} at step {first}"
        if first == 1:
            raise TrainingError(
                f"{what}, before anything was learned, so it comes from the base or the pictures",
                fix=cause(),
            )
        fix = "lower the learning rates, or set mixed_precision to bf16 (--mixed-precision bf16)"
        left = checkpoints.latest_step(folder)
        if left is None:
            raise TrainingError(what, fix=fix)
        raise TrainingError(
            f"{what}; the state of step {left} is kept",
            where=folder,
            fix=f"{fix}, and train into another output folder, or set resume to false "
            "(--no-resume), which deletes what is kept",
        )
    return sum(found) / len(found), stopping > 0
