"""Preparing the base model: loading, freezing, quantizing and moving it, and checking settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from customize.base.load_pipeline import load_pipeline
from customize.base.quantization import check_quantizer, quantize_model
from customize.concepts.tokens import layerwise_embeddings
from customize.core.bases import count_shared_directions
from customize.errors import ConfigError, PipelineError
from customize.families import Family, family_of
from customize.training.base_fingerprint import weight_digests, weight_digests_on_disk
from customize.training.config import TrainConfig
from customize.training.distributed import MIXED_PRECISION_DTYPES
from customize.training.run import Run
from customize.training.trainable import adapted_components


def check_quantization(
    config: TrainConfig, components: Mapping[str, Any] | None, device: torch.device
) -> None:
    """Check that the base can be quantized as the settings request.

    Raises:
        ConfigError: The library is not installed or does not support the device, or the base is in
            memory.
    """
    if config.quantize == "none":
        return
    if components is not None:
        raise ConfigError(
            "a model in memory is not quantized for training",
            where="quantize",
            fix="load it quantized and set quantize to none (--quantize none), or give the base's "
            "name instead",
        )
    check_quantizer(config.quantize, device)


def load_base(
    run: Run,
    components: Mapping[str, Any] | None = None,
    pipeline_config: Mapping[str, Any] | None = None,
) -> None:
    """Load the base of the settings, or use components in memory, and freeze its models.

    Frozen weights are loaded on the CPU, from safetensors only, in the precision of the mixed
    precision setting; except the autoencoder's, in float32, because some overflow in half precision
    and it encodes each image once. Models that training does not need are freed. Components in
    memory are restored when the run ends.

    Args:
        run: Receives the family, its fingerprint, the resolution and the weights' digests.
        components: Components of a pipeline in memory; None: load ``config.base``.
        pipeline_config: Configuration of the pipeline in memory.

    Raises:
        ConfigError, PipelineError: See :func:`customize.base.load_pipeline.load_pipeline`,
            :func:`check_family_support` and :func:`restored_afterwards`.
    """
    config = run.config
    dtype = MIXED_PRECISION_DTYPES.get(config.mixed_precision, torch.float32)
    if components is None:
        with run.progress.phase(f"loading the base {config.base}"):
            pipe = load_pipeline(
                config.base,
                {"default": dtype, "vae": torch.float32},
                variant=config.variant,
                config=config.base_config,
            )
        components, pipeline_config = dict(pipe.components), pipe.config
    family = run.family = family_of(dict(components), pipeline_config or {})
    for concept_config in run.configs:
        run.resolution = check_family_support(family, concept_config)
    if run.owns_base:
        freeze(family.components)
        offload(family, family.unused, free=True)
    else:
        run.cleanup.enter_context(restored_afterwards(components))
    run.fingerprint = family.fingerprint()
    if not run.weights:  # the files were downloaded by loading, or cannot be read
        run.weights = weight_digests_on_disk(config.base, config.variant)
        run.weights = run.weights or weight_digests("", family.components)
    if config.quantize != "none":
        for denoiser in family.denoisers.values():
            quantize_model(denoiser, config.quantize, dtype, run.device)


def freeze(components: Mapping[str, Any]) -> None:
    """Set all models to evaluation mode, without gradients."""
    for model in components.values():
        if isinstance(model, nn.Module):
            model.requires_grad_(False)
            model.eval()


@contextmanager
def restored_afterwards(components: Mapping[str, Any]) -> Iterator[None]:
    """Freeze models in memory; restore devices, modes and ``requires_grad`` flags at the end.

    Raises:
        PipelineError: A model has offloading hooks, which would move it during training, or was
            created in inference mode, so that no gradient can flow through its weights.
    """
    models = {key: part for key, part in components.items() if isinstance(part, nn.Module)}
    for key, model in models.items():
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise PipelineError(
                "a model that is offloaded cannot be trained on",
                where=key,
                fix="call remove_all_hooks() on the pipeline, or give the base's name instead",
            )
        if any(parameter.is_inference() for parameter in model.parameters()):
            raise PipelineError(
                "a model that was created in torch.inference_mode cannot be trained on",
                where=key,
                fix="load it outside of inference mode, or give the base's name instead",
            )
    states = [
        (
            model,
            next((parameter.device for parameter in model.parameters()), torch.device("cpu")),
            [(module, module.training) for module in model.modules()],
            # By name, because adding tokens replaces the embedding table's parameter.
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        )
        for model in models.values()
    ]
    try:
        freeze(models)
        yield
    finally:
        for model, device, modes, requires_grad in states:
            model.to(device)
            for module, mode in modes:
                module.training = mode
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(requires_grad[name])


def move_to_device(models: Mapping[str, nn.Module], device: torch.device) -> None:
    """Move models to a device."""
    for model in models.values():
        model.to(device)


def offload(family: Family, models: Mapping[str, nn.Module], *, free: bool) -> None:
    """Move models that are not needed for now to the CPU, or free them.

    Args:
        family: The base model.
        models: Component name -> model.
        free: Remove the models from the family instead of moving them.
    """
    for key, model in models.items():
        if not free:
            model.to("cpu")
        elif family.components[key] is model:
            family.components[key] = None


def check_family_support(family: Family, config: TrainConfig) -> int:
    """Check the settings that depend on the family and return the resolution in pixels.

    Raises:
        ConfigError: The family does not support a setting, or the rank is above a width.
        PipelineError: The base's scheduler is not supported.
    """
    resolution = config.resolution or family.default_resolution
    if resolution % family.latent_multiple:
        raise ConfigError(
            f"the resolution {resolution} is not a multiple of {family.latent_multiple}",
            where="resolution",
            fix=f"choose {resolution // family.latent_multiple * family.latent_multiple or 'more'}",
        )
    if config.layerwise_tokens and not layerwise_embeddings.layers_with_embeddings(family):
        raise ConfigError(
            f"tokens of family {family.name} cannot have an embedding for each cross-attention "
            "layer, as the prompt is also read elsewhere",
            where="layerwise_tokens",
            fix="leave it out",
        )
    losses = config.text_losses
    if losses and not family.text_encoders:
        raise ConfigError(
            f"{' and '.join(losses)} cannot preserve anything in a model of family {family.name}: "
            "none of its text encoders has trained tokens or an adapter, so there is no gradient",
            where="preserve",
            fix="preserve output instead, or give prior_weight",
        )
    avoid = config.num_shared_directions if config.method == "orthogonal" else 0
    narrowest = min(
        min(out, width - count_shared_directions(width, avoid))
        for component in adapted_components(family, config)
        for out, width in family.adapter_targets(component).values()
    )
    if config.rank > narrowest:
        raise ConfigError(
            f"the rank {config.rank} is above the width of the narrowest layer, {narrowest}"
            + (", without the shared directions that slices avoid" if avoid else ""),
            where="rank",
            fix=f"choose a rank of at most {narrowest}",
        )
    num_levels = family.scheduler.config.get("num_train_timesteps")
    has_samples = config.validation_prompts or (config.prior_weight and not config.prior_images)
    if has_samples and num_levels is not None and config.validation_steps > num_levels:
        raise ConfigError(
            f"the base's scheduler has {num_levels} noise levels, fewer than "
            f"{config.validation_steps}",
            where="validation_steps",
            fix=f"choose at most {num_levels}",
        )
    # Raises an error for a scheduler or loss weighting that is not supported.
    side = resolution // family.latent_multiple
    t = family.timesteps(torch.tensor([0.5]), (1, 2 * side, 2 * side))
    family.loss_weight(t, config.min_snr_gamma)
    return resolution
