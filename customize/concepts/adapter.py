"""Low-rank adapters on a live model: plain peft LoRA layers whose factors are set here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from customize.concepts.concept_info import BasisInfo, Method
from customize.concepts.peft_adapter import ModelState, inject_adapter, replace_factors
from customize.core import avoiding_slices
from customize.core.bases import BASES, down_projection
from customize.core.lowrank import LowRank
from customize.errors import ConceptError, ConfigError, PipelineError
from customize.families.family import Family
from customize.families.pipeline_components import uncompiled

ConceptUpdates = Mapping[str, Mapping[str, LowRank]]
#: component -> module name, as in files -> (n, in), a factor of the second moment of its inputs.
LayerFactors = Mapping[str, Mapping[str, Tensor]]


@dataclass(eq=False)
class Adapter:
    """An adapter in one or more models of a family.

    Attributes:
        name: Adapter name in peft.
        models: Component -> model.
        layers: Component -> module name in the model -> peft's LoRA layer.
    """

    name: str
    models: dict[str, nn.Module]
    layers: dict[str, dict[str, Any]]
    _initial_states: dict[str, ModelState] = field(repr=False)
    _configs: dict[str, Any] = field(default_factory=dict, repr=False)

    def is_attached(self) -> bool:
        """Whether all models still have this adapter, and not another one of its name.

        Other code may have removed it, for example diffusers' ``unload_lora_weights``.
        """
        return all(
            getattr(model, "peft_config", {}).get(self.name) is self._configs[component]
            for component, model in self.models.items()
        )

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """The trainable factors: up-projections, and down-projections for the method "lora".

        Returns:
            Component -> factors.
        """
        return {
            component: [
                factor.weight
                for layer in layers.values()
                for factor in (layer.lora_A[self.name], layer.lora_B[self.name])
                if factor.weight.requires_grad
            ]
            for component, layers in self.layers.items()
        }

    def updates(self) -> dict[str, dict[str, LowRank]]:
        """Copies of the current factors on the CPU.

        Returns:
            Component -> module name, as in files -> update.
        """
        return {
            component: {
                saved_module_name(component, module): LowRank(
                    _copy(layer.lora_B[self.name].weight),
                    _copy(layer.lora_A[self.name].weight),
                    float(layer.scaling[self.name]),
                )
                for module, layer in layers.items()
            }
            for component, layers in self.layers.items()
        }

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable the adapter inside the context, by a scale of zero."""
        layers = [layer for modules in self.layers.values() for layer in modules.values()]
        scales = [layer.scaling[self.name] for layer in layers]
        try:
            for layer in layers:
                layer.scaling[self.name] = 0.0
            yield
        finally:
            for layer, scale in zip(layers, scales, strict=True):
                layer.scaling[self.name] = scale

    def replace_updates(self, updates: ConceptUpdates, dtype: torch.dtype | None = None) -> None:
        """Replace the updates, in the same layers.

        Args:
            updates: Component -> module name in the model -> update of any rank; a layer of the
                adapter without an update gets rank 0. Layers that do not have the adapter are not
                allowed.
            dtype: As for :func:`attach_updates`.
        """
        for component, model in self.models.items():
            layers = self.layers[component]
            replace_factors(model, layers, updates.get(component, {}), self.name, dtype)
            config: Any = model.peft_config
            self._configs[component] = config[self.name]

    def remove(self) -> None:
        """Restore the models bit for bit; a second call does nothing."""
        for component in list(self._initial_states):
            self._initial_states.pop(component).restore(self.models[component], self.name)


