"""The training recipe: :func:`train` learns a concept, :func:`train_jointly` several in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from customize.concepts.io.folder_lock import lock_folder
from customize.concepts.io.output_folder import check_output_folder, check_writable
from customize.concepts.io.write_concept import save_concept
from customize.concepts.slices.slice_reservations import delete_reservation
from customize.concepts.tokens.prompt_phrases import common_words
from customize.concepts.types import Concept
from customize.core.precision import full_precision
from customize.families import family_of
from customize.training.base_fingerprint import weight_digests
from customize.training.checkpoint import (
    JOINT_CONCEPTS,
    check_settings_match,
    checkpoint_folder,
    delete_checkpoints,
)
from customize.training.class_preservation import PreservationTargets
from customize.training.compile_blocks import check_compiler, compiled_blocks
from customize.training.concept_task import ConceptTask
from customize.training.config import TrainConfig
from customize.training.distributed import (
    create_accelerator,
    create_autocast,
    run_on_main_process,
    training_device,
)
from customize.training.joint_configs import check_joint_configs
from customize.training.layer_input_recording import record_concept_inputs
from customize.training.loop import OnStep, run_training_loop
from customize.training.optimization import Optimization
from customize.training.prepare_base import check_quantization, load_base, move_to_device
from customize.training.progress import Progress
from customize.training.resume import ResumeState, find_resume_state, has_recorded_inputs
from customize.training.run import Run
from customize.training.run_metadata import (
    concept_info,
    image_digests,
    run_settings,
    tracker_config,
    training_facts,
)
from customize.training.run_summary import show_run_summaries
from customize.training.samples import SampleImages, measure_fixed_noise_loss
from customize.training.slice_reservation import RunSlices, choose_slices
from customize.training.trainable import attach_trainable, slice_basis
from customize.training.training_inputs import cache_latents, cache_prompts, read_data
from customize.training.validation_images import ValidationImages
from customize.training.verdict import IdentityJudge, format_verdict


def train(
    config: TrainConfig,
    components: Mapping[str, Any] | None = None,
    progress: bool = True,
    on_step: OnStep | None = None,
    pipeline_config: Mapping[str, Any] | None = None,
) -> Concept:
    """Learn a concept, save it to ``config.output`` and return it.

    Settings and images are checked before a model is loaded. An interrupted run resumes from its
    newest checkpoint and gives the same concept as an uninterrupted one, on a CPU bit for bit. A
    finished concept is loaded and returned.

    Args:
        config: The settings.
        components: Components of a pipeline in memory (``pipe.components``). They are used in place
            and restored bit for bit at the end, also after an error. None: load ``config.base``.
        progress: Whether to show a progress bar with the loss and the remaining time.
        on_step: Called after each step with its number, from 1, and its loss, a scalar on the
            device. Reading the loss waits for the device.
        pipeline_config: With components, the configuration of their pipeline (``pipe.config``),
            which the families ``flux2`` (klein), ``krea2``, ``qwen_image_21`` and ``wan`` with two
            transformers read. None: the pipeline's defaults.

    Raises:
        ConfigError: A setting is invalid.
        DataError: An image or caption is invalid.
        PipelineError: The base cannot be loaded or trained.
        SettingsError: The output folder contains this concept, trained with other settings or from
            another base; or its slice was taken while the run was interrupted.
        StorageError: The output folder contains something else, cannot be written, or is in use by
            another run.
        TrainingError: The loss or a trained parameter is not finite.
        TrainingStopped: The run was stopped by Ctrl-C or SIGTERM, and a checkpoint is saved.
    """
    return train_jointly([config], components, progress, on_step, pipeline_config)[0]


def train_jointly(
    configs: Sequence[TrainConfig],
    components: Mapping[str, Any] | None = None,
    progress: bool = True,
    on_step: OnStep | None = None,
    pipeline_config: Mapping[str, Any] | None = None,
    judge: IdentityJudge | None = None,
) -> list[Concept]:
    """Learn several concepts in one run, save each to its own folder and return them.

    The adapters and tokens of all concepts are attached at once, and orthogonal slices are
    disjoint. The trained model equals the base with the sum of the concepts, as merged by
    ``load_custom``. Batches contain images of all concepts, equally many over time. Preservation
    losses have equal weights for all concepts. The order of the concepts does not change the
    result; checkpoints are in the folder of the concept whose name is alphabetically first.

    Args:
        configs: Settings of each concept. Those outside of
            :data:`customize.training.joint_configs.PER_CONCEPT_SETTINGS` must be equal in all.
            Captions may contain several triggers.
        components: See :func:`train`.
        progress: See :func:`train`.
        on_step: See :func:`train`.
        pipeline_config: See :func:`train`.
        judge: Judges whether a concept's last sample shows its subject, for the final line.

    Returns:
        The concepts, in the order of ``configs``.

    Raises:
        ConfigError: The concepts cannot be learned in one run; see
            :func:`customize.training.joint_configs.check_joint_configs`.
        SettingsError: See :func:`train`; also if the run had other concepts before.
        DataError, PipelineError, StorageError, TrainingError, TrainingStopped: See :func:`train`.
    """
    check_joint_configs(configs)
    requested, configs = configs, sorted(configs, key=lambda config: config.name)
    display = Progress(progress)
    # Losses and updates are in full precision, whatever the caller's context is; the base model has
    # an autocast context of its own.
    with full_precision(tf32=True), torch.enable_grad(), ExitStack() as cleanup:
        concepts = run_recipe(configs, components, pipeline_config, display, on_step, cleanup)
    for concept in concepts if display.shown else ():
        verdict = format_verdict(concept.info, judge and judge(concept.info))
        if verdict is not None:
            display.line(verdict)
    by_name = dict(zip((config.name for config in configs), concepts, strict=True))
    return [by_name[config.name] for config in requested]


def run_recipe(
    configs: Sequence[TrainConfig],
    components: Mapping[str, Any] | None,
    pipeline_config: Mapping[str, Any] | None,
    progress: Progress,
    on_step: OnStep | None,
    cleanup: ExitStack,
) -> list[Concept]:
    """Run the steps of the recipe, from reading the data to saving the concepts.

    Args:
        configs: Settings of each concept, sorted by name.
        components: See :func:`train`.
        pipeline_config: See :func:`train`.
        progress: Shows phases and bars.
        on_step: See :func:`train`.
        cleanup: Undoes all changes to the models when it is closed.
    """
    data = read_data(configs, components, progress)
    run = start_run(configs, components, progress, cleanup)
    base_config = (
        family_of(components, pipeline_config or {}).relevant_config() if components else None
    )
    state = find_resume_state(
        configs,
        partial(
            run_settings,
            configs,
            [image_digests(images) for images in data.images],
            [image_digests(images) for images in data.class_images],
            run.weights,
            base_config,
            run.accelerator.num_processes,
        ),
    )
    if state.finished is not None:
        for config in configs if run.accelerator.is_main_process else ():
            delete_reservation(config.output)  # if the run ended before it did
        return state.finished

    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    load_base(run, components, pipeline_config)
    show_run_summaries(run, data.images, data.class_images)
    slices = choose_slices(run, state)
    if state.checkpoint is not None:
        check_settings_match(state.checkpoint, slices.settings[0], checkpoint_folder(run.config))
    cache_latents(run, data)
    del data  # photographs can be large
    attach_adapters(run, slices)
    targets = cache_prompts(run)
    prepare_denoisers(run)
    if state.saved is not None:
        return record_missing_inputs(run, state.saved)
    return train_and_save(run, state, slices.settings, targets, on_step)


def start_run(
    configs: Sequence[TrainConfig],
    components: Mapping[str, Any] | None,
    progress: Progress,
    cleanup: ExitStack,
) -> Run:
    """Check and lock the output folders, and choose device and precision.

    Raises:
        ConfigError: The device, precision, quantization, compilation or tracker is not available.
        StorageError: An output folder contains something else, cannot be written, or is in use.
    """
    for config in configs:
        check_output_folder(config.output, config.name)
        check_writable(config.output)
    config = configs[0]
    accelerator = create_accelerator(config)

    def lock_outputs() -> None:
        for config in configs:
            cleanup.enter_context(lock_folder(config.output))

    run_on_main_process(accelerator, lock_outputs)
    device = training_device(config, accelerator)
    check_quantization(config, components, device)
    if config.compile:
        check_compiler(device)
    return Run(
        configs,
        accelerator,
        device,
        create_autocast(config, device),
        progress,
        cleanup,
        owns_base=components is None,
        weights=weight_digests(config.base, components, config.variant),
    )


def attach_adapters(run: Run, slices: RunSlices) -> None:
    """Attach the adapters and tokens of all concepts, with the text encoders on the device."""
    move_to_device(run.family.all_text_encoders, run.device)
    basis = slice_basis(run.config, slices.shared)
    run.trainable = run.cleanup.enter_context(
        attach_trainable(run.family, run.configs, slices.indices, basis, slices.directions)
    )


def prepare_denoisers(run: Run) -> None:
    """Move the denoisers to the device, with gradient checkpointing and compilation."""
    move_to_device(run.family.denoisers, run.device)
    for denoiser in run.family.denoisers.values():
        if run.config.gradient_checkpointing and not denoiser.is_gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
            run.cleanup.callback(denoiser.disable_gradient_checkpointing)
    if run.config.compile:  # after the adapters are attached
        run.cleanup.enter_context(compiled_blocks(run.family.denoisers.values()))


def train_and_save(
    run: Run,
    state: ResumeState,
    settings: Sequence[Mapping[str, Any]],
    targets: PreservationTargets,
    on_step: OnStep | None,
) -> list[Concept]:
    """Train the parameters, and save each concept with its facts, samples and layer inputs.

    Args:
        run: The run, with everything attached and encoded.
        state: Where the run starts.
        settings: Settings of each concept.
        targets: Outputs of the base model for the preservation losses.
        on_step: See :func:`train`.
    """
    accelerator, is_main = run.accelerator, run.accelerator.is_main_process
    validations = [ValidationImages(config, run) for config in run.configs]
    samples = [SampleImages(config, run) for config in run.configs]
    accelerator.init_trackers("customize", config=tracker_config(settings[0]))
    run.cleanup.callback(accelerator.end_training)
    if state.checkpoint is None and is_main:
        for config in run.configs:
            delete_checkpoints(checkpoint_folder(config))
    if run.config.samples:
        with run.progress.phase("drawing the first samples"):
            for concept_samples in samples:
                concept_samples.begin(restart=state.checkpoint is None)
    accelerator.wait_for_everyone()

    history, seconds_per_step = run_training_loop(
        run,
        Optimization(ConceptTask(run, targets), run.config, accelerator, run.device),
        state.checkpoint,
        checkpoint_folder(run.config),
        settings[0],
        [*validations, *samples],
        on_step,
    )

    words = [word for config in run.configs for word in (config.trigger, config.class_word)]
    concepts = []
    for number, trained in enumerate(run.trainable.concepts):
        config = trained.config
        training = training_facts(settings[number], history, seconds_per_step, run.device)
        if config.samples:
            with run.progress.phase(f"measuring what {config.name} has learned"):
                training["fixed_loss"] = measure_fixed_noise_loss(run, number)
            training["samples"] = samples[number].facts()
        training["captions_share"] = common_words(run.captions_by_concept[number], words)
        if len(run.configs) > 1:
            training["learned_with"] = sorted(settings[number][JOINT_CONCEPTS])
        info = concept_info(run, trained, training)
        updates, embeddings = trained.adapter.updates(), trained.token_embeddings()
        concept = Concept(info, updates, embeddings, config.output)
        concepts.append(concept)
        if is_main:
            with run.progress.phase(f"saving {config.name}"):
                images = [*samples[number].strip(), *validations[number].last]
                save_concept(concept, config.output, images)
    if is_main and run.config.record_inputs:
        for trained, concept in zip(run.trainable.concepts, concepts, strict=True):
            record_concept_inputs(run, trained, concept)
    accelerator.wait_for_everyone()
    return concepts


def record_missing_inputs(run: Run, concepts: list[Concept]) -> list[Concept]:
    """Record the layer inputs that a run did not record before it ended, of saved concepts."""
    for trained, concept in zip(run.trainable.concepts, concepts, strict=True):
        trained.load_concept(concept)
    for trained, concept in zip(run.trainable.concepts, concepts, strict=True):
        if run.accelerator.is_main_process and not has_recorded_inputs(trained.config, concept):
            record_concept_inputs(run, trained, concept)
    run.accelerator.wait_for_everyone()
    return concepts
