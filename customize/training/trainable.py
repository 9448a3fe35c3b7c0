"""The trained parameters of a run: low-rank adapters and the token embeddings of triggers."""

from __future__ import annotations

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
from customize.errors import PipelineError
from customize.families import Family
from customize.families.pipeline_components import TokenDictionary
from customize.training.config import TrainConfig
from customize.training.data.batches import stream_seed


@dataclass(frozen=True, eq=False)
class TrainableConcept:
    """The trained parameters of one concept.

    Attributes:
        config: Settings of the concept.
        adapter: Adapter of the denoisers and, by the settings, the text encoders.
        token_rows: Token dictionary's key -> rows of the trigger's tokens; empty if tokens are not
            trained.
        layers: Cross-attention layers with token embeddings of their own, whose rows follow one
            another; 0 if all layers read the same embeddings.
        tokens: The trigger's vocabulary entries; empty if the trigger is an ordinary word.
        basis: Basis of the slice; None for the method "lora".
        slice_columns: Input width -> columns of the frozen down-projections; empty for "lora".
        penalized_weights: Up-projections, each with the factor of its squared norm in the loss.
    """

    config: TrainConfig
    adapter: Adapter
    token_rows: dict[str, token_rows.TrainableRows]
    layers: int
    tokens: list[str]
    basis: BasisInfo | None
    slice_columns: dict[int, tuple[int, ...]]
    penalized_weights: list[tuple[nn.Parameter, float]]

    @torch.no_grad()
    def load_concept(self, concept: Concept) -> None:
        """Copy a saved concept's adapter and token embeddings into the parameters."""
        for component, layers in self.adapter.layers.items():
            for module_name, layer in layers.items():
                update = concept.updates[component][saved_module_name(component, module_name)]
                layer.lora_A[self.adapter.name].weight.copy_(update.down)
                layer.lora_B[self.adapter.name].weight.copy_(update.up)
        for key, rows in self.token_rows.items():
            saved = concept.embeddings[key]
            rows.parameter.copy_(saved.transpose(0, 1).flatten(0, 1) if self.layers else saved)

    def token_embeddings(self) -> dict[str, Tensor]:
        """Copy the token embeddings to the CPU.

        Returns:
            Token dictionary's key -> (tokens, width), or (tokens, layers, width) with an embedding
            for each layer.
        """
        embeddings = {
            key: rows.parameter.detach().to("cpu", copy=True)
            for key, rows in self.token_rows.items()
        }
        if not self.layers:
            return embeddings
        return {
            key: rows.unflatten(0, (self.layers, -1)).transpose(0, 1).contiguous()
            for key, rows in embeddings.items()
        }