def attach_new_adapter(
    family: Family,
    *,
    method: Method,
    rank: int,
    alpha: float | None = None,
    basis: BasisInfo | None = None,
    columns: Mapping[int, Sequence[int]] | None = None,
    directions: LayerFactors | None = None,
    components: Sequence[str],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    name: str = "customize",
) -> Adapter:
    """Attach a new, trainable adapter to all attention projections of some components.

    Method "orthogonal" (Orthogonal Adaptation, arXiv 2312.02432): the down-projection
    ``basis.scale * O[:, columns]^T`` of the layer's input width is frozen; with shared directions,
    :func:`customize.core.avoiding_slices.scaled_down_projection` makes it orthogonal to these. The
    up-projection starts at zero and is trained. Method "lora" (arXiv 2106.09685): both factors are
    trained; the down-projection starts uniform in +-1 / sqrt(in), the up-projection at zero. The
    model's output does not change before the first training step.

    Args:
        family: The model.
        method: "orthogonal" or "lora".
        rank: Rank of every layer.
        alpha: Numerator of the scale alpha / rank; None for a scale of 1.
        basis: For "orthogonal", the basis of the slices.
        columns: For "orthogonal", input width -> ``rank`` column numbers.
        directions: For a basis with shared directions, component -> module name, as in files ->
            (n, in), the factor of the layer's inputs on generic prompts.
        components: Components to adapt, such as ("unet", "text_encoder").
        dtype: Dtype of both factors; float32 also on a half-precision base.
        seed: Seed of the down-projections of "lora"; results are equal on all devices.
        name: Adapter name in peft.

    Raises:
        ConfigError: If a component or basis is unknown, the rank exceeds a width, or the columns do
            not fit. The model is unchanged.
        PipelineError: If the name is taken. The model is unchanged.
    """
    if rank < 1:
        raise ConfigError(f"invalid adapter rank {rank}", where="rank", fix="use at least 1")
    targets = {component: family.adapter_targets(component) for component in components}
    for component, shapes in targets.items():
        for module, (out, width) in shapes.items():
            if rank > min(out, width):
                raise ConfigError(
                    f"rank {rank} does not fit a layer of width {min(out, width)}",
                    where=f"{component}.{module}",
                    fix=f"choose a rank of at most {min(out, width)}",
                )
    generator = torch.Generator().manual_seed(seed)
    frozen = (
        _frozen_down_projections(targets, rank, basis, columns, directions)
        if method == "orthogonal"
        else None
    )
    scale = (rank if alpha is None else alpha) / rank

    def initial_update(layer: tuple[str, str], out: int, width: int) -> LowRank:
        if frozen is not None:
            down = frozen[layer]
        else:
            down = (2 * torch.rand(rank, width, generator=generator) - 1) / width**0.5
        return LowRank(torch.zeros(out, rank), down, scale)

    updates = {
        component: {
            module: initial_update((component, module), *shape) for module, shape in shapes.items()
        }
        for component, shapes in targets.items()
    }
    adapter = attach_updates(family, updates, name=name, dtype=dtype)
    for component, layers in adapter.layers.items():
        for key, parameter in adapter.models[component].named_parameters():
            if ".lora_" not in key:  # other adapters may be trained as well
                parameter.requires_grad_(False)
        for layer in layers.values():
            layer.lora_A[name].weight.requires_grad_(method == "lora")
            layer.lora_B[name].weight.requires_grad_(True)
    return adapter


def attach_updates(
    family: Family, updates: ConceptUpdates, *, name: str, dtype: torch.dtype | None = None
) -> Adapter:
    """Attach updates as one frozen, active adapter beside the existing adapters.

    Args:
        family: The model.
        updates: Component -> module name, as in files or in the model -> update; ranks and scales
            may differ between layers.
        name: Adapter name in peft, new to every adapted component.
        dtype: Dtype of the factors; None for the dtype of each layer's weight.

    Raises:
        ConceptError: If an update does not fit the model (:func:`match_to_model`); the model is
            unchanged.
        PipelineError: If the name is taken; the model is unchanged.
    """
    fitted = match_to_model(updates, family)
    models = {component: uncompiled(family.components[component]) for component in fitted}
    for component, model in models.items():
        if name in getattr(model, "peft_config", {}):
            raise PipelineError(
                f"an adapter named {name} is already attached",
                where=component,
                fix="remove it first, or choose another name",
            )
    adapter = Adapter(name, models, {}, {})
    try:
        for component, model in models.items():
            adapter._initial_states[component] = ModelState.capture(model)
            adapter.layers[component] = inject_adapter(model, fitted[component], name, dtype)
            config: Any = model.peft_config
            adapter._configs[component] = config[name]
    except BaseException:
        adapter.remove()
        raise
    return adapter


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, int]: ...


Update = TypeVar("Update", bound=_Shaped)
Value = TypeVar("Value")


