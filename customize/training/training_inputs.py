"""The inputs of a run: images read and encoded to latents, prompts encoded to conditions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

from customize.core.preservation import PHRASE_COMPARISONS, select_losses
from customize.errors import DataError
from customize.families import Family
from customize.training.base_fingerprint import resolution_before_loading
from customize.training.class_images import load_or_draw_class_images
from customize.training.class_preservation import (
    PreservationTargets,
    base_captions,
    compute_preservation_targets,
    context_prompts,
    phrases_for_loss,
)
from customize.training.config import TrainConfig
from customize.training.data import dataset
from customize.training.latents_and_embeddings import (
    cache_conditions,
    cache_images,
    encode_per_layer,
)
from customize.training.layer_input_recording import recording_prompts
from customize.training.prepare_base import offload
from customize.training.progress import Progress
from customize.training.run import Run
from customize.training.samples import fixed_noise_captions, sample_prompts
from customize.training.trainable import Trainable
from customize.training.validation_images import warn_about_triggers


@dataclass(eq=False)
class TrainingData:
    """Images of each concept, and the class images of each that the settings name."""

    images: list[list[dataset.TrainingImage]]
    class_images: list[list[dataset.TrainingImage]]


def read_data(
    configs: Sequence[TrainConfig], components: Mapping[str, Any] | None, progress: Progress
) -> TrainingData:
    """Read the images, captions and masks of all concepts.

    Images are decoded here only if the training resolution is known before the base is loaded, and
    are shrunk to it. Sizes of buckets depend on the model.

    Raises:
        DataError: See :func:`customize.training.data.dataset.read_training_images`.
    """
    resolution = resolution_before_loading(configs[0], components)
    data = TrainingData([], [])
    with progress.phase("reading images", after=1.0):
        for config in configs:
            keep_in_memory = resolution is not None and not config.buckets
            data.images.append(
                dataset.read_training_images(
                    config.images,
                    trigger=config.trigger,
                    caption=config.caption,
                    masks=config.masks,
                    resolution=resolution,
                    keep_in_memory=keep_in_memory,
                    square=not config.buckets,
                )
            )
            data.class_images.append([])
            if config.prior_weight and config.prior_images is not None:
                data.class_images[-1] = dataset.read_training_images(
                    config.prior_images,
                    trigger=None,
                    caption=config.class_prompt,
                    resolution=resolution,
                    keep_in_memory=keep_in_memory,
                    limit=config.prior_count,
                    forbidden=[other.trigger for other in configs],
                )
    return data


def cache_latents(run: Run, data: TrainingData) -> None:
    """Draw missing class images and encode all images; then offload the autoencoder.

    It is freed if the base was loaded for the run and no images are drawn while training.
    """
    config, family = run.config, run.family
    family.vae.to(run.device)
    class_images: Sequence[Sequence[dataset.TrainingImage]] = data.class_images
    if config.prior_weight:
        class_images = [
            images or load_or_draw_class_images(run, concept_config)
            for concept_config, images in zip(run.configs, data.class_images, strict=True)
        ]
    run.concept_images = _count_ranges(data.images, 0)
    number_of_images = run.concept_images[-1].stop
    run.class_images = _count_ranges(class_images, number_of_images) if config.prior_weight else []
    run.images = cache_images(
        family,
        list(chain(*data.images, *class_images)),
        run.resolution,
        run.device,
        flip=config.flip,
        keep_latents=config.cache_latents,
        buckets=config.buckets,
        track=run.progress.track,
    )
    if config.cache_latents:
        draws_images = any(
            concept_config.validation_prompts or sample_prompts(concept_config)
            for concept_config in run.configs
        )
        offload(family, {"vae": family.vae}, free=run.owns_base and not draws_images)


def cache_prompts(run: Run) -> PreservationTargets:
    """Encode all prompts of the run, and compute the base's outputs that are preserved.

    Prompts are encoded once, or at each step by the text encoders with trained parameters. All
    other text encoders are offloaded, or freed if the base was loaded for the run.

    Raises:
        DataError: A text encoder would truncate a trigger.
        PipelineError: An encoder gives values that are not finite.
    """
    config, configs, family, trainable = run.config, run.configs, run.family, run.trainable
    is_live = (config.train_tokens or config.train_text_encoder) and bool(family.text_encoders)
    unused_encoders = {
        key: model
        for key, model in family.all_text_encoders.items()
        if not is_live or key in family.other_encoders
    }
    validation_prompts = [prompt for config in configs for prompt in config.validation_prompts]
    drawn_prompts = [
        *validation_prompts,
        *(prompt for config in configs for prompt in sample_prompts(config)),
    ]
    check_prompt_lengths(family, trainable, "caption", run.images.captions)
    check_prompt_lengths(family, trainable, "validation prompt", drawn_prompts)
    warn_about_triggers(family, validation_prompts, [config.trigger for config in configs])
    phrases = [
        phrase
        for config in configs
        for loss in select_losses(config.preserve, *PHRASE_COMPARISONS)
        for phrase in phrases_for_loss(config, loss)
    ]
    check_prompt_lengths(family, trainable, "phrase", phrases)
    captions = run.images.captions[: run.concept_images[-1].stop]
    prompts = [
        *run.images.captions,
        "",
        *drawn_prompts,
        *recording_prompts(configs, run.captions_by_concept),
        *base_captions(configs, captions),
        *fixed_noise_captions(config, configs, captions),
        *chain.from_iterable(context_prompts(configs)),
    ]
    with run.progress.phase("encoding prompts"), run.autocast():
        run.encode = cache_conditions(
            family, prompts, live=is_live, to_encoder=trainable.expand_triggers
        )
    if trainable.layers:
        run.encode = encode_per_layer(run.encode, trainable.layer_prompts)
    with run.autocast():
        targets = compute_preservation_targets(configs, family, trainable, run.encode, captions)
    offload(family, unused_encoders, free=run.owns_base)
    return targets


def check_prompt_lengths(
    family: Family, trainable: Trainable, kind: str, texts: Sequence[str]
) -> None:
    """Warn of texts that the text encoders truncate.

    Args:
        family: The base model.
        trainable: The attached tokens.
        kind: What the texts are, such as "caption", for the message.
        texts: Texts with triggers.

    Raises:
        DataError: A trigger is truncated.
    """
    for dictionary in family.token_dictionaries():
        tokenizer, trained = dictionary.tokenizer, set(trainable.trained_token_ids(dictionary))
        for original in dict.fromkeys(texts):
            text = (trainable.layer_prompts(original) or [trainable.expand_triggers(original)])[0]
            # Not verbose, because the warning below replaces transformers' own.
            ids = tokenizer(text, verbose=False).input_ids
            length = tokenizer.model_max_length
            read_ids = tokenizer(text, truncation=True, max_length=length).input_ids
            counts = f"{original[:60]!r} has {len(ids)} tokens, of which {len(read_ids)} are read"
            if trained & set(ids) - set(read_ids):
                raise DataError(
                    f"the {kind} {counts}: the trigger is cut off",
                    fix=f"shorten the {kind}, or write the trigger near its beginning",
                )
            if len(ids) > len(read_ids):
                warnings.warn(f"the {kind} {counts}: the rest is cut off", stacklevel=2)


def _count_ranges(groups: Sequence[Sequence[Any]], start: int) -> list[range]:
    """The range of numbers of each group's items, counted through all groups."""
    return [range(*ends) for ends in pairwise(accumulate(map(len, groups), initial=start))]
