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
from customize.pipeline.model_guards import ADAPTER
from customize.pipeline.sources import family_in
from customize.pipeline.state import Customization, Holder, Row, find


def summary(pipe: Any) -> Customization:
    """What ``pipe.custom`` shows; never an error, as debuggers and ``hasattr`` read properties."""
    try:
        family = family_in(pipe)
    except PipelineError:
        return Customization((), "no known model family")
    holder = find(family)
    colliding: dict[str, list[str]] = {}
    for collision in find_overlaps([each.concept for each in holder.attached.values()]):
        colliding.setdefault(collision.first, []).append(collision.second)
        colliding.setdefault(collision.second, []).append(collision.first)
    rows = []
    for name, attached in holder.attached.items():
        info = attached.concept.info
        slices = "none" if info.basis is None else "disjoint"
        if name in colliding:
            slices = "shared with " + ", ".join(colliding[name])
        mode = "fused" if attached.fused else _adapter_mode(holder)
        mode += ", by the prompt" if attached.routed else ""
        if any(_lacks_tokens(family, holder, s.trigger) for s in attached.concept.subjects):
            mode += " (tokens removed by someone else)"
        said, thing = info.words or "-", info.class_word or "-"
        rows.append(Row(name, said, thing, attached.weight, info.rank, slices, mode))
    denoiser = family.denoiser
    place = f"{family.name} ({denoiser.device}, {str(denoiser.dtype).removeprefix('torch.')})"
    plan = get_applied_plan(family)
    return Customization(
        tuple(rows),
        place,
        merge=holder.merging.method,
        attention=tuple(kernels.report_backends(family.components)),
        memory="" if plan is None else str(plan),
        library=_library(holder),
        avoid="; ".join(map(str, holder.settings.values())),
    )


def _library(holder: Holder) -> str:
    shelf = holder.shelf
    if shelf is None:
        return ""
    entries = shelf.library.entries.values()
    fitting = sum(map(shelf.fits, entries))
    active = [name for name, each in holder.attached.items() if each.routed]
    size, limit = (f"{number / GIB:.3g}" for number in (shelf.cache.size, shelf.cache.limit))
    return (
        f"{shelf.library.folder}, {len(entries)} concepts, {fitting} of them for this model; "
        f"the latest prompt named {', '.join(active) or 'none'}; {size} of {limit} GB in memory"
    )


def _adapter_mode(holder: Holder) -> str:
    if not all(each.is_there() for each in holder.adapters):
        return "adapter (removed by someone else)"
    layers = [each for a in holder.adapters for own in a.layers.values() for each in own.values()]
    # With a library there may be some that what is attached does not change.
    layers = [layer for layer in layers if layer.lora_A[ADAPTER].weight.numel()]
    if any(ADAPTER not in layer.active_adapters or layer.disable_adapters for layer in layers):
        return "adapter (not active)"
    return "adapter"


def _lacks_tokens(family: Family, holder: Holder, trigger: str) -> bool:
    # Someone may have taken them away, with unload_textual_inversion.
    keys = [family.clip_encoders[key] for key, ours in holder.tokens if ours == trigger]
    return any(not known_tokens(holder.parts[key], [trigger]) for key in keys)
