"""Learning concepts: :func:`train` one, or several in one run by :func:`train_jointly`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any

import torch

from customize.concepts.adapter import LayerFactors
from customize.concepts.io.folder_lock import lock_folder
from customize.concepts.io.output_folder import check_output_folder, check_writable
from customize.concepts.io.write_concept import save_concept
from customize.concepts.slices.slice_reservations import delete_reservation
from customize.concepts.tokens.prompt_phrases import common_words
from customize.concepts.types import Concept
from customize.core.precision import full_precision
from customize.families import family_of
from customize.training import (
    base_fingerprint,
    class_preservation,
    distributed,
    latents_and_embeddings,
    layer_input_recording,
    prepare_base,
    run_metadata,
)
from customize.training import checkpoint as checkpoints
from customize.training import samples as sampling
from customize.training.checkpoint import (
    BASE_CONFIG,
    BASE_WEIGHTS,
    JOINT_CONCEPTS,
    SHARED_DIRECTIONS,
)
from customize.training.class_images import class_images_output, load_or_draw_class_images
from customize.training.compile_blocks import check_compiler, compiled_blocks
from customize.training.config import TrainConfig
from customize.training.joint_configs import check_joint_configs
from customize.training.library_directions import load_or_record_directions
from customize.training.loop import OnStep, run_training_loop
from customize.training.losses import TrainingLosses
from customize.training.progress import Progress
from customize.training.resume import checkpoint_folder, find_resume_state, has_recorded_inputs
from customize.training.run_summary import show_run_summaries
from customize.training.samples import SampleImages
from customize.training.slice_reservation import reserve_slices
from customize.training.trainable import attach_trainable, check_prompt_lengths, slice_basis
from customize.training.validation_images import ValidationImages, warn_about_triggers
from customize.training.verdict import IdentityJudge, format_verdict


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
        StorageError: the output folder holds something else, cannot be written, or another run
            writes to it.
        TrainingError: the loss or what is learned is no longer finite.
        TrainingStopped: Ctrl-C or SIGTERM; a checkpoint is saved.
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

    All are in the model at once, each with tokens and an adapter of its own, and where slices are
    orthogonal each in its own slice. What the model then draws is what it draws with the plain
    sum of the concepts, as ``load_custom`` merges them. A batch has pictures of all: its places
    go round among them, so that each has as many as any other over time. The losses of
    preservation count each concept alike, with its own class word.

    The order of the concepts makes no difference. Checkpoints lie in the folder of the one whose
    name is first in the alphabet.

    Args:
        configs: of each concept. What is not in :data:`PER_CONCEPT_SETTINGS`
            belongs to the run and is the same in all. Captions may name several of the concepts.
        components, progress, on_step, pipeline_config: as of :func:`train`.
        judge: says whether a concept's last sample shows what was to be learned, for the last line.

    Returns:
        The concepts, in the order of their configurations.

    Raises:
        ConfigError: they cannot be learned in one run; see
            :func:`check_joint_configs`.
        SettingsError: as of :func:`train`, also where the run had other concepts before.
        DataError, PipelineError, StorageError, TrainingError, TrainingStopped: as of ``train``.
    """
    check_joint_configs(configs)
    given, configs = configs, sorted(configs, key=lambda config: config.name)
    shown = Progress(progress)
    # Losses and updates are ours, whatever the caller is in; models get an autocast of their own.
    with full_precision(tf32=True), torch.enable_grad(), ExitStack() as locks:
        found = _trained(configs, components, shown, on_step, pipeline_config, locks)
    for concept in found if shown.shown else ():
        text = format_verdict(concept.info, judge and judge(concept.info))
        if text is not None:
            shown.line(text)
    by_name = dict(zip((config.name for config in configs), found, strict=True))
    return [by_name[config.name] for config in given]


