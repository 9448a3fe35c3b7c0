"""Low-rank adapters on a live model: plain peft LoRA layers whose factors we set ourselves."""

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
#: component -> module, under the names used in files -> a factor of what it reads.
LayerFactors = Mapping[str, Mapping[str, Tensor]]


@dataclass(eq=False)
class Adapter:
    """An adapter that sits in one or more models of a family.

    Attributes:
        name: peft's adapter name.
        models: component -> the model that carries it.
        layers: component -> module name in that model -> peft's LoRA layer.
    """

    name: str
    models: dict[str, nn.Module]
    layers: dict[str, dict[str, Any]]
    _initial_states: dict[str, ModelState] = field(repr=False)
    _configs: dict[str, Any] = field(default_factory=dict, repr=False)

    def is_attached(self) -> bool:
        """Whether it is on its models still, and no other one of its name in its place.

        Someone may have removed it, with diffusers' ``unload_lora_weights`` or the like.
        """
        return all(
            getattr(model, "peft_config", {}).get(self.name) is self._configs[component]
            for component, model in self.models.items()
        )

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """component -> what trains: the up-projections, and the down-projections of "lora"."""
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
        """A copy of the factors as they are now, on the CPU, with the names used in files."""
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
        """Within it the models draw as without it."""
        layers = [layer for own in self.layers.values() for layer in own.values()]
        scales = [layer.scaling[self.name] for layer in layers]
        try:
            for layer in layers:
                layer.scaling[self.name] = 0.0
            yield
        finally:
            for layer, scale in zip(layers, scales, strict=True):
                layer.scaling[self.name] = scale

    def replace_updates(self, products: ConceptUpdates, dtype: torch.dtype | None = None) -> None:
        """Carry other updates, in the same layers; see
        :func:`customize.concepts.peft_adapter.replace_factors`.

        Args:
            products: component -> module, by the model's names -> update, of any rank, in no
                other layers than it is in.
            dtype: as of :func:`attach_updates`.
        """
        for component, model in self.models.items():
            updates = products.get(component, {})
            replace_factors(model, self.layers[component], updates, self.name, dtype)
            config: Any = model.peft_config
            self._configs[component] = config[self.name]

    def remove(self) -> None:
        """Give the models back bit for bit as they were; a second call does nothing."""
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
    """Put a new, trainable adapter on all attention projections of the named components.

    "orthogonal": the down-projection is ``basis.scale * O[:, columns]^T`` of the layer's input
    width, frozen, or with ``basis.avoid`` of what is left of that width
    (:func:`customize.core.avoiding_slices.scaled_down_projection`); the up-projection starts at
    zero and trains. "lora": both factors train, from peft's default start (down uniform in
    +-1 / sqrt(in), up zero). Either way the model draws what it drew before until the first step.

    Args:
        rank: columns of the up-projection, the same in every layer.
        alpha: updates are multiplied by alpha / rank; None for alpha = rank, a factor of 1.
        basis, columns: for "orthogonal"; input width -> ``rank`` column numbers.
        directions: with ``basis.avoid``, component -> module, under the names used in files ->
            the factor of its inputs on generic prompts.
        components: such as ("unet", "text_encoder").
        dtype: of both factors; float32 also on a half-precision base.
        seed: of the random start of "lora"; the same on every device.
        name: peft's adapter name.

    Raises:
        ConfigError: an unknown component or basis, a rank above a width, or columns that do not
            fit. Nothing was changed.
        PipelineError: the name is taken. Nothing was changed.
    """
    if rank < 1:
        raise ConfigError(f"an adapter cannot have rank {rank}", where="rank", fix="use at least 1")
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

    def start(place: tuple[str, str], out: int, width: int) -> LowRank:
        if frozen is not None:
            down = frozen[place]
        else:
            down = (2 * torch.rand(rank, width, generator=generator) - 1) / width**0.5
        return LowRank(torch.zeros(out, rank), down, scale)

    products = {
        component: {module: start((component, module), *shape) for module, shape in shapes.items()}
        for component, shapes in targets.items()
    }
    adapter = attach_updates(family, products, name=name, dtype=dtype)
    for component, layers in adapter.layers.items():
        for key, parameter in adapter.models[component].named_parameters():
            if ".lora_" not in key:  # of adapters beside it, which may train as well
                parameter.requires_grad_(False)
        for layer in layers.values():
            layer.lora_A[name].weight.requires_grad_(method == "lora")
            layer.lora_B[name].weight.requires_grad_(True)
    return adapter


