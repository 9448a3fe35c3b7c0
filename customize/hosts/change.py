"""The change itself: adapters, weights and vocabularies to what is wanted, wholly or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from customize.concepts.adapter import attach_products, fit
from customize.concepts.layerwise import encode_by_layer, read_by_layer, vocabulary
from customize.concepts.merge import FUSION
from customize.concepts.merge import merging as merge_layers
from customize.concepts.tokens import add_tokens, entries, pool_at_end, remove_tokens
from customize.core.lowrank import LowRank
from customize.errors import PipelineError
from customize.families import Family
from customize.hosts.checks import check_layers, check_range
from customize.hosts.classes import expand_triggers
from customize.hosts.fusing import Updates, check_fusable, check_unchanged, fuse_updates
from customize.hosts.guards import ADAPTER, active_adapters, guard, unguard
from customize.hosts.offload import settled
from customize.hosts.state import Attached, Holder, Merging, keep, tokenizers_of

#: component -> module -> what is to be beside the weight.
Beside = Mapping[str, Mapping[str, LowRank]]


def change(family: Family, holder: Holder, after: dict[str, Attached], merging: Merging) -> None:
    """From what is attached to what is wanted, wholly or not at all.

    Args:
        family: of all that the holder knows to be changed.
        merging: how it is to be merged, with an input for each where that is "fusion".
    """
    before, was_merging = holder.attached, holder.merging
    models = family.adaptable
    new, old = _updates(family, after, merging), _updates(family, before, was_merging)
    layers = {
        (component, module)
        for updates in (*new, *old)
        for component, own in updates.items()
        for module in own
    }
    check_layers(models, sorted(layers))
    for component, model in models.items():
        ours = any(each.is_there() and component in each.models for each in holder.adapters)
        if ADAPTER in getattr(model, "peft_config", {}) and not ours:
            raise PipelineError(
                f"an adapter named {ADAPTER} that was not loaded by load_custom is attached",
                where=component,
                fix=f'call delete_adapters("{ADAPTER}") first, or load it under another name',
            )
    for component, own in new[0].items():
        check_range(component, own, _adapter_dtype(models[component]))
    with _writable(models), settled(models):
        check_fusable(models, new[1])
        holder.originals.update(check_unchanged(models, old[1], holder.originals))
        was = {place: _Use.of(layer) for place, layer in _layers(holder).items()}
        factors = _factors(holder, old[0])
        gone = [adapter for adapter in holder.adapters if not adapter.is_there()]
        try:
            _rebuild(family, models, holder, after, *new)
            for place, layer in _layers(holder).items():
                layer.scaling[ADAPTER] *= factors.get(place, 1.0)
            holder.merging = merging
        except BaseException:
            removed = {component for adapter in gone for component in adapter.models}
            beside = {key: own for key, own in old[0].items() if key not in removed}
            _rebuild(family, models, holder, before, beside, old[1])
            holder.adapters += gone  # so that it is still known to be missing
            for place, use in was.items():
                use.restore(models[place[0]].get_submodule(place[1]))
            raise


def _rebuild(
    family: Family,
    models: Mapping[str, nn.Module],
    holder: Holder,
    attached: dict[str, Attached],
    beside: Beside,
    into: Updates,
) -> None:
    """Make adapters, weights and vocabularies those of ``attached``, from any state between."""
    while holder.adapters:
        # Also where someone deleted it: the layers are wrapped still.
        adapter = holder.adapters.pop()
        for component, layers in adapter.layers.items():
            unguard(adapter.models[component], layers.values())
        adapter.remove()
    fuse_updates(models, into, holder.originals)
    active = active_adapters(models.values())
    with warnings.catch_warnings():
        # That other adapters are there is meant.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for component, updates in beside.items():
            own = {component: updates}
            dtype = _adapter_dtype(models[component])
            holder.adapters.append(attach_products(family, own, name=ADAPTER, dtype=dtype))
            wrapped = list(holder.adapters[-1].layers[component].values())
            guard(models[component], wrapped)
            for layer in wrapped:
                if list(layer.lora_A) == [ADAPTER]:
                    # Names that are not in a layer are harmless there, and diffusers asks just
                    # one layer which adapters of the whole pipeline are active.
                    layer.set_adapter([*active, ADAPTER], inference_mode=True)
    _set_tokens(family, holder, attached)
    holder.attached = attached
    keep(family, holder)


@contextmanager
def _writable(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within it, what is made can be changed wherever the models' own weights can.

    Also where the caller draws in inference mode, whose tensors nobody could change outside it; but
    models that were made in it can be changed nowhere else.
    """
    inside = any(
        weight.is_inference() for model in models.values() for weight in model.parameters()
    )
    with torch.inference_mode(inside), torch.no_grad():
        yield