def match_to_model(
    updates: Mapping[str, Mapping[str, Update]], family: Family
) -> dict[str, dict[str, Update]]:
    """The same updates by the module names of a model.

    Files name the layers of a CLIP text encoder ``text_model.encoder...``; recent versions of
    transformers have no ``text_model`` in the plain text encoder.

    Args:
        updates: Component -> module name, as in files or in the model -> update.
        family: The model.

    Raises:
        ConceptError: If the model lacks a component or layer, a layer has another shape, or two
            updates are for one layer.
    """
    fitted: dict[str, dict[str, Update]] = {}
    for component, layers in updates.items():
        try:
            targets = family.layers(component)
        except (ConfigError, PipelineError) as error:
            raise ConceptError(
                f"the model has no {component} for the concept's updates",
                fix="use a concept of this model family, and a pipeline with all its parts",
            ) from error
        fitted[component] = {}
        for module, update in layers.items():
            name = module if module in targets else module.removeprefix("text_model.")
            if targets.get(name) != update.shape:
                layer = f"has shape {targets[name]}" if name in targets else "is missing"
                raise ConceptError(
                    f"an update of shape {update.shape} does not fit: the layer {layer}",
                    where=f"{component}.{module}",
                    fix="use a concept that was learned on this model family and size",
                )
            if name in fitted[component]:
                raise ConceptError(
                    "two updates are for one layer, by its old and its new name",
                    where=f"{component}.{module}",
                    fix="merge them into one update first",
                )
            fitted[component][name] = update
    return fitted


def saved_module_name(component: str, module: str) -> str:
    """A module's name in files: the model's, for CLIP with the older ``text_model.`` prefix."""
    flat = component.startswith("text_encoder") and module.startswith("encoder.layers.")
    return f"text_model.{module}" if flat else module


def _frozen_down_projections(
    targets: Mapping[str, Mapping[str, tuple[int, int]]],
    rank: int,
    basis: BasisInfo | None,
    columns: Mapping[int, Sequence[int]] | None,
    directions: LayerFactors | None,
) -> dict[tuple[str, str], Tensor]:
    """The frozen down-projections; equal ones share one tensor.

    Returns:
        (component, module) -> (rank, in).
    """
    if basis is None or columns is None:
        raise ConfigError(
            "the method orthogonal needs a basis, and columns of each width",
            fix="pass basis and columns, or use the method lora",
        )
    widths = {shape[1] for shapes in targets.values() for shape in shapes.values()}
    for width in sorted(widths):
        if len(columns.get(width, ())) != rank:
            raise ConfigError(
                f"width {width} has {len(columns.get(width, ()))} columns, and the rank is {rank}",
                where="columns",
                fix="pass as many columns as the rank for each width",
            )
    matrix_columns, projections = BASES[basis.kind], {}
    # Width, or id of the inputs that several layers share -> down-projection.
    computed: dict[int, Tensor] = {}
    for component, shapes in targets.items():
        for module, (_, width) in shapes.items():
            chosen = columns[width]
            if not basis.num_shared_directions:
                if width not in computed:
                    computed[width] = down_projection(
                        matrix_columns, width, chosen, basis.seed, basis.scale
                    )
                projections[component, module] = computed[width]
                continue
            inputs = (directions or {}).get(component, {}).get(saved_module_name(component, module))
            if inputs is None:
                raise ConfigError(
                    "the layer's inputs on generic prompts are missing",
                    where=f"{component}.{module}",
                    fix="pass directions of every layer, or a basis without shared directions",
                )
            if id(inputs) not in computed:
                computed[id(inputs)] = avoiding_slices.scaled_down_projection(
                    matrix_columns,
                    inputs,
                    chosen,
                    basis.seed,
                    avoid=basis.num_shared_directions,
                    scale=basis.scale,
                )
            projections[component, module] = computed[id(inputs)]
    return projections


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", copy=True)


def flatten_layers(parts: Mapping[str, Mapping[str, Value]]) -> dict[str, Value]:
    """Flatten a mapping of components and layers, such as updates or recorded inputs.

    Args:
        parts: Component -> module name, in the model or as in files -> value.

    Returns:
        "component.module", as in files -> value, in the same order.
    """
    return {
        f"{component}.{saved_module_name(component, module)}": value
        for component, layers in parts.items()
        for module, value in layers.items()
    }
