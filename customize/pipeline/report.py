"""What ``pipe.custom`` shows."""

from __future__ import annotations

from typing import Any

from customize.base.apply_memory_plan import get_applied_plan
from customize.base.attention import apply_backend as kernels
from customize.base.memory_plan import GIB
from customize.concepts.slices.overlap import find_overlaps
from customize.concepts.tokens.token_rows import known_tokens
from customize.errors import PipelineError
from customize.families import Family
from customize.pipeline.model_guards import ADAPTER_NAME
from customize.pipeline.sources import get_family
from customize.pipeline.state import AttachedState, ConceptRow, Customization, get_state


def summarize(pipe: Any) -> Customization:
    """What ``pipe.custom`` shows; never an error, as debuggers and ``hasattr`` read properties."""
    try:
        family = get_family(pipe)
    except PipelineError:
        return Customization((), "no known model family")
    state = get_state(family)
    colliding: dict[str, list[str]] = {}
    for collision in find_overlaps([each.concept for each in state.attached.values()]):
        colliding.setdefault(collision.first, []).append(collision.second)
        colliding.setdefault(collision.second, []).append(collision.first)
    rows = []
    for name, attached in state.attached.items():
        info = attached.concept.info
        slices = "none" if info.basis is None else "disjoint"
        if name in colliding:
            slices = "shared with " + ", ".join(colliding[name])
        mode = "fused" if attached.fused else _adapter_mode(state)
        mode += ", by the prompt" if attached.routed else ""
        if any(_lacks_tokens(family, state, s.trigger) for s in attached.concept.subjects):
            mode += " (tokens removed by someone else)"
        said, thing = info.trigger_words or "-", info.class_word or "-"
        rows.append(ConceptRow(name, said, thing, attached.weight, info.rank, slices, mode))
    denoiser = family.denoiser
    place = f"{family.name} ({denoiser.device}, {str(denoiser.dtype).removeprefix('torch.')})"
    plan = get_applied_plan(family)
    return Customization(
        tuple(rows),
        place,
        merge=state.merge_plan.method,
        attention=tuple(kernels.report_backends(family.components)),
        memory="" if plan is None else str(plan),
        library=_library(state),
        avoid="; ".join(map(str, state.stage_settings.values())),
    )


def _library(state: AttachedState) -> str:
    cache = state.library_cache
    if cache is None:
        return ""
    entries = cache.library.entries.values()
    fitting = sum(map(cache.is_compatible, entries))
    active = [name for name, each in state.attached.items() if each.routed]
    size, limit = (f"{number / GIB:.3g}" for number in (cache.cache.size, cache.cache.limit))
    return (
        f"{cache.library.folder}, {len(entries)} concepts, {fitting} of them for this model; "
        f"the latest prompt named {', '.join(active) or 'none'}; {size} of {limit} GB in memory"
    )


def _adapter_mode(state: AttachedState) -> str:
    if not all(each.is_attached() for each in state.adapters):
        return "adapter (removed by someone else)"
    layers = [each for a in state.adapters for own in a.layers.values() for each in own.values()]
    # With a library there may be some that what is attached does not change.
    layers = [layer for layer in layers if layer.lora_A[ADAPTER_NAME].weight.numel()]
    if any(ADAPTER_NAME not in layer.active_adapters or layer.disable_adapters for layer in layers):
        return "adapter (not active)"
    return "adapter"


def _lacks_tokens(family: Family, state: AttachedState, trigger: str) -> bool:
    # Someone may have taken them away, with unload_textual_inversion.
    keys = [family.clip_encoders[key] for key, ours in state.token_names if ours == trigger]
    return any(not known_tokens(state.components[key], [trigger]) for key in keys)