@dataclass(frozen=True, eq=False)
class Trainable:
    """The trained parameters of a run: of one concept, or of several, whose updates add up.

    Attributes:
        concepts: At least one, in the order of the run.
        layers: Cross-attention layers with token embeddings of their own; 0 if there are none.
    """

    concepts: tuple[TrainableConcept, ...]
    layers: int

    @torch.no_grad()
    def add_penalty_grad(self) -> None:
        """Add the gradient of ``sum factor * ||up||^2`` to the gradients of the loss."""
        for concept in self.concepts:
            for up, factor in concept.penalized_weights:
                if up.grad is not None:
                    up.grad.add_(up, alpha=2.0 * factor)

    def clamp_norms_(self) -> None:
        """Clamp the norms of the token embeddings to the range of the vocabulary's."""
        for concept in self.concepts:
            for rows in concept.token_rows.values():
                rows.clamp_norm_()

    @contextmanager
    def adapters_disabled(self, except_for: TrainableConcept | None = None) -> Iterator[None]:
        """Disable the adapters in this context.

        Args:
            except_for: A concept whose adapter stays enabled.
        """
        with ExitStack() as stack:
            for concept in self.concepts:
                if concept is not except_for:
                    stack.enter_context(concept.adapter.disabled())
            yield

    def parameter_groups(self, family: Family, config: TrainConfig) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups.

        Each group has the name of its learning rate setting as "name" and that setting's value as
        "peak".
        """
        parameters = [concept.adapter.parameters() for concept in self.concepts]
        denoiser = [p for weights in parameters for key in family.denoisers for p in weights[key]]
        text = [
            parameter
            for weights in parameters
            for key, values in weights.items()
            if key not in family.denoisers
            for parameter in values
        ]
        rows = [r.parameter for concept in self.concepts for r in concept.token_rows.values()]
        groups = (
            ("learning_rate", denoiser, config.weight_decay),
            ("text_learning_rate", text, config.weight_decay),
            # The norms of token embeddings are clamped instead of decayed.
            ("token_learning_rate", rows, 0.0),
        )
        return [
            {"name": name, "params": params, "peak": getattr(config, name), "weight_decay": decay}
            for name, params, decay in groups
            if params
        ]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters under names that depend on the settings alone."""
        named = {}
        for concept in self.concepts:
            prefix = f"{concept.config.name}/" if len(self.concepts) > 1 else ""
            for component, weights in concept.adapter.parameters().items():
                for number, parameter in enumerate(weights):
                    named[f"{prefix}adapter/{component}/{number}"] = parameter
            for key, rows in concept.token_rows.items():
                named[f"{prefix}tokens/{key}"] = rows.parameter
        return named

    @torch.no_grad()
    def slice_sketches(self) -> dict[str, Tensor]:
        """Project the frozen down-projections on four fixed vectors, to identify them later.

        Returns:
            "slices/<concept>/<component>" -> float32 (layers, rank, 4), on the CPU; empty for the
            method "lora".
        """
        all_sketches = {}
        for concept in self.concepts:
            for component, layers in concept.adapter.layers.items() if concept.basis else ():
                sketches = []
                for layer in layers.values():
                    down = layer.lora_A[concept.adapter.name].weight
                    generator = torch.Generator().manual_seed(down.shape[1])
                    vectors = torch.randn(down.shape[1], 4, generator=generator)
                    sketches.append(down.to("cpu", torch.float32).flatten(1) @ vectors)
                all_sketches[f"slices/{concept.config.name}/{component}"] = torch.stack(sketches)
        return all_sketches

    def trained_token_ids(self, dictionary: TokenDictionary) -> list[int]:
        """Return the ids of all trained tokens of a dictionary, which are consecutive."""
        key = dictionary.key
        all_rows = [c.token_rows[key] for c in self.concepts if key in c.token_rows]
        return [id_ for rows in all_rows for id_ in token_rows.token_ids(dictionary, rows.names)]

    def expand_triggers(self, caption: str) -> str:
        """Replace each trigger in a caption by its tokens, as the text encoders read it."""
        return token_rows.expand_prompt(caption, self._tokens())

    def layer_prompts(self, caption: str) -> list[str]:
        """Return the caption with the tokens of each cross-attention layer, in order."""
        text, tokens = self.expand_triggers(caption), self._tokens()
        return [
            layerwise_embeddings.expand_for_layer(text, tokens, layer)
            for layer in range(self.layers)
        ]

    def _tokens(self) -> dict[str, list[str]]:
        return {c.config.trigger: c.tokens for c in self.concepts if c.tokens}


@contextmanager
def attach_trainable(
    family: Family,
    configs: Sequence[TrainConfig],
    indices: Sequence[int | None],
    basis: BasisInfo | None,
    directions: LayerFactors,
) -> Iterator[Trainable]:
    """Attach the tokens and adapters of a run's concepts to a model and detach them afterwards.

    Args:
        family: The base model.
        configs: Settings of each concept.
        indices: Slice index of each concept; see
            :func:`customize.concepts.slices.allocation.slice_columns`.
        basis: Basis of the slices; None for the method "lora".
        directions: Shared directions of each layer; empty if the slices avoid none.

    Raises:
        ConfigError, ConceptError, PipelineError: The settings do not fit the model, which is
            unchanged.
    """
    with ExitStack() as stack:
        layers = 0
        if configs[0].layerwise_tokens:
            layers = len(layerwise_embeddings.layers_with_embeddings(family))
            for hook in layerwise_embeddings.hook_cross_attention(family):
                stack.callback(hook.remove)
        # All start from the vocabulary without the tokens of any other concept.
        dictionaries = family.token_dictionaries() if configs[0].train_tokens else []
        initial = [{d.key: _initial_embeddings(d, c) for d in dictionaries} for c in configs]
        concepts = []
        for number, (config, index) in enumerate(zip(configs, indices, strict=True)):
            columns: dict[int, tuple[int, ...]] = {}
            if basis is not None:
                columns = slice_columns(
                    input_widths(family, config),
                    config.rank,
                    index=index,
                    name=config.name,
                    avoid=basis.num_shared_directions,
                )
            rows, tokens = _attach_tokens(stack, family, config, layers, initial[number])
            adapter = attach_new_adapter(
                family,
                method=config.method,
                rank=config.rank,
                alpha=config.adapter_alpha,
                basis=basis,
                columns=columns or None,
                directions=directions,
                components=adapted_components(family, config),
                # Not the seed alone: concepts to be merged must start apart.
                seed=stream_seed(config.seed, config.name, "adapter"),
                name=f"customize_{number}" if number else "customize",
            )
            stack.callback(adapter.remove)
            if config.mixed_precision != "no":
                # peft casts inputs up to the adapter's float32, and autocast casts them down.
                for adapted_layers in adapter.layers.values():
                    for layer in adapted_layers.values():
                        layer.cast_input_dtype_enabled = False
            penalized = []
            if basis and basis.num_shared_directions and config.shared_directions_weight:
                penalized = _penalize(adapter, directions, config.shared_directions_weight)
            concepts.append(
                TrainableConcept(config, adapter, rows, layers, tokens, basis, columns, penalized)
            )
        yield Trainable(tuple(concepts), layers)


