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
from customize.concepts.adapter import attach_updates, match_to_model
from customize.concepts.merge.merge_concepts import plan_merge
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
from customize.core.merges import MERGES
from customize.errors import PipelineError
from customize.families import Family
from customize.pipeline import set_biases_and_norms
from customize.pipeline.fuse_weights import (
    FusedUpdates,
    check_fusable,
    check_unchanged,
    fuse_updates,
)
from customize.pipeline.model_guards import (
    ADAPTER_NAME,
    active_adapters,
    guard_fusing,
    unguard_fusing,
)
from customize.pipeline.set_biases_and_norms import sum_vectors
from customize.pipeline.state import (
    AttachedConcept,
    AttachedState,
    MergePlan,
    get_tokenizers,
    set_state,
)
from customize.pipeline.tokenizer_subclass import expand_triggers
from customize.pipeline.validation import check_layers, check_range

#: component -> module -> what is to be beside the weight.
AdapterUpdates = Mapping[str, Mapping[str, LowRank]]


def apply_attachments(
    family: Family, state: AttachedState, after: dict[str, AttachedConcept], merging: MergePlan
) -> None:
    """From what is attached to what is wanted, wholly or not at all.

    Args:
        family: of all that the state knows to be changed.
        merging: how it is to be merged, with an input for each where that is "fusion".
    """
    before, was_merging = state.attached, state.merge_plan
    models = family.adaptable
    dtypes = _adapter_dtypes(models, state)
    new = _updates(family, state, after, merging, dtypes)
    old = _updates(family, state, before, was_merging, dtypes)
    layers = {
        (component, module)
        for updates in (*new, *old)
        for component, own in updates.items()
        for module in own
    }
    layers |= _layers(state).keys()  # of a library's, some may be idle
    check_layers(models, sorted(layers), wrapping=not _can_swap(state, new[0]))
    for component, model in models.items():
        ours = any(each.is_attached() and component in each.models for each in state.adapters)
        if ADAPTER_NAME in getattr(model, "peft_config", {}) and not ours:
            raise PipelineError(
                f"an adapter named {ADAPTER_NAME} that was not loaded by load_custom is attached",
                where=component,
                fix=f'call delete_adapters("{ADAPTER_NAME}") first, or load it under another name',
            )
    with _writable(models), materialize(models):
        check_fusable(models, new[1], state.weight_originals)
        vectors = sum_vectors(after, merging.method), sum_vectors(before, was_merging.method)
        set_biases_and_norms.check_vectors(models, vectors[0], state.vector_originals)
        unchanged = set_biases_and_norms.check_unchanged(models, vectors[1], state.vector_originals)
        originals = check_unchanged(models, old[1], state.weight_originals)
        was = {place: _Use.of(layer) for place, layer in _layers(state).items()}
        factors = _factors(state, old[0])
        gone = [adapter for adapter in state.adapters if not adapter.is_attached()]
        try:
            state.weight_originals.update(originals)
            state.vector_originals.update(unchanged)
            set_biases_and_norms.set_vectors(models, vectors[0], state.vector_originals)
            _rebuild(family, models, state, after, *new, dtypes)
            for place, layer in _layers(state).items():
                layer.scaling[ADAPTER_NAME] *= factors.get(place, 1.0)
            state.merge_plan = merging
        except BaseException:
            removed = {component for adapter in gone for component in adapter.models}
            beside = {key: own for key, own in old[0].items() if key not in removed}
            set_biases_and_norms.set_vectors(models, vectors[1], state.vector_originals)
            _rebuild(family, models, state, before, beside, old[1], dtypes)
            state.adapters += gone  # so that it is still known to be missing
            for place, use in was.items():
                use.restore(models[place[0]].get_submodule(place[1]))
            raise


