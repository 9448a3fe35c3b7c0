"""What a run needs before its first step: a device, the base, a place for what trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from customize.concepts import layerwise, tokens
from customize.concepts.adapter import Adapter, attach
from customize.concepts.concept import BasisInfo
from customize.concepts.slices import columns_for
from customize.errors import ConfigError, DataError, PipelineError
from customize.families import Family
from customize.hosts.opening import open_base
from customize.hosts.quantizing import check_quantizer, quantize
from customize.training import data
from customize.training.batches import stream_seed
from customize.training.config import TrainConfig
from customize.training.process import HALVES


def read_pictures(
    config: TrainConfig, resolution: int | None
) -> tuple[list[data.Sample], list[data.Sample]]:
    """The concept's pictures, and the class pictures that the settings name.

    Args:
        resolution: what they are shrunk to on reading; None: not yet, as in buckets, whose sizes
            depend on the model.

    Raises:
        DataError: see :func:`customize.training.data.read_folder`.
    """
    if config.buckets:
        resolution = None
    samples = data.read_folder(
        config.images,
        trigger=config.trigger,
        caption=config.caption,
        masks=config.masks,
        resolution=resolution,
        square=not config.buckets,
    )
    if not config.prior_weight or config.prior_images is None:
        return samples, []
    return samples, data.read_folder(
        config.prior_images,
        trigger=None,
        caption=config.class_prompt,
        resolution=resolution,
        limit=config.prior_count,
        forbidden=config.trigger,
    )


def load_base(config: TrainConfig) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The base's components and its pipeline's configuration; on the CPU, from safetensors only.

    The frozen weights are loaded in the precision of the arithmetic, but for the autoencoder's:
    it is used once a picture, and some overflow in half precision.

    Raises:
        ConfigError, PipelineError: see :func:`customize.hosts.opening.open_base`.
    """
    dtype = HALVES.get(config.mixed_precision, torch.float32)
    pipe = open_base(config.base, {"default": dtype, "vae": torch.float32})
    return dict(pipe.components), pipe.config


def check_quantized(
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
            fix="load it quantized and set quantize to none, or give the base's name instead",
        )
    check_quantizer(config.quantize, device)


def quantize_denoisers(family: Family, config: TrainConfig, device: torch.device) -> None:
    """Hold the denoisers of a base that was loaded here as the settings ask for."""
    if config.quantize == "none":
        return
    dtype = HALVES.get(config.mixed_precision, torch.float32)
    for denoiser in family.denoisers.values():
        quantize(denoiser, config.quantize, dtype, device)


def freeze(components: Mapping[str, Any]) -> None:
    """Nothing of these models requires gradients, and all are in evaluation mode."""
    for model in components.values():
        if isinstance(model, nn.Module):
            model.requires_grad_(False)
            model.eval()


