"""What trains in a model: an adapter and the tokens of a trigger, put in and taken out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from customize.concepts import layerwise, tokens
from customize.concepts.adapter import Adapter, Factors, attach, file_name
from customize.concepts.concept import BasisInfo
from customize.concepts.slices import columns_for
from customize.core.shared import change_on_generic
from customize.errors import DataError
from customize.families import Family
from customize.training.batches import stream_seed
from customize.training.config import TrainConfig


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
        held: up-projections, each with the factor on its squared norm in the loss.
    """

    adapter: Adapter
    rows: dict[str, tokens.TrainableRows]
    layers: int
    triggers: dict[str, list[str]]
    basis: BasisInfo | None
    columns: dict[int, tuple[int, ...]]
    held: list[tuple[nn.Parameter, float]]

    @torch.no_grad()
    def add_held(self) -> None:
        """Add the gradient of ``sum factor * ||up||^2`` to what the loss has left."""
        for up, factor in self.held:
            if up.grad is not None:
                up.grad.add_(up, alpha=2.0 * factor)

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
def trained_in(
    family: Family,
    config: TrainConfig,
    index: int | None,
    basis: BasisInfo | None,
    generic: Factors,
) -> Iterator[Trainable]:
    """Add the concept's tokens and adapter to a model; afterwards they are gone.

    Args:
        index: the concept's number; see :func:`customize.concepts.slices.columns_for`.
        basis: of its slice; None for the method "lora".
        generic: what layers read on generic prompts; empty where the basis avoids nothing of it.

    Raises:
        ConfigError, ConceptError, PipelineError: what is asked for does not fit the model.
            Nothing was changed.
    """
    components = adapted(family, config)
    columns: dict[int, tuple[int, ...]] = {}
    if basis is not None:
        widths = input_widths(family, config)
        columns = columns_for(widths, config.rank, index=index, name=config.name, avoid=basis.avoid)

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
            directions=generic,
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
        held = _held(adapter, generic, config.avoid_weight) if basis and basis.avoid else []
        yield Trainable(adapter, rows, layers, triggers, basis, columns, held)
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


def input_widths(family: Family, config: TrainConfig) -> set[int]:
    """The input widths of all layers that get an adapter."""
    return {
        width
        for key in adapted(family, config)
        for _, width in family.adapter_targets(key).values()
    }


def basis_of(config: TrainConfig, shared: str) -> BasisInfo | None:
    """The basis of the concept's slices, by the settings; None for the method "lora".

    Args:
        shared: the name of the directions that they avoid.
    """
    if config.method == "lora":
        return None
    return BasisInfo(
        kind=config.basis,
        seed=config.basis_seed,
        scale=config.basis_scale,
        avoid=config.avoid,
        shared=shared,
    )


def adapted(family: Family, config: TrainConfig) -> list[str]:
    """The components that get an adapter."""
    return [*family.denoisers, *(family.text_encoders if config.train_text_encoder else ())]


def _held(adapter: Adapter, generic: Factors, weight: float) -> list[tuple[nn.Parameter, float]]:
    """What :attr:`Trainable.held` is; see :mod:`customize.core.shared`."""
    found = []
    for component, layers in adapter.layers.items() if weight else ():
        for module, layer in layers.items():
            inputs = generic[component][file_name(component, module)]
            down, up = layer.lora_A[adapter.name].weight, layer.lora_B[adapter.name].weight
            base = _weight(layer.get_base_layer())
            factor = change_on_generic(down, inputs, base, layer.scaling[adapter.name])
            found.append((up, weight * factor))
    return found


@torch.no_grad()
def _weight(layer: Any) -> Tensor:
    """A linear layer's weight, (out, in); of a quantized one, as it computes."""
    shape, weight = (layer.out_features, layer.in_features), layer.weight
    if type(weight) is nn.Parameter and weight.is_floating_point() and weight.shape == shape:
        return weight
    device = weight.device
    axes = torch.eye(layer.in_features, device=device)
    origin = torch.zeros(1, layer.in_features, device=device)
    return (layer(axes).float() - layer(origin).float()).T


def _own_seed(config: TrainConfig, what: str) -> int:
    """Concepts to be merged must not start alike, though all keep the default seed."""
    return stream_seed(config.seed, config.name, what)


def _initial_rows(dictionary: Any, config: TrainConfig) -> Tensor:
    seed = _own_seed(config, dictionary.key)
    rows = tokens.initial_rows(dictionary, config.class_word, config.num_tokens, seed)
    if config.token_init != "random":
        rows[:1] = tokens.initial_rows(dictionary, config.token_init, 1, seed)
    return rows