def _set_tokens(family: Family, holder: Holder, attached: Mapping[str, Attached]) -> None:
    dictionaries = {dictionary.key: dictionary for dictionary in family.token_dictionaries()}
    owned = {
        (key, each.concept.info.trigger): rows
        for each in attached.values()
        for key, rows in each.concept.embeddings.items()
    }
    for key, trigger in list(holder.tokens):
        known = dictionaries[key].tokenizer.get_vocab()
        if trigger not in known:  # someone else's unload_textual_inversion
            left = [name for name in holder.tokens.pop((key, trigger)) if name in known]
            if left:
                remove_tokens(dictionaries[key], left)
            pool_at_end(dictionaries[key])
    for (key, trigger), rows in owned.items():
        if (key, trigger) not in holder.tokens:
            names, whole = vocabulary(trigger, rows)
            add_tokens(dictionaries[key], names, whole)
            holder.tokens[key, trigger] = names
    # Last, because what is removed and added again would have other ids than before.
    for key, trigger in [place for place in holder.tokens if place not in owned]:
        remove_tokens(dictionaries[key], holder.tokens.pop((key, trigger)))
    infos = [each.concept.info for each in attached.values() if each.concept.embeddings]
    triggers = {info.trigger: entries(info.trigger, info.num_tokens) for info in infos}
    layered = [info.trigger for info in infos if info.token_layers]
    layers = max((info.token_layers for info in infos), default=0)
    for tokenizer in tokenizers_of(family).values():
        expand_triggers(tokenizer, triggers, layered, layers)
    while holder.hooks:
        holder.hooks.pop().remove()
    if layers:
        holder.hooks = [*read_by_layer(family), *encode_by_layer(family)]


def _updates(
    family: Family, attached: Mapping[str, Attached], merging: Merging
) -> tuple[Beside, Updates]:
    """The merges of what is to be beside the weights, and what is to be merged into them."""
    beside, into = (_layers_of(family, attached, merging, fused=fused) for fused in (False, True))
    return {c: {m: layer.narrowed() for m, layer in own.items()} for c, own in beside.items()}, into


def _layers_of(
    family: Family, attached: Mapping[str, Attached], merging: Merging, fused: bool
) -> Updates:
    chosen = [each for each in attached.values() if each.fused == fused]
    rest = [each for each in attached.values() if each.fused != fused]
    if not chosen:
        return {}
    inputs = merging.inputs if merging.method == FUSION else {}
    layers = merge_layers(
        [each.concept for each in chosen],
        [each.weight for each in chosen],
        merging.method,
        inputs=[inputs[each.name] for each in chosen] if inputs else (),
        others=[inputs[each.name] for each in rest] if inputs else (),
        **(merging.settings if merging.method == merging.chosen else {}),
    )
    return fit(layers, family)


@dataclass(frozen=True)
class _Use:
    """What others may have set in a layer that carries our adapter."""

    active: list[str]
    scale: float
    flags: dict[str, bool]

    @classmethod
    def of(cls, layer: Any) -> _Use:
        flags = {name: p.requires_grad for name, p in layer.named_parameters()}
        return cls(list(layer.active_adapters), layer.scaling[ADAPTER], flags)

    def restore(self, layer: Any) -> None:
        layer.scaling[ADAPTER] = self.scale
        layer.set_adapter(self.active)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(self.flags.get(name, False))


def _layers(holder: Holder) -> dict[tuple[str, str], Any]:
    """(component, module) -> every layer that carries our adapter still."""
    return {
        (component, module): layer
        for adapter in holder.adapters
        if adapter.is_there()
        for component, layers in adapter.layers.items()
        for module, layer in layers.items()
    }


def _factors(holder: Holder, updates: Beside) -> dict[tuple[str, str], float]:
    """What others have multiplied our adapter with, by diffusers' ``set_adapters``."""
    return {
        (component, module): layer.scaling[ADAPTER] / updates[component][module].scale
        for (component, module), layer in _layers(holder).items()
    }


def _adapter_dtype(model: Any) -> torch.dtype:
    # The model's own; but quantized and 8-bit storage types are none to compute in.
    usable = (torch.float32, torch.float16, torch.bfloat16)
    return model.dtype if model.dtype in usable else torch.float32
