"""The recipe of a training of references: :func:`train_references`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from customize.concepts.io.folder_lock import lock_folder
from customize.concepts.io.output_folder import check_writable
from customize.core.precision import full_precision
from customize.families import family_of
from customize.references.model import ReferenceModel
from customize.references.seams import seam_of
from customize.references.write_model import check_model_folder
from customize.training.base_fingerprint import weight_digests
from customize.training.checkpoint import (
    BASE_CONFIG,
    BASE_WEIGHTS,
    Checkpoint,
    check_settings_match,
    checkpoint_folder,
    delete_checkpoints,
)
from customize.training.distributed import (
    create_accelerator,
    create_autocast,
    run_on_main_process,
    training_device,
)
from customize.training.loop import OnStep, run_training_loop
from customize.training.optimization import Optimization
from customize.training.prepare_base import move_to_device, offload
from customize.training.progress import Progress
from customize.training.references.config import ReferenceTrainConfig
from customize.training.references.group_dataset import GroupDataset
from customize.training.references.load_models import (
    add_attributes,
    check_model,
    initial_digest,
    load_base,
    load_reference_model,
)
from customize.training.references.output import (
    find_reference_state,
    reference_settings,
    write_training_facts,
)
from customize.training.references.reference_inputs import (
    cache_groups,
    cache_prompts,
    data_digests,
    read_groups,
)
from customize.training.references.reference_run import ReferenceRun
from customize.training.references.reference_task import ReferenceTask
from customize.training.references.sharding import (
    choose_sharding,
    gather,
    shard,
    zero_options,
)
from customize.training.references.trained_parts import TrainedParts
from customize.training.references.validation_sheets import ValidationSheets
from customize.training.references.zero_optimization import ZeroOptimization
from customize.training.run_metadata import tracker_config


def train_references(
    config: ReferenceTrainConfig,
    components: Mapping[str, Any] | None = None,
    dataset: GroupDataset | None = None,
    model: ReferenceModel | None = None,
    progress: bool = True,
    on_step: OnStep | None = None,
    pipeline_config: Mapping[str, Any] | None = None,
) -> ReferenceModel:
    """Train one stage, save the references to ``config.output`` and return them.

    Settings and images are checked before a model is loaded. An interrupted run resumes from its
    newest checkpoint and gives the same references as an uninterrupted one, on a CPU bit for bit.
    Finished references are loaded and returned.

    Args:
        config: The settings.
        components: Components of a pipeline in memory (``pipe.components``), restored bit for bit
            at the end. None: load ``config.base``.
        dataset: Samples instead of those of ``config.images``.
        model: References in memory instead of those of ``config.init``; trained in place. A sharded
            training that fails leaves them without weights.
        progress: Whether to show a progress bar with the loss and the remaining time.
        on_step: Called after each step with its number, from 1, and its loss, a scalar on the
            device. Reading the loss waits for the device.
        pipeline_config: With components, the configuration of their pipeline (``pipe.config``).

    Raises:
        ConfigError: A setting is invalid, or a model does not fit the others.
        DataError: An image, caption or metadata file is invalid, or has no groups for the stage.
        PipelineError: The base cannot be loaded, or its denoiser reads no reference tokens.
        SettingsError: The output folder has a checkpoint or references of other settings.
        StorageError: The output folder has something else, cannot be written, or is in use.
        TrainingError: The loss or a trained parameter is not finite.
        TrainingStopped: The run was stopped by Ctrl-C or SIGTERM, and a checkpoint is saved.
    """
    config.check_sources(has_dataset=dataset is not None, has_model=model is not None)
    with full_precision(tf32=True), torch.enable_grad(), ExitStack() as cleanup:
        run = start_run(config, components, Progress(progress), cleanup)
        return run_recipe(run, components, dataset, model, on_step, pipeline_config or {})


def run_recipe(
    run: ReferenceRun,
    components: Mapping[str, Any] | None,
    dataset: GroupDataset | None,
    model: ReferenceModel | None,
    on_step: OnStep | None,
    pipeline_config: Mapping[str, Any],
) -> ReferenceModel:
    """Run the steps of the recipe; the arguments are those of :func:`train_references`."""
    config = run.config
    groups = None if dataset is not None else read_groups(config, config.images, run)
    validation_groups = read_groups(config, config.validation_images, run)
    settings = reference_settings(
        config,
        data_digests(groups, dataset),
        initial_digest(config, model),
        run.weights,
        family_of(components, pipeline_config).relevant_config() if components else None,
        run.accelerator.num_processes,
    )
    checkpoint, finished = find_reference_state(config, settings)
    if finished is not None:
        return finished

    load_base(run, components, pipeline_config)
    settings |= {BASE_WEIGHTS: dict(run.weights), BASE_CONFIG: run.family.relevant_config()}
    if checkpoint is not None:
        check_settings_match(checkpoint, settings, checkpoint_folder(config))
    if model is None:
        with run.progress.phase("loading the encoder"):
            model = load_reference_model(config, run.family)
    else:
        check_model(model, run.family, "model")
    run.model = model
    if dataset is None:
        assert groups is not None
        dataset = cache_groups(run, groups)
    run.dataset = dataset
    add_attributes(model, dataset)
    shown = dataset if validation_groups is None else cache_groups(run, validation_groups)
    keeps_autoencoder = config.validation_groups or not config.cache_latents
    offload(run.family, {"vae": run.family.vae}, free=run.owns_base and not keeps_autoencoder)
    known = [part for part in (groups, validation_groups) if part is not None]
    cache_prompts(run, known if groups is not None else None)
    attach_references(run)
    return train_and_save(run, checkpoint, settings, shown, on_step)


def start_run(
    config: ReferenceTrainConfig,
    components: Mapping[str, Any] | None,
    progress: Progress,
    cleanup: ExitStack,
) -> ReferenceRun:
    """Check and lock the output folder, and choose device and precision.

    Raises:
        ConfigError: The device, precision or tracker is not available, or accelerate is configured
            for something that does not work here.
        StorageError: The output folder contains something else, cannot be written, or is in use.
    """
    check_model_folder(config.output)
    check_writable(config.output)
    accelerator = create_accelerator(config)
    sharding = choose_sharding(accelerator, config)

    def lock_output() -> None:
        cleanup.enter_context(lock_folder(config.output))

    run_on_main_process(accelerator, lock_output)
    device = training_device(config, accelerator)
    return ReferenceRun(
        config,
        accelerator,
        device,
        create_autocast(config, device),
        progress,
        cleanup,
        sharding,
        owns_base=components is None,
        weights=weight_digests(config.base, components, config.variant),
    )


def attach_references(run: ReferenceRun) -> None:
    """Move the models to the device and attach the adapter to the denoiser."""
    move_to_device(run.family.denoisers, run.device)
    run.parts = TrainedParts(run.model.encoder, run.model.adapter)
    if run.is_sharded:
        run.parts = shard(run.parts, run.sharding, run.accelerator)
    else:
        run.parts.to(run.device)
    denoiser = run.family.denoiser
    if run.config.gradient_checkpointing:
        if not denoiser.is_gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
            run.cleanup.callback(denoiser.disable_gradient_checkpointing)
        encoder = run.parts.encoder
        encoder.mllm.gradient_checkpointing_enable()
        _set_checkpointing_mode(encoder, True)
        run.cleanup.callback(encoder.mllm.gradient_checkpointing_disable)
        run.cleanup.callback(_set_checkpointing_mode, encoder, False)
    seam = seam_of(run.family)
    run.attachment = run.cleanup.enter_context(seam.attached(denoiser, run.parts.adapter))


def _set_checkpointing_mode(encoder: nn.Module, training: bool) -> None:
    """Set the mode of the layers that checkpoint, which transformers reads; dropout stays off."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in encoder.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = training