def _attach_tokens(
    stack: ExitStack,
    family: Family,
    config: TrainConfig,
    layers: int,
    initial: Mapping[str, Tensor],
) -> tuple[dict[str, token_rows.TrainableRows], list[str]]:
    """Add a trigger's tokens to all dictionaries; the stack removes them.

    Args:
        stack: Receives the callbacks.
        family: The base model.
        config: Settings of the concept.
        layers: Layers with token embeddings of their own.
        initial: Token dictionary's key -> initial embeddings, (tokens, width); empty if tokens are
            not trained, so that the trigger stays an ordinary word.

    Returns:
        Token dictionary's key -> trained rows, and the trigger's vocabulary entries.
    """
    all_rows: dict[str, token_rows.TrainableRows] = {}
    tokens = token_rows.vocabulary_entries(config.trigger, config.num_tokens) if initial else []
    names = tokens
    if layers:
        names = layerwise_embeddings.layer_vocabulary_entries(
            config.trigger, config.num_tokens, layers
        )
    for dictionary in family.token_dictionaries() if initial else ():
        embeddings = initial[dictionary.key].repeat(layers or 1, 1)
        token_rows.add_tokens(dictionary, names, embeddings)
        stack.callback(token_rows.remove_tokens, dictionary, names)
        rows = all_rows[dictionary.key] = token_rows.TrainableRows(dictionary, names)
        stack.callback(rows.remove)
        # The exact values, because the table may be of half precision.
        rows.parameter.data.copy_(embeddings)
        rows.clamp_norm_()
    return all_rows, tokens


def _initial_embeddings(dictionary: TokenDictionary, config: TrainConfig) -> Tensor:
    """The initial token embeddings of a trigger, (tokens, width)."""
    seed = stream_seed(config.seed, config.name, dictionary.key)
    rows = token_rows.initial_rows(dictionary, config.class_word, config.num_tokens, seed)
    if config.token_init != "random":
        rows[:1] = token_rows.initial_rows(dictionary, config.token_init, 1, seed)
    return rows


def _penalize(
    adapter: Adapter, directions: LayerFactors, weight: float
) -> list[tuple[nn.Parameter, float]]:
    """Up-projections with the factor of their squared norm in the loss.

    The penalty is the change of outputs on generic prompts; see
    :mod:`customize.core.avoiding_slices`.
    """
    penalized = []
    for component, layers in adapter.layers.items():
        for module_name, layer in layers.items():
            factor = directions[component][saved_module_name(component, module_name)]
            down, up = layer.lora_A[adapter.name].weight, layer.lora_B[adapter.name].weight
            base = _linear_weight(layer.get_base_layer(), f"{component}.{module_name}")
            change = relative_output_change(down, factor, base, layer.scaling[adapter.name])
            penalized.append((up, weight * change))
    return penalized


@torch.no_grad()
def _linear_weight(layer: Any, where: str) -> Tensor:
    """A linear layer's weight, (out, in); of a quantized layer, from its outputs."""
    try:
        return dense_weight(layer, where)
    except PipelineError:  # exact enough for the factor of a penalty
        device = layer.weight.device
        axes = torch.eye(layer.in_features, device=device)
        origin = torch.zeros(1, layer.in_features, device=device)
        return (layer(axes).float() - layer(origin).float()).T


def adapted_components(family: Family, config: TrainConfig) -> list[str]:
    """Return the names of the components that get an adapter."""
    return [*family.denoisers, *(family.text_encoders if config.train_text_encoder else ())]


def input_widths(family: Family, config: TrainConfig) -> set[int]:
    """Return the input widths of all layers that get an adapter."""
    return {
        width
        for component in adapted_components(family, config)
        for _, width in family.adapter_targets(component).values()
    }


def slice_basis(config: TrainConfig, shared: str) -> BasisInfo | None:
    """Return the basis of the concepts' slices; None for the method "lora".

    Args:
        config: Settings of the run.
        shared: Name of the shared directions that the slices avoid.
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
