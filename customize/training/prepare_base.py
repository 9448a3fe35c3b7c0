"""What a run needs before its first step: a device, the base, a place for what trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from customize.base.load_pipeline import load_pipeline
from customize.base.quantization import check_quantizer, quantize_model
from customize.concepts.tokens import layerwise_embeddings
from customize.core.bases import count_shared_directions
from customize.errors import ConfigError, PipelineError
from customize.families import Family
from customize.training.config import TrainConfig
from customize.training.data import dataset
from customize.training.distributed import MIXED_PRECISION_DTYPES
from customize.training.trainable import adapted_components


def read_images(
    config: TrainConfig, resolution: int | None, triggers: Sequence[str]
) -> tuple[list[dataset.TrainingImage], list[dataset.TrainingImage]]:
    """The concept's pictures, and the class pictures that the settings name.

    Args:
        resolution: what they are shrunk to on reading; None: it is not known yet.
        triggers: of all concepts of the run, which no class picture shows.

    Raises:
        DataError: see :func:`customize.training.data.dataset.read_training_images`.
    """
    # Sizes of buckets depend on the model. Until it is loaded, no picture stays in memory.
    hold = resolution is not None and not config.buckets
    samples = dataset.read_training_images(
        config.images,
        trigger=config.trigger,
        caption=config.caption,
        masks=config.masks,
        resolution=resolution,
        hold=hold,
        square=not config.buckets,
    )
    if not config.prior_weight or config.prior_images is None:
        return samples, []
    return samples, dataset.read_training_images(
        config.prior_images,
        trigger=None,
        caption=config.class_prompt,
        resolution=resolution,
        hold=hold,
        limit=config.prior_count,
        forbidden=triggers,
    )


def load_base(config: TrainConfig) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The base's components and its pipeline's configuration; on the CPU, from safetensors only.

    The frozen weights are loaded in the precision of the arithmetic, but for the autoencoder's:
    it is used once a picture, and some overflow in half precision.

    Raises:
        ConfigError, PipelineError: see :func:`customize.base.load_pipeline.load_pipeline`.
    """
    dtype = MIXED_PRECISION_DTYPES.get(config.mixed_precision, torch.float32)
    pipe = load_pipeline(
        config.base,
        {"default": dtype, "vae": torch.float32},
        variant=config.variant,
        config=config.base_config,
    )
    return dict(pipe.components), pipe.config


def check_quantization(
    config: TrainConfig, components: Mapping[str, Any] | None, device: torch.device
) -> None:
    """See that the base can be quantized as the settings ask for.

    Raises:
        ConfigError: the library is not here or not for this device, or the base is in memory.
    """
    if config.quantize == "none":
        return
    if components is not None:
        raise ConfigError(
            "a model in memory is trained on as it is",
            where="quantize",
            fix="load it quantized and set quantize to none (--quantize none), or give the base's "
            "name instead",
        )
    check_quantizer(config.quantize, device)


def quantize_denoisers(family: Family, config: TrainConfig, device: torch.device) -> None:
    """Hold the denoisers of a base that was loaded here as the settings ask for."""
    if config.quantize == "none":
        return
    dtype = MIXED_PRECISION_DTYPES.get(config.mixed_precision, torch.float32)
    for denoiser in family.denoisers.values():
        quantize_model(denoiser, config.quantize, dtype, device)


def freeze(components: Mapping[str, Any]) -> None:
    """Nothing of these models requires gradients, and all are in evaluation mode."""
    for model in components.values():
        if isinstance(model, nn.Module):
            model.requires_grad_(False)
            model.eval()


@contextmanager
def temporarily_frozen(components: Mapping[str, Any]) -> Iterator[None]:
    """:func:`freeze` somebody's models; afterwards they are as before.

    That is: devices, modes, which parameters require gradients.

    Raises:
        PipelineError: a model is under offloading hooks, which would move it in between, or was
            made in inference mode, so that no gradient can pass its weights.
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
                "a model that was made in torch.inference_mode cannot be trained on",
                where=key,
                fix="load it outside of inference mode, or give the base's name instead",
            )
    before = [
        (
            model,
            next((p.device for p in model.parameters()), torch.device("cpu")),
            [(module, module.training) for module in model.modules()],
            # By name, because tokens that come and go replace the table's parameter.
            {name: p.requires_grad for name, p in model.named_parameters()},
        )
        for model in models.values()
    ]
    try:
        freeze(models)
        yield
    finally:
        for model, device, modes, grads in before:
            model.to(device)
            for module, mode in modes:
                module.training = mode
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(grads[name])


def move_to_device(models: Mapping[str, nn.Module], device: torch.device) -> None:
    """Move models to a device."""
    for model in models.values():
        model.to(device)


def offload(family: Family, models: Mapping[str, nn.Module], *, free: bool) -> None:
    """Take models that are not needed any more off the device.

    Args:
        models: component name -> model.
        free: also let the family forget them; else they wait on the CPU.
    """
    for key, model in models.items():
        if not free:
            model.to("cpu")
        elif family.components[key] is model:
            family.components[key] = None


def check_family_support(family: Family, config: TrainConfig) -> int:
    """The pictures' resolution, after a check of all settings that depend on the family.

    Raises:
        ConfigError: a setting has no meaning for this family, or the rank is above a width.
        PipelineError: the base's scheduler cannot be trained with.
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
    texts = config.text_losses
    if texts and not family.text_encoders:
        raise ConfigError(
            f"{' and '.join(texts)} cannot preserve anything in a model of family {family.name}: no"
            " text encoder of it learns tokens or takes an adapter, so there is no gradient",
            where="preserve",
            fix="preserve output instead, or give prior_weight",
        )
    avoid = config.num_shared_directions if config.method == "orthogonal" else 0
    narrowest = min(
        min(out, width - count_shared_directions(width, avoid))
        for key in adapted_components(family, config)
        for out, width in family.adapter_targets(key).values()
    )
    if config.rank > narrowest:
        raise ConfigError(
            f"the rank {config.rank} is above the width of the narrowest layer, {narrowest}"
            + (", what slices avoid not counted" if avoid else ""),
            where="rank",
            fix=f"choose a rank of at most {narrowest}",
        )
    most = family.scheduler.config.get("num_train_timesteps")
    drawn = config.validation_prompts or (config.prior_weight and config.prior_images is None)
    if drawn and most is not None and config.validation_steps > most:
        raise ConfigError(
            f"the base's scheduler has {most} noise levels, fewer than {config.validation_steps}",
            where="validation_steps",
            fix=f"choose at most {most}",
        )
    side = resolution // family.latent_multiple
    t = family.timesteps(torch.tensor([0.5]), (1, 2 * side, 2 * side))
    family.loss_weight(t, config.min_snr_gamma)
    return resolution
