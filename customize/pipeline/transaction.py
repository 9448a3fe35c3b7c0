"""The change itself: adapters, weights and vocabularies to what is wanted, wholly or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from customize.base.offload import materialize
from customize.concepts.adapter import attach_products, fit
from customize.concepts.merge.merge_concepts import FUSION, plan_merge
from customize.concepts.tokens.layerwise_embeddings import (
    hook_cross_attention,
    hook_text_encoder,
    vocabulary_rows,
)
from customize.concepts.tokens.token_rows import (
    add_tokens,
    has_rows,
    known_tokens,
    pool_at_end,
    remove_tokens,
    vocabulary_entries,
)
from customize.core.lowrank import LowRank
from customize.errors import PipelineError
from customize.families import Family
from customize.pipeline import set_biases_and_norms
from customize.pipeline.fuse_weights import Updates, check_fusable, check_unchanged, fuse_updates
from customize.pipeline.model_guards import ADAPTER, active_adapters, guard, unguard
from customize.pipeline.set_biases_and_norms import sums_of
from customize.pipeline.state import Attached, Holder, Merging, keep, tokenizers_of
from customize.pipeline.tokenizer_subclass import expand_triggers
from customize.pipeline.validation import check_layers, check_range

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
    dtypes = _adapter_dtypes(models, holder)
    new = _updates(family, holder, after, merging, dtypes)
    old = _updates(family, holder, before, was_merging, dtypes)
    layers = {
        (component, module)
        for updates in (*new, *old)
        for component, own in updates.items()
        for module in own
    }
    layers |= _layers(holder).keys()  # of a library's, some may be idle
    check_layers(models, sorted(layers), wrapping=not _can_swap(holder, new[0]))
    for component, model in models.items():
        ours = any(each.is_there() and component in each.models for each in holder.adapters)
        if ADAPTER in getattr(model, "peft_config", {}) and not ours:
            raise PipelineError(
                f"an adapter named {ADAPTER} that was not loaded by load_custom is attached",
                where=component,
                fix=f'call delete_adapters("{ADAPTER}") first, or load it under another name',
            )
    with _writable(models), materialize(models):
        check_fusable(models, new[1], holder.originals)
        vectors = sums_of(after, merging.method), sums_of(before, was_merging.method)
        set_biases_and_norms.check_vectors(models, vectors[0], holder.vectors)
        unchanged = set_biases_and_norms.check_unchanged(models, vectors[1], holder.vectors)
        originals = check_unchanged(models, old[1], holder.originals)
        was = {place: _Use.of(layer) for place, layer in _layers(holder).items()}
        factors = _factors(holder, old[0])
        gone = [adapter for adapter in holder.adapters if not adapter.is_there()]
        try:
            holder.originals.update(originals)
            holder.vectors.update(unchanged)
            set_biases_and_norms.set_vectors(models, vectors[0], holder.vectors)
            _rebuild(family, models, holder, after, *new, dtypes)
            for place, layer in _layers(holder).items():
                layer.scaling[ADAPTER] *= factors.get(place, 1.0)
            holder.merging = merging
        except BaseException:
            removed = {component for adapter in gone for component in adapter.models}
            beside = {key: own for key, own in old[0].items() if key not in removed}
            set_biases_and_norms.set_vectors(models, vectors[1], holder.vectors)
            _rebuild(family, models, holder, before, beside, old[1], dtypes)
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
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Make adapters, weights and vocabularies those of ``attached``, from any state between."""
    swapped = _can_swap(holder, beside)
    while holder.adapters and not swapped:
        # Also where someone deleted it: the layers are wrapped still.
        adapter = holder.adapters.pop()
        for component, layers in adapter.layers.items():
            unguard(adapter.models[component], layers.values())
        adapter.remove()
    fuse_updates(models, into, holder.originals)
    for adapter in holder.adapters:
        (component,) = adapter.models
        adapter.swap(beside, dtypes[component])
    if not swapped:
        _wrap(family, models, holder, beside, dtypes)
    _set_tokens(family, holder, attached)
    holder.attached = attached
    keep(family, holder)