def _trained(
    configs: Sequence[TrainConfig],
    components: Mapping[str, Any] | None,
    progress: Progress,
    on_step: OnStep | None,
    pipeline_config: Mapping[str, Any] | None,
    locks: ExitStack,
) -> list[Concept]:
    config = configs[0]  # for all that belongs to the run
    resolution_read = base_fingerprint.resolution_before_loading(config, components)
    triggers = [each.trigger for each in configs]
    with progress.phase("reading pictures", after=1.0):
        samples, class_samples = zip(
            *(prepare_base.read_images(each, resolution_read, triggers) for each in configs),
            strict=True,
        )
    for each in configs:
        check_output_folder(each.output, each.name)
        check_writable(each.output)
    accelerator = distributed.create_accelerator(config)
    distributed.run_on_main_process(
        accelerator,
        lambda: [locks.enter_context(lock_folder(each.output)) for each in configs],
    )
    device = distributed.training_device(config, accelerator)
    prepare_base.check_quantization(config, components, device)
    if config.compile:
        check_compiler(device)

    weights = base_fingerprint.weight_digests(config.base, components, config.variant)
    settings_after = partial(
        run_metadata.joint_run_settings,
        configs,
        [run_metadata.image_digests(own) for own in samples],
        [run_metadata.image_digests(own) for own in class_samples],
        weights,
        base_fingerprint.base_configuration(components, pipeline_config),
        accelerator.num_processes,
    )
    start = find_resume_state(configs, settings_after)
    if start.done is not None:
        if accelerator.is_main_process:
            for each in configs:  # where the run was stopped before it could
                delete_reservation(each.output)
        return start.done
    settings, folder = start.settings, checkpoint_folder(config)

    own = components is None
    autocast = distributed.create_autocast(config, device)
    run_metadata.reset_peak_memory(device)
    with ExitStack() as stack:
        if components is None:
            with progress.phase(f"loading the base {config.base}"):
                parts, pipeline_config = prepare_base.load_base(config)
        else:
            parts = dict(components)
        family = family_of(parts, pipeline_config or {})
        for each in configs:
            resolution = prepare_base.check_family_support(family, each)
        show_run_summaries(
            configs, samples, class_samples, family, resolution, accelerator.num_processes, progress
        )
        if own:
            prepare_base.freeze(parts)
            prepare_base.offload(family, family.unused, free=True)
        else:
            stack.enter_context(prepare_base.temporarily_frozen(parts))
        fingerprint = family.fingerprint()
        if not weights:  # of a hub id that was not here yet
            weights = base_fingerprint.weight_digests_on_disk(config.base, config.variant)
            weights = weights or base_fingerprint.weight_digests("", family.components)
        prepare_base.quantize_denoisers(family, config, device)
        generic: LayerFactors = {}
        shared = settings[0][SHARED_DIRECTIONS]
        if config.method == "orthogonal" and config.num_shared_directions:
            directions = load_or_record_directions(
                config, family, weights, resolution, device, accelerator, autocast, shared, progress
            )
            generic, shared = directions.factors, directions.name
        basis = slice_basis(config, shared)
        indices = stack.enter_context(
            reserve_slices(configs, family, basis, start.before, accelerator)
        )
        known = {
            BASE_WEIGHTS: weights,
            BASE_CONFIG: family.relevant_config(),
            SHARED_DIRECTIONS: shared,
        }
        settings = run_metadata.add_joint_settings(
            [s | known | {"slice": index} for s, index in zip(settings, indices, strict=True)]
        )
        del parts  # what the family then lets go of is freed, if it is our own
        if start.checkpoint is not None:
            checkpoints.check_settings_match(start.checkpoint, settings[0], folder)

        # Pictures are encoded once; then the autoencoder only waits for validation.
        family.vae.to(device)
        if config.prior_weight:
            class_samples = tuple(
                pictures_given
                or load_or_draw_class_images(
                    each,
                    class_images_output(each, configs),
                    family,
                    weights,
                    resolution,
                    device,
                    accelerator,
                    autocast,
                    progress,
                )
                for each, pictures_given in zip(configs, class_samples, strict=True)
            )
        concepts = _ranges(samples)
        classes = _ranges(class_samples, concepts[-1].stop) if config.prior_weight else []
        pictures = latents_and_embeddings.cache_images(
            family,
            list(chain(*samples, *class_samples)),
            resolution,
            device,
            flip=config.flip,
            keep_latents=config.cache_latents,
            buckets=config.buckets,
            track=progress.track,
        )
        del samples, class_samples  # photographs can be large
        validated = [prompt for each in configs for prompt in each.validation_prompts]
        drawn = [*validated, *(text for each in configs for text in sampling.sample_prompts(each))]
        if config.cache_latents:
            prepare_base.offload(family, {"vae": family.vae}, free=own and not drawn)

        # Prompts are encoded once, or at each step, by those encoders in which something trains.
        live = (config.train_tokens or config.train_text_encoder) and bool(family.text_encoders)
        prepare_base.move_to_device(family.all_text_encoders, device)
        resting = family.all_text_encoders
        if live:
            resting = {k: v for k, v in resting.items() if k in family.other_encoders}
        trainable = stack.enter_context(attach_trainable(family, configs, indices, basis, generic))
        check_prompt_lengths(family, trainable, "caption", pictures.captions)
        check_prompt_lengths(family, trainable, "validation prompt", drawn)
        warn_about_triggers(family, validated, [each.trigger for each in configs])
        phrases = [text for each in configs for text in class_preservation.preserved_phrases(each)]
        check_prompt_lengths(family, trainable, "phrase", phrases)
        named = pictures.captions[: concepts[-1].stop]
        more = [text for each in configs for text in layer_input_recording.recording_prompts(each)]
        more += class_preservation.base_captions(configs, named)
        more += sampling.fixed_noise_captions(config, configs, named)
        more += chain.from_iterable(class_preservation.context_prompts(configs))
        with progress.phase("encoding prompts"), autocast():
            encode = latents_and_embeddings.cache_conditions(
                family,
                [*pictures.captions, "", *drawn, *more],
                live=live,
                to_encoder=trainable.expand_triggers,
            )
        if trainable.layers:
            encode = latents_and_embeddings.encode_per_layer(encode, trainable.layer_prompts)
        preserved = class_preservation.compute_preservation_targets(
            configs, family, trainable, named, encode, autocast
        )
        prepare_base.offload(family, resting, free=own)
        del resting

        prepare_base.move_to_device(family.denoisers, device)
        for denoiser in family.denoisers.values():
            if config.gradient_checkpointing and not denoiser.is_gradient_checkpointing:
                denoiser.enable_gradient_checkpointing()
                stack.callback(denoiser.disable_gradient_checkpointing)
        if config.compile:  # with what was attached
            stack.enter_context(compiled_blocks(family.denoisers.values()))
        if start.saved is not None:
            for learned, concept in zip(trainable.concepts, start.saved, strict=True):
                learned.load_concept(concept)
            for learned, concept in zip(trainable.concepts, start.saved, strict=True):
                if accelerator.is_main_process and not has_recorded_inputs(learned.config, concept):
                    layer_input_recording.record_concept_inputs(
                        learned,
                        family,
                        trainable,
                        concept,
                        encode,
                        pictures.shape,
                        autocast,
                        progress,
                    )
            accelerator.wait_for_everyone()
            return start.saved
        validations = [
            ValidationImages(each, family, encode, pictures.shape, autocast, accelerator)
            for each in configs
        ]
        samplers = [
            SampleImages(each, family, trainable, encode, pictures.shape, autocast, accelerator)
            for each in configs
        ]
        accelerator.init_trackers("customize", config=run_metadata.tracker_config(settings[0]))
        stack.callback(accelerator.end_training)
        if start.checkpoint is None and accelerator.is_main_process:
            for each in configs:
                checkpoints.delete_checkpoints(checkpoint_folder(each))
        if config.samples:
            with progress.phase("drawing the first samples"):
                for sampler in samplers:
                    sampler.begin(anew=start.checkpoint is None)
        accelerator.wait_for_everyone()

        losses = TrainingLosses(
            config,
            family,
            trainable,
            pictures,
            concepts,
            classes,
            encode,
            preserved,
            autocast,
            device,
        )
        history, seconds = run_training_loop(
            config,
            family,
            trainable,
            losses,
            start.checkpoint,
            folder,
            settings[0],
            accelerator=accelerator,
            device=device,
            validations=[*validations, *samplers],
            progress=progress,
            on_step=on_step,
        )
        words = [word for each in configs for word in (each.trigger, each.class_word)]
        found = []
        for learned, with_what, numbers, validation, sampler in zip(
            trainable.concepts, settings, concepts, validations, samplers, strict=True
        ):
            training = run_metadata.training_facts(with_what, history, seconds, device)
            if config.samples:
                with progress.phase(f"measuring what {learned.config.name} has learned"):
                    training["fixed_loss"] = sampling.measure_fixed_noise_loss(
                        learned.config,
                        configs,
                        numbers,
                        family,
                        trainable,
                        pictures,
                        encode,
                        autocast,
                        device,
                    )
                training["samples"] = sampler.facts()
            shared_words = common_words(pictures.captions[numbers.start : numbers.stop], words)
            training["captions_share"] = shared_words
            if len(configs) > 1:
                training["learned_with"] = sorted(with_what[JOINT_CONCEPTS])
            info = run_metadata.concept_info(learned, family, basis, fingerprint, training)
            output = learned.config.output
            concept = Concept(info, learned.adapter.updates(), learned.token_embeddings(), output)
            found.append(concept)
            if accelerator.is_main_process:
                with progress.phase(f"saving {concept.info.name}"):
                    save_concept(concept, output, [*sampler.strip(), *validation.last])
        if accelerator.is_main_process and config.record_inputs:
            for learned, concept in zip(trainable.concepts, found, strict=True):
                layer_input_recording.record_concept_inputs(
                    learned, family, trainable, concept, encode, pictures.shape, autocast, progress
                )
        accelerator.wait_for_everyone()
    return found


def _ranges(parts: Sequence[Sequence[Any]], first: int = 0) -> list[range]:
    """The numbers of each part's items, counted through all."""
    ends = list(accumulate(map(len, parts), initial=first))
    return [range(start, end) for start, end in pairwise(ends)]