def attach_updates(
    family: Family, products: ConceptUpdates, *, name: str, dtype: torch.dtype | None = None
) -> Adapter:
    """Put given updates on a model as one frozen, active adapter beside those already there.

    Args:
        products: component -> module -> update; ranks and scales may differ between layers.
        name: peft's adapter name, new to every model concerned.
        dtype: of the factors; None for that of each layer's weight.

    Raises:
        ConceptError: an update does not fit the model (:func:`match_to_model`); nothing changes.
        PipelineError: the name is taken. Nothing was changed.
    """
    fitted = match_to_model(products, family)
    models = {component: uncompiled(family.components[component]) for component in fitted}
    for component, model in models.items():
        if name in getattr(model, "peft_config", {}):
            raise PipelineError(
                f"an adapter named {name} is attached already",
                where=component,
                fix="remove it first, or choose another name",
            )
    adapter = Adapter(name, models, {}, {})
    try:
        for component, model in models.items():
            adapter._initial_states[component] = ModelState.of(model)
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
    products: Mapping[str, Mapping[str, Update]], family: Family
) -> dict[str, dict[str, Update]]:
    """The same updates under the names that this model gives its layers.

    Files call the layers of a CLIP text encoder ``text_model.encoder...`` as the whole community
    does; recent transformers have no ``text_model`` in the plain text encoder.

    Raises:
        ConceptError: a component or layer is not here, has another shape, or is named twice.
    """
    fitted: dict[str, dict[str, Update]] = {}
    for component, updates in products.items():
        try:
            targets = family.layers(component)
        except (ConfigError, PipelineError) as error:
            raise ConceptError(
                f"the model has no {component} that could take the concept's updates",
                fix="use a concept of this model family, and a pipeline with all its parts",
            ) from error
        fitted[component] = {}
        for module, update in updates.items():
            name = module if module in targets else module.removeprefix("text_model.")
            if targets.get(name) != update.shape:
                found = f"of shape {targets[name]}" if name in targets else "missing"
                raise ConceptError(
                    f"an update of shape {update.shape} has no place: the layer is {found}",
                    where=f"{component}.{module}",
                    fix="use a concept that was learned on this model family and size",
                )
            if name in fitted[component]:
                raise ConceptError(
                    "two updates are given for one layer, under its old and its new name",
                    where=f"{component}.{module}",
                    fix="merge them into one update first",
                )
            fitted[component][name] = update
    return fitted


def saved_module_name(component: str, module: str) -> str:
    """The name of a module in files: that of the model, CLIP's with its old ``text_model.``."""
    flat = component.startswith("text_encoder") and module.startswith("encoder.layers.")
    return f"text_model.{module}" if flat else module


def _frozen_down_projections(
    targets: Mapping[str, Mapping[str, tuple[int, int]]],
    rank: int,
    basis: BasisInfo | None,
    columns: Mapping[int, Sequence[int]] | None,
    directions: LayerFactors | None,
) -> dict[tuple[str, str], Tensor]:
    """(component, module) -> down-projection; layers of the same have one tensor."""
    if basis is None or columns is None:
        raise ConfigError(
            "orthogonal adaptation needs an orthogonal matrix (basis) and each width's columns",
            fix="give basis and columns, or use the method lora",
        )
    widths = {shape[1] for shapes in targets.values() for shape in shapes.values()}
    for width in sorted(widths):
        if len(columns.get(width, ())) != rank:
            raise ConfigError(
                f"width {width} has {len(columns.get(width, ()))} columns for rank {rank}",
                where="columns",
                fix="give as many columns as the rank for each width",
            )
    fn, found = BASES[basis.kind], {}
    known: dict[int, Tensor] = {}  # by width, or by the inputs that layers have in common
    for component, shapes in targets.items():
        for module, (_, width) in shapes.items():
            chosen = columns[width]
            if not basis.num_shared_directions:
                if width not in known:
                    known[width] = down_projection(fn, width, chosen, basis.seed, basis.scale)
                found[component, module] = known[width]
                continue
            inputs = (directions or {}).get(component, {}).get(saved_module_name(component, module))
            if inputs is None:
                raise ConfigError(
                    "the layer's inputs on generic prompts are not known",
                    where=f"{component}.{module}",
                    fix="give directions of every layer, or a basis that avoids none",
                )
            if id(inputs) not in known:
                known[id(inputs)] = avoiding_slices.scaled_down_projection(
                    fn,
                    inputs,
                    chosen,
                    basis.seed,
                    avoid=basis.num_shared_directions,
                    scale=basis.scale,
                )
            found[component, module] = known[id(inputs)]
    return found


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", copy=True)


def flatten_layers(parts: Mapping[str, Mapping[str, Value]]) -> dict[str, Value]:
    """What a concept has for each layer, such as its updates or its record, in one mapping.

    Args:
        parts: component -> module, by the model's names or those of files -> value.

    Returns:
        "component.module", as files name it -> value, in the same order.
    """
    return {
        f"{component}.{saved_module_name(component, module)}": value
        for component, own in parts.items()
        for module, value in own.items()
    }