def _wrap(
    family: Family,
    models: Mapping[str, nn.Module],
    holder: Holder,
    beside: Beside,
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Put an adapter with these updates into each model that they change."""
    active = active_adapters(models.values())
    with warnings.catch_warnings():
        # That other adapters are there is meant.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for component, updates in beside.items():
            own, dtype = {component: updates}, dtypes[component]
            holder.adapters.append(attach_products(family, own, name=ADAPTER, dtype=dtype))
            wrapped = list(holder.adapters[-1].layers[component].values())
            guard(models[component], wrapped)
            for layer in wrapped:
                if list(layer.lora_A) == [ADAPTER]:
                    # Names that are not in a layer are harmless there, and diffusers asks just
                    # one layer which adapters of the whole pipeline are active.
                    layer.set_adapter([*active, ADAPTER], inference_mode=True)


def _can_swap(holder: Holder, beside: Beside) -> bool:
    """Whether the adapters that are there can carry these updates, without wrapping layers anew.

    They keep no layer more than they change, but for a library, where the next call may need it.
    """
    if not holder.adapters or not all(adapter.is_there() for adapter in holder.adapters):
        return False
    layers = {key: own.keys() for each in holder.adapters for key, own in each.layers.items()}
    if holder.shelf is None:
        return layers == {key: own.keys() for key, own in beside.items()}
    return all(own.keys() <= layers.get(key, set()) for key, own in beside.items())


@contextmanager
def _writable(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within it, what is made can be changed wherever the models' own weights can.

    Also where the caller draws in inference mode, whose tensors nobody could change outside it; but
    models that were made in it can be changed nowhere else.
    """
    # A model is made in one mode, so one of its weights tells; a walk over all takes long.
    inside = any(next(model.parameters()).is_inference() for model in models.values())
    with torch.inference_mode(inside), torch.no_grad():
        yield


def _set_tokens(family: Family, holder: Holder, attached: Mapping[str, Attached]) -> None:
    dictionaries = {dictionary.key: dictionary for dictionary in family.token_dictionaries()}
    owned = {
        (key, subject.trigger): rows
        for each in attached.values()
        for subject in each.concept.subjects
        for key, rows in subject.embeddings.items()
    }
    for (key, trigger), names in list(holder.tokens.items()):
        left = known_tokens(dictionaries[key].tokenizer, names)
        if trigger not in left:  # someone else's unload_textual_inversion
            del holder.tokens[key, trigger]
            if left:
                remove_tokens(dictionaries[key], left)
            pool_at_end(dictionaries[key])
    owners = {t: each.concept for each in attached.values() for t in each.concept.info.triggers}
    before = {
        t: each.concept for each in holder.attached.values() for t in each.concept.info.triggers
    }
    for (key, trigger), rows in owned.items():
        dictionary, (names, whole) = dictionaries[key], vocabulary_rows(trigger, rows)
        # Of a library's, what is left from an earlier call may be of a file that has changed since.
        if (
            holder.shelf is not None
            and (key, trigger) in holder.tokens
            and owners[trigger] is not before.get(trigger)
            and not (holder.tokens[key, trigger] == names and has_rows(dictionary, names, whole))
        ):
            remove_tokens(dictionary, holder.tokens.pop((key, trigger)))
        if (key, trigger) not in holder.tokens:
            add_tokens(dictionary, names, whole)
            holder.tokens[key, trigger] = names
    # Last, because what is removed and added again would have other ids than before. With a library
    # they stay, as removing them takes a second of a large vocabulary.
    gone = [place for place in holder.tokens if place not in owned and holder.shelf is None]
    for key in {key for key, _ in gone}:
        entries_of = [holder.tokens.pop(place) for place in gone if place[0] == key]
        remove_tokens(dictionaries[key], [name for names in entries_of for name in names])
    subjects = [subject for each in attached.values() for subject in each.concept.subjects]
    triggers = {
        each.trigger: vocabulary_entries(each.trigger, each.num_tokens) for each in subjects
    }
    layered = [each.trigger for each in subjects if each.token_layers]
    layers = max((each.token_layers for each in subjects), default=0)
    for tokenizer in tokenizers_of(family).values():
        expand_triggers(tokenizer, triggers, layered, layers)
    while holder.hooks:
        holder.hooks.pop().remove()
    if layers:
        holder.hooks = [*hook_cross_attention(family), *hook_text_encoder(family)]


def _updates(
    family: Family,
    holder: Holder,
    attached: Mapping[str, Attached],
    merging: Merging,
    dtypes: Mapping[str, torch.dtype],
) -> tuple[Beside, Updates]:
    """The merges of what is to be beside the weights, and what is to be merged into them.

    Args:
        dtypes: component -> the type of its adapter.

    Raises:
        ConfigError: the first do not fit into the adapters' types.
    """

    def make() -> Beside:
        layers = _layers_of(family, attached, merging, fused=False)
        beside = {c: {m: layer.truncate() for m, layer in own.items()} for c, own in layers.items()}
        for component, own in beside.items():
            check_range(component, own, dtypes[component], layers[component])
        return beside

    def make_ready() -> Beside:
        return {
            component: {module: _ready(u, dtypes[component], on_cuda) for module, u in own.items()}
            for component, own in make().items()
        }

    into = _layers_of(family, attached, merging, fused=True)
    if holder.shelf is None:
        return make(), into
    # Not its .device, for which diffusers walks over all modules.
    on_cuda = next(family.denoiser.parameters()).is_cuda
    said = tuple((name, each.weight, each.fused) for name, each in attached.items())
    inputs = merging.inputs if merging.method == FUSION else {}
    of = [*(each.concept for each in attached.values()), *inputs.values()]
    how = (merging.method, *sorted(merging.settings.items()), said, *dtypes.values(), on_cuda)
    return holder.shelf.merged(how, of, make_ready), into


def _ready(update: LowRank, dtype: torch.dtype, pinned: bool) -> LowRank:
    """An update in the adapter's type; pinned, a GPU copies it while the CPU goes on."""
    up, down = update.up.to(dtype), update.down.to(dtype)
    if pinned:
        up, down = up.pin_memory(), down.pin_memory()
    return LowRank(up, down, update.scale)


def _layers_of(
    family: Family, attached: Mapping[str, Attached], merging: Merging, fused: bool
) -> Updates:
    """What is to be merged of those concepts that are fused, or of those that are not."""
    chosen = [each for each in attached.values() if each.fused == fused]
    rest = [each for each in attached.values() if each.fused != fused]
    if not chosen:
        return {}
    inputs = merging.inputs if merging.method == FUSION else {}
    layers = plan_merge(
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
        if module in updates.get(component, {})  # where it is active
    }


def _adapter_dtypes(models: Mapping[str, nn.Module], holder: Holder) -> dict[str, torch.dtype]:
    """Component -> the type of our adapter there: as it is, or where there is none, as it will be.

    Whoever casts the model casts what is there as well.
    """
    there = {
        component: next(iter(layers.values())).lora_B[ADAPTER].weight.dtype
        for adapter in holder.adapters
        if adapter.is_there()
        for component, layers in adapter.layers.items()
    }
    return {key: there.get(key) or _adapter_dtype(model) for key, model in models.items()}


def _adapter_dtype(model: Any) -> torch.dtype:
    # The model's own; but quantized and 8-bit storage types are none to compute in.
    usable = (torch.float32, torch.float16, torch.bfloat16)
    return model.dtype if model.dtype in usable else torch.float32
