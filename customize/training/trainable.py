"""What trains in a model: adapters and the tokens of triggers, put in and taken out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from customize.concepts.adapter import Adapter, LayerFactors, attach_new_adapter, saved_module_name
from customize.concepts.base_weight import dense_weight
from customize.concepts.concept_info import BasisInfo
from customize.concepts.slices.allocation import slice_columns
from customize.concepts.tokens import layerwise_embeddings, token_rows
from customize.concepts.types import Concept
from customize.core.avoiding_slices import relative_output_change
from customize.errors import DataError, PipelineError
from customize.families import Family
from customize.families.pipeline_components import TokenDictionary
from customize.training.config import TrainConfig
from customize.training.data.batches import stream_seed


@dataclass(frozen=True, eq=False)
class TrainableConcept:
    """All that trains of one concept.

    Attributes:
        config: what it is learned with.
        adapter: on the denoiser and, if asked for, the text encoders.
        rows: token dictionary's key -> the trigger's rows; empty if tokens don't train.
        layers: cross-attention layers with rows of their own, which follow one another in
            ``rows``; 0 where all read the same.
        entries: the trigger's vocabulary entries; empty where it is a plain word of the prompt.
        columns: which the frozen down-projections are; empty for "lora".
        held: up-projections, each with the factor on its squared norm in the loss.
    """

    config: TrainConfig
    adapter: Adapter
    trainable_rows: dict[str, token_rows.TrainableRows]
    layers: int
    vocabulary_entries: list[str]
    slice_columns: dict[int, tuple[int, ...]]
    penalized_weights: list[tuple[nn.Parameter, float]]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter under a name that is the same in every run of the settings."""
        found = {
            f"adapter/{component}/{number}": parameter
            for component, weights in self.adapter.parameters().items()
            for number, parameter in enumerate(weights)
        }
        return found | {
            f"tokens/{key}": rows.parameter for key, rows in self.trainable_rows.items()
        }

    @torch.no_grad()
    def load_concept(self, concept: Concept) -> None:
        """Put back, bit for bit, what was saved of it."""
        for component, layers in self.adapter.layers.items():
            for module, layer in layers.items():
                update = concept.updates[component][saved_module_name(component, module)]
                layer.lora_A[self.adapter.name].weight.copy_(update.down)
                layer.lora_B[self.adapter.name].weight.copy_(update.up)
        for key, rows in self.trainable_rows.items():
            saved = concept.embeddings[key]
            rows.parameter.copy_(saved.transpose(0, 1).flatten(0, 1) if self.layers else saved)

    def token_embeddings(self) -> dict[str, Tensor]:
        """A copy of the tokens' rows, on the CPU: (n, width), or (n, layers, width)."""
        found = {
            k: r.parameter.detach().to("cpu", copy=True) for k, r in self.trainable_rows.items()
        }
        if not self.layers:
            return found
        by_layer = {k: rows.unflatten(0, (self.layers, -1)) for k, rows in found.items()}
        return {k: rows.transpose(0, 1).contiguous() for k, rows in by_layer.items()}