def make_optimization(run: ReferenceRun) -> Optimization:
    """Return the optimizer steps on the trained parameters, by DeepSpeed if it is configured."""
    task = ReferenceTask(run)
    if run.sharding != "zero2":
        return Optimization(task, run.config, run.accelerator, run.device)
    return ZeroOptimization(
        task, run.config, run.accelerator, run.device, run.parts, zero_options(run.accelerator)
    )


def train_and_save(
    run: ReferenceRun,
    checkpoint: Checkpoint | None,
    settings: Mapping[str, Any],
    shown: GroupDataset,
    on_step: OnStep | None,
) -> ReferenceModel:
    """Train the parameters, and save the references with their facts.

    Args:
        run: The run, with everything attached and encoded.
        checkpoint: Checkpoint to resume from.
        settings: Settings of the run.
        shown: Groups of the validation sheets.
        on_step: See :func:`train_references`.
    """
    accelerator, config = run.accelerator, run.config
    optimization = make_optimization(run)
    sheets = ValidationSheets(run, shown)
    accelerator.init_trackers("customize", config=tracker_config(settings))
    run.cleanup.callback(accelerator.end_training)
    folder = checkpoint_folder(config)
    if checkpoint is None and accelerator.is_main_process:
        delete_checkpoints(folder)
    accelerator.wait_for_everyone()
    history, seconds_per_step = run_training_loop(
        run, optimization, checkpoint, folder, settings, [sheets], on_step
    )
    trained = TrainedParts(run.model.encoder, run.model.adapter)
    if run.is_sharded:
        gather(run.parts, trained)
    trained.requires_grad_(False)
    trained.to("cpu")
    if accelerator.is_main_process:
        with run.progress.phase("saving the references"):
            run.model.save_pretrained(config.output)
            write_training_facts(config, settings, history, seconds_per_step)
    accelerator.wait_for_everyone()
    return run.model
