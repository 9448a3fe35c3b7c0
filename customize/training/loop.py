"""Learning one concept: :func:`train` prepares and tidies up, :func:`optimise` is the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from customize.concepts import files
from customize.concepts.adapter import Factors
from customize.concepts.concept import Concept
from customize.concepts.phrases import common
from customize.errors import TrainingError, TrainingStopped
from customize.families import Family, family_of
from customize.training import base, cache, inputs, preserving, process, record, setup
from customize.training import checkpoint as checkpoints
from customize.training.checkpoint import BASE_CONFIG, BASE_WEIGHTS, SHARED, Checkpoint
from customize.training.claim import claimed_slice
from customize.training.compiling import check_compiler, compiled
from customize.training.config import TrainConfig
from customize.training.losses import Losses
from customize.training.prior import class_samples_of
from customize.training.trainable import Trainable, basis_of, check_texts, trained_in
from customize.training.validation import Validation

OnStep = Callable[[int, Tensor], object]

_FUSED = ("cuda", "cpu", "mps", "xpu")  # devices on which torch's AdamW is one kernel


def train(
    config: TrainConfig,
    components: Mapping[str, Any] | None = None,
    progress: bool = True,
    on_step: OnStep | None = None,
    pipeline_config: Mapping[str, Any] | None = None,
) -> Concept:
    """Learn a concept, save it to ``config.output`` and return it.

    Settings and pictures are checked before a model is loaded. A run that was cut off goes on
    from its newest checkpoint and gives the same adapter, on a CPU to the bit, as one that was
    not; a concept that is finished already is read and returned.

    Args:
        config: what to learn, from what, and how.
        components: the parts of a pipeline in memory (``pipe.components``); they are used in
            place, and left bit for bit as they were, also after an error. None: load
            ``config.base``.
        progress: show a bar with the loss and the time left.
        on_step: called after each step with its number, from 1, and its loss, a scalar on the
            device; reading the loss waits for the device.
        pipeline_config: with components, what their pipeline keeps beside them (``pipe.config``);
            families that read it are klein's ``flux2``, ``krea2``, ``qwen_image_21`` and ``wan``
            with two transformers. None: the pipeline's defaults.

    Raises:
        ConfigError, DataError: a setting or a picture is unusable.
        PipelineError: the base cannot be loaded or trained.
        SettingsError: the output folder holds this concept, made with other settings or of a base
            that was other in weights or configuration; or its slice was taken while it was cut off.
        StorageError: the output folder holds something else or cannot be written.
        TrainingError: the loss or what is learned is no longer finite.
        TrainingStopped: Ctrl-C or SIGTERM; a checkpoint is saved.
    """
    samples, class_samples = setup.read_pictures(config, base.resolution_of(config, components))
    files.check_folder(config.output, config.name)
    files.check_writable(config.output)
    accelerator = process.make_accelerator(config)
    device = process.choose_device(config, accelerator)
    setup.check_quantized(config, components, device)
    if config.compile:
        check_compiler(device)

    folder = config.output / ".checkpoints"
    start = checkpoints.latest(folder) if config.resume else None
    done = record.finished(config) if config.resume else None
    weights = base.weights_of(config.base, components)
    settings_after = partial(
        record.run_settings,
        config,
        record.digest(samples),
        record.digest(class_samples),
        weights,
        base.configured_of(components, pipeline_config),
        accelerator.num_processes,
    )
    settings = settings_after(start.settings if start is not None else None)
    if done is not None:
        before: Any = done.info.training.get("settings")
        # Else a run that is to replace the finished concept was cut off: it goes on.
        if (
            start is None
            or start.settings == before
            or checkpoints.differences(start.settings, settings)
        ):
            record.check_finished(done, settings_after(before), config)
            return done
    elif start is not None:
        checkpoints.check_settings(start, settings, folder)

    own = components is None
    autocast = process.make_autocast(config, device)
    record.reset_peak_memory(device)
    with ExitStack() as stack:
        if components is None:
            parts, pipeline_config = setup.load_base(config)
        else:
            parts = dict(components)
        family = family_of(parts, pipeline_config or {})
        resolution = setup.check_fits(family, config)
        if own:
            setup.freeze(parts)
            setup.put_away(family, family.unused, free=True)
        else:
            stack.enter_context(setup.borrowed(parts))
        fingerprint = family.fingerprint()
        if not weights:  # of a hub id that was not here yet
            weights = base.weights_on_disk(config.base) or base.weights_of("", family.components)
        settings |= {BASE_WEIGHTS: weights, BASE_CONFIG: family.configured()}
        setup.quantize_denoisers(family, config, device)
        before = None if start is None else start.settings
        generic: Factors = {}
        if config.method == "orthogonal" and config.avoid:
            generic, settings[SHARED] = inputs.shared_directions(
                config, family, weights, resolution, device, accelerator, autocast
            )
        basis = basis_of(config, settings[SHARED])
        settings["slice"] = stack.enter_context(
            claimed_slice(config, family, basis, before, accelerator)
        )
        del parts  # what the family then lets go of is freed, if it is our own
        if start is not None:
            checkpoints.check_settings(start, settings, folder)

        # Pictures are encoded once; then the autoencoder only waits for validation.
        family.vae.to(device)
        if config.prior_weight and not class_samples:
            class_samples = class_samples_of(
                config, family, weights, resolution, device, accelerator, autocast, progress
            )
        pictures = cache.prepare_pictures(
            family,
            [*samples, *class_samples],
            resolution,
            device,
            flip=config.flip,
            keep_latents=config.cache_latents,
            buckets=config.buckets,
        )
        concept_pictures = len(samples)
        del samples, class_samples  # photographs can be large
        if config.cache_latents:
            free = own and not config.validation_prompts
            setup.put_away(family, {"vae": family.vae}, free=free)

        # Prompts are encoded once, or at each step, by those encoders in which something trains.
        live = (config.train_tokens or config.train_text_encoder) and bool(family.text_encoders)
        setup.place(family.all_text_encoders, device)
        resting = family.all_text_encoders
        if live:
            resting = {k: v for k, v in resting.items() if k in family.other_encoders}
        trainable = stack.enter_context(
            trained_in(family, config, settings["slice"], basis, generic)
        )
        check_texts(family, trainable, "caption", pictures.captions)
        check_texts(family, trainable, "validation prompt", config.validation_prompts)
        check_texts(family, trainable, "phrase", preserving.texts_of(config))
        named = pictures.captions[:concept_pictures]
        more = [*inputs.prompts_of(config), *preserving.captions_of(config, named)]
        with autocast():
            encode = cache.prepare_conditions(
                family,
                [*pictures.captions, "", *config.validation_prompts, *more],
                live=live,
                to_encoder=trainable.expanded,
            )
        if trainable.layers:
            encode = cache.by_layer(encode, trainable.wordings)
        preserved = preserving.prepare(config, family, trainable, named, encode, autocast)
        setup.put_away(family, resting, free=own)
        del resting

        setup.place(family.denoisers, device)
        for denoiser in family.denoisers.values():
            if config.gradient_checkpointing and not denoiser.is_gradient_checkpointing:
                denoiser.enable_gradient_checkpointing()
                stack.callback(denoiser.disable_gradient_checkpointing)
        if config.compile:  # with what was attached
            stack.enter_context(compiled(family.denoisers.values()))
        validation = Validation(config, family, encode, pictures.shape, autocast, accelerator)
        accelerator.init_trackers("customize", config=record.plain(settings))
        stack.callback(accelerator.end_training)
        if start is None and accelerator.is_main_process:
            checkpoints.clear(folder)
        accelerator.wait_for_everyone()

        losses = Losses(
            config,
            family,
            trainable,
            pictures,
            concept_pictures,
            encode,
            preserved,
            autocast,
            device,
        )
        history, seconds = optimise(
            config,
            family,
            trainable,
            losses,
            start,
            settings,
            accelerator=accelerator,
            device=device,
            validation=validation,
            progress=progress,
            on_step=on_step,
        )
        training = record.training_facts(settings, history, seconds, device)
        training["captions_share"] = common(
            pictures.captions[:concept_pictures], (config.trigger, config.class_word)
        )
        info = record.facts(config, family, trainable, fingerprint, training)
        concept = Concept(info, trainable.adapter.products(), trainable.embeddings(), config.output)
        if accelerator.is_main_process:
            concept.save(config.output, validation.last)
            if config.record_inputs:
                inputs.write_record(
                    config, family, trainable, concept, encode, pictures.shape, autocast
                )
        accelerator.wait_for_everyone()
    return concept


def optimise(
    config: TrainConfig,
    family: Family,
    trainable: Trainable,
    losses: Losses,
    start: Checkpoint | None,
    settings: Mapping[str, Any],
    *,
    accelerator: Any,
    device: torch.device,
    validation: Validation,
    progress: bool,
    on_step: OnStep | None,
) -> tuple[list[list[float]], float]:
    """Train to ``config.steps``; what trains is changed in place.

    Args:
        start: where to go on from; None: from the beginning.

    Returns:
        [step, mean loss] pairs, and the seconds a step took.
    """
    folder = config.output / ".checkpoints"
    parameters = trainable.named()
    weights = list(parameters.values())
    groups = trainable.groups(family, config)
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=device.type in _FUSED)
    scaler = torch.amp.GradScaler(device.type, enabled=config.mixed_precision == "fp16")
    history: list[list[float]] = []
    if start is not None:
        checkpoints.restore(start, parameters, optimizer, scaler)
        history = [list(pair) for pair in start.history]

    accumulate = config.gradient_accumulation
    first = start.step if start else 0
    seen: list[Tensor] = []
    paused, began = 0.0, time.perf_counter()

    with (
        process.stop_signals() as stop,
        process.bar(config.steps, first, progress, accelerator) as bar,
    ):
        for step in range(first, config.steps):
            rate = learning_rate(step, config.steps, config.warmup_steps, config.lr_schedule)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate

            total = torch.zeros((), device=device)
            for micro in range(accumulate):
                turn = (step * accumulate + micro) * accelerator.num_processes
                turn += accelerator.process_index
                for loss in losses.of_batch(step, turn):
                    scaler.scale(loss).backward()
                    total += loss.detach()
            text_loss = losses.of_texts(step)
            if text_loss is not None:
                scaler.scale(text_loss).backward()
                total += text_loss.detach()

            if accelerator.num_processes > 1:
                process.average_gradients(accelerator, weights)
            scaler.unscale_(optimizer)
            trainable.add_held()
            if config.max_grad_norm:
                clip_grad_norm_(weights, config.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            for rows in trainable.rows.values():
                rows.clamp_norm_()

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
                loss_now, stopping = _read_losses(seen, bool(stop), accelerator, step, folder)
                seen.clear()
                history.append([done, loss_now])
                bar.set_postfix(loss=f"{loss_now:.4f}", refresh=False)
                rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
                accelerator.log({"loss": loss_now} | rates, step=done)
            if saving or stopping:
                paused -= time.perf_counter()
                if accelerator.is_main_process:
                    state = checkpoints.state_of(
                        done, parameters, optimizer, scaler, settings, history
                    )
                    checkpoints.save(folder, state, config.keep_checkpoints)
                paused += time.perf_counter()
            if stopping and not last:
                raise TrainingStopped(
                    f"training was stopped after step {done} of {config.steps}",
                    where=folder,
                    fix="run the same again to go on from there"
                    if config.resume
                    else "run it again with resume set to true to go on from there",
                )
            if validation.due(done):
                paused -= time.perf_counter()
                validation.draw(done)
                paused += time.perf_counter()
    if first == config.steps and validation.due(first):
        validation.draw(first)  # cut off after the last step, before the concept was saved
    checkpoints.check_finite(config.steps, parameters)
    seconds = time.perf_counter() - began - paused
    return history, seconds / max(config.steps - first, 1)


def learning_rate(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The share of the full learning rate at a step, from 0: up over the warm-up, then down to 0
    on a line or half a cosine, or constant."""
    if step < warmup:
        return (step + 1) / warmup
    along = (step - warmup) / (steps - warmup)
    if schedule == "linear":
        return 1.0 - along
    return 0.5 * (1.0 + math.cos(math.pi * along)) if schedule == "cosine" else 1.0


def _read_losses(
    losses: Sequence[Tensor], stop: bool, accelerator: Any, step: int, folder: Path
) -> tuple[float, bool]:
    """The mean loss over steps and processes, and whether any process is to stop.

    Raises:
        TrainingError: a loss is not finite.
    """
    values = torch.stack([*losses, losses[0].new_tensor(float(stop))])
    *found, stopping = accelerator.reduce(values, "mean").tolist()
    if not all(map(math.isfinite, found)):
        bad = next(i for i, loss in enumerate(found) if not math.isfinite(loss))
        what = f"the loss is {found[bad]} at step {step - len(found) + bad + 2}"
        fix = "lower the learning rates, or set mixed_precision to bf16 or no"
        left = checkpoints.newest_step(folder)
        if left is None:
            raise TrainingError(what, fix=fix)
        raise TrainingError(
            f"{what}; the state of step {left} is kept",
            where=folder,
            fix=f"{fix}, and train into another output folder, or set resume to false, which "
            "deletes what is kept",
        )
    return sum(found) / len(found), stopping > 0