@dataclass(frozen=True, eq=False)
class Trainable:
    """All that trains in a model: one concept, or several at once, whose updates add up.

    Attributes:
        concepts: at least one, in the order of the run.
        layers: cross-attention layers with token embeddings of their own; 0 where all read alike.
    """

    concepts: tuple[TrainableConcept, ...]
    layers: int

    @torch.no_grad()
    def add_penalty_grad(self) -> None:
        """Add the gradient of ``sum factor * ||up||^2`` to what the loss has left."""
        for concept in self.concepts:
            for up, factor in concept.penalized_weights:
                if up.grad is not None:
                    up.grad.add_(up, alpha=2.0 * factor)

    def clamp_norms_(self) -> None:
        """Keep the norms of the tokens' rows in the range of the vocabulary's."""
        for concept in self.concepts:
            for rows in concept.trainable_rows.values():
                rows.clamp_norm_()

    @contextmanager
    def adapters_disabled(self, but: TrainableConcept | None = None) -> Iterator[None]:
        """Within it the models draw as without adapters.

        Args:
            but: the concept whose adapter acts nevertheless.
        """
        with ExitStack() as stack:
            for concept in self.concepts:
                if concept is not but:
                    stack.enter_context(concept.adapter.disabled())
            yield

    def parameter_groups(self, family: Family, config: TrainConfig) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer, each named by its setting, whose value is ``peak``."""
        parameters = [concept.adapter.parameters() for concept in self.concepts]
        denoiser = [p for own in parameters for key in family.denoisers for p in own.pop(key)]
        text = [p for own in parameters for weights in own.values() for p in weights]
        rows = [r.parameter for concept in self.concepts for r in concept.trainable_rows.values()]
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

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter under a name that is the same in every run of the settings."""
        if len(self.concepts) == 1:
            return self.concepts[0].named_parameters()
        return {
            f"{concept.config.name}/{name}": parameter
            for concept in self.concepts
            for name, parameter in concept.named_parameters().items()
        }

    @torch.no_grad()
    def slice_sketches(self) -> dict[str, Tensor]:
        """Concept/component -> (layers, rank, 4), on the CPU: each frozen down-projection times
        four fixed vectors, by which it is known again, rounding apart. Empty for "lora"."""
        found = {}
        for concept in self.concepts:
            for component, layers in (
                concept.adapter.layers.items() if concept.slice_columns else ()
            ):
                sketches = []
                for layer in layers.values():
                    down = layer.lora_A[concept.adapter.name].weight
                    generator = torch.Generator().manual_seed(down.shape[1])
                    fixed = torch.randn(down.shape[1], 4, generator=generator)
                    sketches.append(down.to("cpu", torch.float32).flatten(1) @ fixed)
                found[f"slices/{concept.config.name}/{component}"] = torch.stack(sketches)
        return found

    def trained_token_ids(self, dictionary: TokenDictionary) -> list[int]:
        """The ids of all tokens that train in a dictionary; they follow one another."""
        rows = [
            c.trainable_rows[dictionary.key]
            for c in self.concepts
            if dictionary.key in c.trainable_rows
        ]
        return [number for own in rows for number in token_rows.token_ids(dictionary, own.names)]

    def expand_triggers(self, caption: str) -> str:
        """A caption as the text encoders see it."""
        return token_rows.expand_prompt(caption, self._triggers)

    def layer_prompts(self, caption: str) -> list[str]:
        """A caption as the text encoders see it for each layer, in order."""
        text = self.expand_triggers(caption)
        return [
            layerwise_embeddings.expand_for_layer(text, self._triggers, layer)
            for layer in range(self.layers)
        ]

    @property
    def _triggers(self) -> dict[str, list[str]]:
        return {
            each.config.trigger: each.vocabulary_entries
            for each in self.concepts
            if each.vocabulary_entries
        }


@contextmanager
def attach_trainable(
    family: Family,
    configs: Sequence[TrainConfig],
    indices: Sequence[int | None],
    basis: BasisInfo | None,
    generic: LayerFactors,
) -> Iterator[Trainable]:
    """Add the tokens and adapters of a run's concepts to a model; afterwards they are gone.

    Args:
        indices: each concept's number; see
        :func:`customize.concepts.slices.allocation.slice_columns`. basis: of their slices; None for
        the method "lora". generic: what layers read on generic prompts; empty where the basis
        avoids nothing of it.

    Raises:
        ConfigError, ConceptError, PipelineError: what is asked for does not fit the model.
            Nothing was changed.
    """
    with ExitStack() as stack:
        layers = 0
        if configs[0].layerwise_tokens:
            layers = len(layerwise_embeddings.layers_with_embeddings(family))
            for hook in layerwise_embeddings.hook_cross_attention(family):
                stack.callback(hook.remove)
        # All start from the vocabulary as it is without any of them.
        dictionaries = family.token_dictionaries() if configs[0].train_tokens else []
        starts = [{d.key: _initial_rows(d, config) for d in dictionaries} for config in configs]
        concepts = [
            _added(stack, family, config, number, index, basis, generic, layers, start)
            for number, (config, index, start) in enumerate(
                zip(configs, indices, starts, strict=True)
            )
        ]
        yield Trainable(tuple(concepts), layers)