@contextmanager
def borrowed(components: Mapping[str, Any]) -> Iterator[None]:
    """:func:`freeze` somebody's models; afterwards they are as before.

    That is: devices, modes, which parameters require gradients.

    Raises:
        PipelineError: a model is under offloading hooks, which would move it in between.
    """
    models = {key: part for key, part in components.items() if isinstance(part, nn.Module)}
    for key, model in models.items():
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise PipelineError(
                "a model that is offloaded cannot be trained on",
                where=key,
                fix="call remove_all_hooks() on the pipeline, or give the base's name instead",
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


@dataclass(frozen=True, eq=False)
class Trainable:
    """All that trains in a model, and how to take it out again.

    Attributes:
        adapter: on the denoiser and, if asked for, the text encoders.
        rows: token dictionary's key -> the trigger's rows; empty if tokens don't train.
        layers: cross-attention layers with rows of their own, which follow one another in
            ``rows``; 0 where all read the same.
        triggers: trigger -> vocabulary entries, for :func:`customize.concepts.tokens.expand`.
        basis, columns: what the frozen down-projections are; None and empty for "lora".
    """

    adapter: Adapter
    rows: dict[str, tokens.TrainableRows]
    layers: int
    triggers: dict[str, list[str]]
    basis: BasisInfo | None
    columns: dict[int, tuple[int, ...]]

    def groups(self, family: Family, config: TrainConfig) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer, each named by its setting, whose value is ``peak``."""
        parameters = self.adapter.parameters()
        denoiser = [p for key in family.denoisers for p in parameters.pop(key)]
        text = [p for weights in parameters.values() for p in weights]
        rows = [r.parameter for r in self.rows.values()]
        decay = config.weight_decay
        groups = (
            ("learning_rate", denoiser, decay),
            ("text_learning_rate", text, decay),
            # A token has a norm to keep, in the range of the vocabulary's: nothing to decay.
            ("token_learning_rate", rows, 0.0),
        )
        return [
            {"name": name, "params": own, "peak": getattr(config, name), "weight_decay": weight}
            for name, own, weight in groups
            if own
        ]

    def named(self) -> dict[str, nn.Parameter]:
        """Every trained parameter under a name that is the same in every run of the settings."""
        found = {
            f"adapter/{component}/{number}": parameter
            for component, weights in self.adapter.parameters().items()
            for number, parameter in enumerate(weights)
        }
        return found | {f"tokens/{key}": rows.parameter for key, rows in self.rows.items()}

    def embeddings(self) -> dict[str, Tensor]:
        """A copy of the tokens' rows, on the CPU: (n, width), or (n, layers, width)."""
        found = {k: r.parameter.detach().to("cpu", copy=True) for k, r in self.rows.items()}
        if not self.layers:
            return found
        by_layer = {k: rows.unflatten(0, (self.layers, -1)) for k, rows in found.items()}
        return {k: rows.transpose(0, 1).contiguous() for k, rows in by_layer.items()}

    def expanded(self, caption: str) -> str:
        """A caption as the text encoders see it."""
        return tokens.expand(caption, self.triggers)

    def wordings(self, caption: str) -> list[str]:
        """A caption as the text encoders see it for each layer, in order."""
        text = self.expanded(caption)
        return [layerwise.wording(text, self.triggers, layer) for layer in range(self.layers)]


@contextmanager
def trainable(family: Family, config: TrainConfig, index: int | None) -> Iterator[Trainable]:
    """Add the concept's tokens and adapter to a model; afterwards they are gone.

    Args:
        index: the concept's number; see :func:`customize.concepts.slices.columns_for`.

    Raises:
        ConfigError, ConceptError, PipelineError: what is asked for does not fit the model.
            Nothing was changed.
    """
    components = _adapted(family, config)
    basis: BasisInfo | None = None
    columns: dict[int, tuple[int, ...]] = {}
    if config.method == "orthogonal":
        basis = basis_of(config)
        widths = input_widths(family, config)
        columns = columns_for(widths, config.rank, index=index, name=config.name)

    undo: list[Callable[[], None]] = []
    try:
        rows: dict[str, tokens.TrainableRows] = {}
        dictionaries = family.token_dictionaries() if config.train_tokens else []
        # Without a dictionary the trigger stays a plain word of the prompt.
        entries = tokens.entries(config.trigger, config.num_tokens) if dictionaries else []
        names, layers = entries, 0
        if config.layerwise_tokens:
            layers = len(layerwise.layers_of(family))
            names = layerwise.layer_entries(config.trigger, config.num_tokens, layers)
            undo += [hook.remove for hook in layerwise.read_by_layer(family)]
        for dictionary in dictionaries:
            # All layers start alike.
            start = _initial_rows(dictionary, config).repeat(layers or 1, 1)
            tokens.add_tokens(dictionary, names, start)
            undo.append(partial(tokens.remove_tokens, dictionary, names))
            rows[dictionary.key] = tokens.TrainableRows(dictionary, names)
            undo.append(rows[dictionary.key].remove)
            # From the exact start, not from what the table's precision made of it.
            rows[dictionary.key].parameter.data.copy_(start)
            rows[dictionary.key].clamp_norm_()
        adapter = attach(
            family,
            method=config.method,
            rank=config.rank,
            alpha=config.adapter_alpha,
            basis=basis,
            columns=columns or None,
            components=components,
            seed=_own_seed(config, "adapter"),
        )
        undo.append(adapter.remove)
        if config.mixed_precision != "no":
            # peft casts inputs up to the adapter's float32, only for autocast to cast them down.
            for own in adapter.layers.values():
                for layer in own.values():
                    layer.cast_input_dtype_enabled = False
        triggers = {config.trigger: entries} if entries else {}
        yield Trainable(adapter, rows, layers, triggers, basis, columns)
    finally:
        for action in reversed(undo):
            action()


def check_texts(family: Family, trainable: Trainable, what: str, texts: Sequence[str]) -> None:
    """Tokenize each text once, to see that the text encoders will read the trigger.

    Args:
        what: the texts are, such as caption.

    Raises:
        DataError: a trigger lies beyond the encoder's length, where it would never be read.
    """
    for dictionary in family.token_dictionaries():
        tokenizer, rows = dictionary.tokenizer, trainable.rows.get(dictionary.key)
        own = set(tokens.token_ids(dictionary, rows.names)) if rows else set()
        for given in dict.fromkeys(texts):
            text = (trainable.wordings(given) or [trainable.expanded(given)])[0]
            length = tokenizer.model_max_length
            # Not verbose: what transformers would say of long texts is said below.
            whole = tokenizer(text, verbose=False).input_ids
            cut = tokenizer(text, truncation=True, max_length=length).input_ids
            told = f"{given[:60]!r} has {len(whole)} tokens, of which {len(cut)} are read"
            if own & set(whole) - set(cut):
                raise DataError(
                    f"the {what} {told}: the trigger is cut off",
                    fix=f"shorten the {what}, or write the trigger near its beginning",
                )
            if len(whole) > len(cut):
                warnings.warn(f"the {what} {told}: the rest is cut off", stacklevel=2)


def place(models: Mapping[str, nn.Module], device: torch.device) -> None:
    """Move models to a device."""
    for model in models.values():
        model.to(device)


def put_away(family: Family, models: Mapping[str, nn.Module], *, free: bool) -> None:
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


def check_fits(family: Family, config: TrainConfig) -> int:
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
    if config.layerwise_tokens and not layerwise.layers_of(family):
        raise ConfigError(
            f"tokens of family {family.name} cannot have an embedding for each cross-attention "
            "layer, as the prompt is also read elsewhere",
            where="layerwise_tokens",
            fix="leave it out",
        )
    narrowest = min(
        min(shape)
        for key in _adapted(family, config)
        for shape in family.adapter_targets(key).values()
    )
    if config.rank > narrowest:
        raise ConfigError(
            f"the rank {config.rank} is above the width of the narrowest layer, {narrowest}",
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


def input_widths(family: Family, config: TrainConfig) -> set[int]:
    """The input widths of all layers that get an adapter."""
    adapted = _adapted(family, config)
    return {width for key in adapted for _, width in family.adapter_targets(key).values()}


def basis_of(config: TrainConfig) -> BasisInfo:
    """The basis of the concept's slices, by the settings."""
    return BasisInfo(kind=config.basis, seed=config.basis_seed, scale=config.basis_scale)


def _adapted(family: Family, config: TrainConfig) -> list[str]:
    """The components that get an adapter."""
    return [*family.denoisers, *(family.text_encoders if config.train_text_encoder else ())]


def _own_seed(config: TrainConfig, what: str) -> int:
    """Concepts to be merged must not start alike, though all keep the default seed."""
    return stream_seed(config.seed, config.name, what)


def _initial_rows(dictionary: Any, config: TrainConfig) -> Tensor:
    seed = _own_seed(config, dictionary.key)
    rows = tokens.initial_rows(dictionary, config.class_word, config.num_tokens, seed)
    if config.token_init != "random":
        rows[:1] = tokens.initial_rows(dictionary, config.token_init, 1, seed)
    return rows