def _rebuild(
    family: Family,
    models: Mapping[str, nn.Module],
    state: AttachedState,
    attached: dict[str, AttachedConcept],
    beside: AdapterUpdates,
    into: FusedUpdates,
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Make adapters, weights and vocabularies those of ``attached``, from any state between."""
    swapped = _can_swap(state, beside)
    while state.adapters and not swapped:
        # Also where someone deleted it: the layers are wrapped still.
        adapter = state.adapters.pop()
        for component, layers in adapter.layers.items():
            unguard_fusing(adapter.models[component], layers.values())
        adapter.remove()
    fuse_updates(models, into, state.weight_originals)
    for adapter in state.adapters:
        (component,) = adapter.models
        adapter.replace_updates(beside, dtypes[component])
    if not swapped:
        _wrap(family, models, state, beside, dtypes)
    _set_tokens(family, state, attached)
    state.attached = attached
    set_state(family, state)


def _wrap(
    family: Family,
    models: Mapping[str, nn.Module],
    state: AttachedState,
    beside: AdapterUpdates,
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Put an adapter with these updates into each model that they change."""
    active = active_adapters(models.values())
    with warnings.catch_warnings():
        # That other adapters are there is meant.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for component, updates in beside.items():
            own, dtype = {component: updates}, dtypes[component]
            state.adapters.append(attach_updates(family, own, name=ADAPTER_NAME, dtype=dtype))
            wrapped = list(state.adapters[-1].layers[component].values())
            guard_fusing(models[component], wrapped)
            for layer in wrapped:
                if list(layer.lora_A) == [ADAPTER_NAME]:
                    # Names that are not in a layer are harmless there, and diffusers asks just
                    # one layer which adapters of the whole pipeline are active.
                    layer.set_adapter([*active, ADAPTER_NAME], inference_mode=True)


def _can_swap(state: AttachedState, beside: AdapterUpdates) -> bool:
    """Whether the adapters that are there can carry these updates, without wrapping layers anew.

    They keep no layer more than they change, but for a library, where the next call may need it.
    """
    if not state.adapters or not all(adapter.is_attached() for adapter in state.adapters):
        return False
    layers = {key: own.keys() for each in state.adapters for key, own in each.layers.items()}
    if state.library_cache is None:
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


def _set_tokens(
    family: Family, state: AttachedState, attached: Mapping[str, AttachedConcept]
) -> None:
    dictionaries = {dictionary.key: dictionary for dictionary in family.token_dictionaries()}
    owned = {
        (key, subject.trigger): rows
        for each in attached.values()
        for subject in each.concept.subjects
        for key, rows in subject.embeddings.items()
    }
    for (key, trigger), names in list(state.token_names.items()):
        left = known_tokens(dictionaries[key].tokenizer, names)
        if trigger not in left:  # someone else's unload_textual_inversion
            del state.token_names[key, trigger]
            if left:
                remove_tokens(dictionaries[key], left)
            pool_at_end(dictionaries[key])
    owners = {t: each.concept for each in attached.values() for t in each.concept.info.triggers}
    before = {
        t: each.concept for each in state.attached.values() for t in each.concept.info.triggers
    }
    for (key, trigger), rows in owned.items():
        dictionary, (names, whole) = dictionaries[key], vocabulary_rows(trigger, rows)
        # Of a library's, what is left from an earlier call may be of a file that has changed since.
        if (
            state.library_cache is not None
            and (key, trigger) in state.token_names
            and owners[trigger] is not before.get(trigger)
            and not (
                state.token_names[key, trigger] == names and has_rows(dictionary, names, whole)
            )
        ):
            remove_tokens(dictionary, state.token_names.pop((key, trigger)))
        if (key, trigger) not in state.token_names:
            add_tokens(dictionary, names, whole)
            state.token_names[key, trigger] = names
    # Last, because what is removed and added again would have other ids than before. With a library
    # they stay, as removing them takes a second of a large vocabulary.
    gone = [
        place for place in state.token_names if place not in owned and state.library_cache is None
    ]
    for key in {key for key, _ in gone}:
        entries_of = [state.token_names.pop(place) for place in gone if place[0] == key]
        remove_tokens(dictionaries[key], [name for names in entries_of for name in names])
    subjects = [subject for each in attached.values() for subject in each.concept.subjects]
    triggers = {
        each.trigger: vocabulary_entries(each.trigger, each.num_tokens) for each in subjects
    }
    layered = [each.trigger for each in subjects if each.token_layers]
    layers = max((each.token_layers for each in subjects), default=0)
    for tokenizer in get_tokenizers(family).values():
        expand_triggers(tokenizer, triggers, layered, layers)
    while state.layerwise_hooks:
        state.layerwise_hooks.pop().remove()
    if layers:
        state.layerwise_hooks = [*hook_cross_attention(family), *hook_text_encoder(family)]


def _updates(
    family: Family,
    state: AttachedState,
    attached: Mapping[str, AttachedConcept],
    merging: MergePlan,
    dtypes: Mapping[str, torch.dtype],
) -> tuple[AdapterUpdates, FusedUpdates]:
    """The merges of what is to be beside the weights, and what is to be merged into them.

    Args:
        dtypes: component -> the type of its adapter.

    Raises:
        ConfigError: the first do not fit into the adapters' types.
    """

    def make() -> AdapterUpdates:
        layers = _layers_of(family, attached, merging, fused=False)
        beside = {c: {m: layer.truncate() for m, layer in own.items()} for c, own in layers.items()}
        for component, own in beside.items():
            check_range(component, own, dtypes[component], layers[component])
        return beside

    def make_ready() -> AdapterUpdates:
        return {
            component: {module: _ready(u, dtypes[component], on_cuda) for module, u in own.items()}
            for component, own in make().items()
        }

    into = _layers_of(family, attached, merging, fused=True)
    if state.library_cache is None:
        return make(), into
    # Not its .device, for which diffusers walks over all modules.
    on_cuda = next(family.denoiser.parameters()).is_cuda
    said = tuple((name, each.weight, each.fused) for name, each in attached.items())
    inputs = merging.input_statistics if MERGES[merging.method].needs_inputs else {}
    of = [*(each.concept for each in attached.values()), *inputs.values()]
    how = (
        merging.method,
        *sorted(merging.method_settings.items()),
        said,
        *dtypes.values(),
        on_cuda,
    )
    return state.library_cache.get_merged_updates(how, of, make_ready), into


def _ready(update: LowRank, dtype: torch.dtype, pinned: bool) -> LowRank:
    """An update in the adapter's type; pinned, a GPU copies it while the CPU goes on."""
    up, down = update.up.to(dtype), update.down.to(dtype)
    if pinned:
        up, down = up.pin_memory(), down.pin_memory()
    return LowRank(up, down, update.scale)


def _layers_of(
    family: Family, attached: Mapping[str, AttachedConcept], merging: MergePlan, fused: bool
) -> FusedUpdates:
    """What is to be merged of those concepts that are fused, or of those that are not."""
    chosen = [each for each in attached.values() if each.fused == fused]
    rest = [each for each in attached.values() if each.fused != fused]
    if not chosen:
        return {}
    inputs = merging.input_statistics if MERGES[merging.method].needs_inputs else {}
    layers = plan_merge(
        [each.concept for each in chosen],
        [each.weight for each in chosen],
        merging.method,
        inputs=[inputs[each.name] for each in chosen] if inputs else (),
        preserved=[inputs[each.name] for each in rest] if inputs else (),
        **(merging.method_settings if merging.method == merging.requested_method else {}),
    )
    return match_to_model(layers, family)


@dataclass(frozen=True)
class _Use:
    """What others may have set in a layer that carries our adapter."""

    active: list[str]
    scale: float
    flags: dict[str, bool]

    @classmethod
    def of(cls, layer: Any) -> _Use:
        flags = {name: p.requires_grad for name, p in layer.named_parameters()}
        return cls(list(layer.active_adapters), layer.scaling[ADAPTER_NAME], flags)

    def restore(self, layer: Any) -> None:
        layer.scaling[ADAPTER_NAME] = self.scale
        layer.set_adapter(self.active)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(self.flags.get(name, False))


def _layers(state: AttachedState) -> dict[tuple[str, str], Any]:
    """(component, module) -> every layer that carries our adapter still."""
    return {
        (component, module): layer
        for adapter in state.adapters
        if adapter.is_attached()
        for component, layers in adapter.layers.items()
        for module, layer in layers.items()
    }


def _factors(state: AttachedState, updates: AdapterUpdates) -> dict[tuple[str, str], float]:
    """What others have multiplied our adapter with, by diffusers' ``set_adapters``."""
    return {
        (component, module): layer.scaling[ADAPTER_NAME] / updates[component][module].scale
        for (component, module), layer in _layers(state).items()
        if module in updates.get(component, {})  # where it is active
    }


def _adapter_dtypes(
    models: Mapping[str, nn.Module], state: AttachedState
) -> dict[str, torch.dtype]:
    """Component -> the type of our adapter there: as it is, or where there is none, as it will be.

    Whoever casts the model casts what is there as well.
    """
    there = {
        component: next(iter(layers.values())).lora_B[ADAPTER_NAME].weight.dtype
        for adapter in state.adapters
        if adapter.is_attached()
        for component, layers in adapter.layers.items()
    }
    return {key: there.get(key) or _adapter_dtype(model) for key, model in models.items()}


def _adapter_dtype(model: Any) -> torch.dtype:
    # The model's own; but quantized and 8-bit storage types are none to compute in.
    usable = (torch.float32, torch.float16, torch.bfloat16)
    return model.dtype if model.dtype in usable else torch.float32