def _added(
    stack: ExitStack,
    family: Family,
    config: TrainConfig,
    number: int,
    index: int | None,
    basis: BasisInfo | None,
    generic: LayerFactors,
    layers: int,
    starts: Mapping[str, Tensor],
) -> TrainableConcept:
    """Add one concept, the ``number``-th of the run; the stack takes it out again.

    Args:
        starts: token dictionary's key -> (num_tokens, width), where its rows begin.
    """
    components = adapted_components(family, config)
    columns: dict[int, tuple[int, ...]] = {}
    if basis is not None:
        widths = input_widths(family, config)
        columns = slice_columns(
            widths, config.rank, index=index, name=config.name, avoid=basis.num_shared_directions
        )
    rows: dict[str, token_rows.TrainableRows] = {}
    # Without a dictionary the trigger stays a plain word of the prompt.
    entries = token_rows.vocabulary_entries(config.trigger, config.num_tokens) if starts else []
    names = entries
    if layers:
        names = layerwise_embeddings.layer_vocabulary_entries(
            config.trigger, config.num_tokens, layers
        )
    for dictionary in family.token_dictionaries() if starts else ():
        # All layers start alike.
        start = starts[dictionary.key].repeat(layers or 1, 1)
        token_rows.add_tokens(dictionary, names, start)
        stack.callback(token_rows.remove_tokens, dictionary, names)
        rows[dictionary.key] = token_rows.TrainableRows(dictionary, names)
        stack.callback(rows[dictionary.key].remove)
        # From the exact start, not from what the table's precision made of it.
        rows[dictionary.key].parameter.data.copy_(start)
        rows[dictionary.key].clamp_norm_()
    adapter = attach_new_adapter(
        family,
        method=config.method,
        rank=config.rank,
        alpha=config.adapter_alpha,
        basis=basis,
        columns=columns or None,
        directions=generic,
        components=components,
        seed=_own_seed(config, "adapter"),
        name=f"customize_{number}" if number else "customize",
    )
    stack.callback(adapter.remove)
    if config.mixed_precision != "no":
        # peft casts inputs up to the adapter's float32, only for autocast to cast them down.
        for own in adapter.layers.values():
            for layer in own.values():
                layer.cast_input_dtype_enabled = False
    held = (
        _held(adapter, generic, config.shared_directions_weight)
        if basis and basis.num_shared_directions
        else []
    )
    return TrainableConcept(config, adapter, rows, layers, entries, columns, held)


def check_prompt_lengths(
    family: Family, trainable: Trainable, what: str, texts: Sequence[str]
) -> None:
    """Tokenize each text once, to see that the text encoders will read the trigger.

    Args:
        what: the texts are, such as caption.

    Raises:
        DataError: a trigger lies beyond the encoder's length, where it would never be read.
    """
    for dictionary in family.token_dictionaries():
        tokenizer, own = dictionary.tokenizer, set(trainable.trained_token_ids(dictionary))
        for given in dict.fromkeys(texts):
            text = (trainable.layer_prompts(given) or [trainable.expand_triggers(given)])[0]
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
        for key in adapted_components(family, config)
        for _, width in family.adapter_targets(key).values()
    }


def slice_basis(config: TrainConfig, shared: str) -> BasisInfo | None:
    """The basis of the concepts' slices, by the settings; None for the method "lora".

    Args:
        shared: the name of the directions that they avoid.
    """
    if config.method == "lora":
        return None
    return BasisInfo(
        kind=config.orthogonal_matrix,
        seed=config.matrix_seed,
        scale=config.matrix_scale,
        num_shared_directions=config.num_shared_directions,
        shared_directions=shared,
    )


def adapted_components(family: Family, config: TrainConfig) -> list[str]:
    """The components that get an adapter."""
    return [*family.denoisers, *(family.text_encoders if config.train_text_encoder else ())]


def _held(
    adapter: Adapter, generic: LayerFactors, weight: float
) -> list[tuple[nn.Parameter, float]]:
    """The value of :attr:`TrainableConcept.penalized_weights`."""
    found = []
    for component, layers in adapter.layers.items() if weight else ():
        for module, layer in layers.items():
            inputs = generic[component][saved_module_name(component, module)]
            down, up = layer.lora_A[adapter.name].weight, layer.lora_B[adapter.name].weight
            base = _weight(layer.get_base_layer(), f"{component}.{module}")
            factor = relative_output_change(down, inputs, base, layer.scaling[adapter.name])
            found.append((up, weight * factor))
    return found


@torch.no_grad()
def _weight(layer: Any, where: str) -> Tensor:
    """A linear layer's weight, (out, in); of a quantized one, as it computes."""
    try:
        return dense_weight(layer, where)
    except PipelineError:  # good enough for a penalty's factor: what it answers to each axis
        device = layer.weight.device
        axes = torch.eye(layer.in_features, device=device)
        origin = torch.zeros(1, layer.in_features, device=device)
        return (layer(axes).float() - layer(origin).float()).T


def _own_seed(config: TrainConfig, what: str) -> int:
    """Concepts to be merged must not start alike, though all keep the default seed."""
    return stream_seed(config.seed, config.name, what)


def _initial_rows(dictionary: Any, config: TrainConfig) -> Tensor:
    seed = _own_seed(config, dictionary.key)
    rows = token_rows.initial_rows(dictionary, config.class_word, config.num_tokens, seed)
    if config.token_init != "random":
        rows[:1] = token_rows.initial_rows(dictionary, config.token_init, 1, seed)
    return rows
