"""Attaching concepts to a pipeline: what is wanted, whether it fits, then the change itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from customize.attention import placing as kernels
from customize.attention.choice import choose
from customize.concepts.concept import Concept
from customize.concepts.formats.lora import Adaptation, Lora, LoraFile
from customize.concepts.formats.lora import Weights as LayerWeights
from customize.concepts.formats.names import Names
from customize.concepts.formats.opening import opened
from customize.concepts.inputs import LayerInputs
from customize.concepts.slices import collisions
from customize.errors import ConfigError, PipelineError
from customize.families import Family, family_of
from customize.hosts.change import change
from customize.hosts.checks import check_base, check_vocabulary
from customize.hosts.classes import adjust_pipelines
from customize.hosts.decor import Decor, keep_settings, settings_of
from customize.hosts.fusing import base_weight
from customize.hosts.guards import ADAPTER
from customize.hosts.offload import settled
from customize.hosts.placing import computing_device, fitted, planned, planned_before
from customize.hosts.plan import Weights, renamed, wanted
from customize.hosts.recording import check_method, merging_of, merging_without, recorded
from customize.hosts.state import Attached, Customization, Holder, Row, check_sharing, find


def load(
    pipe: Any,
    sources: Sequence[str | Path | Adaptation | LoraFile | Decor],
    *,
    weights: Weights,
    names: Sequence[str | None] | None,
    fuse: bool,
    merge: str | None,
    attention: str | None,
    memory: str | None,
) -> None:
    """What :func:`customize.load_custom` does."""
    family = _family(pipe)
    settings = [each for each in sources if isinstance(each, Decor)]
    learned = [each for each in sources if not isinstance(each, Decor)]
    if len(settings) > 1:
        raise ConfigError("two Decor are given", fix="give one, which names all that is to avoid")
    concerned = bool(learned or weights or merge is not None)
    if not concerned and not settings and attention is None and memory is None:
        if find(family).attached or settings_of(family):
            _adjust(pipe, find(family))  # another pipeline of the same models
            return
        raise ConfigError(
            "there is nothing to load",
            fix="give concepts, a dict of weights, a merge, a Decor, an attention backend or an "
            "amount of memory",
        )
    check_method(merge)
    plan = None if memory is None else planned(pipe, family, memory)
    changes = _loading(family, learned, weights, names, fuse) if concerned else None
    device = computing_device(pipe, family, anywhere=plan is not None)
    choices = {} if attention is None else choose(family, attention, device)
    # Concepts come last, so that adapters are left alone by whatever is done to the weights.
    with ExitStack() as undoing:
        undoing.enter_context(kernels.applied(family, choices))
        if plan is not None:
            undoing.enter_context(fitted(pipe, family, plan, device))
        if changes is not None:
            _change(pipe, changes, merge)
        if settings:
            keep_settings(family, settings[0])
            _adjust(pipe, find(family))


def set_to(
    pipe: Any, sources: Sequence[str | Path | Adaptation | LoraFile], *, weights: Weights = None
) -> None:
    """Attach these concepts and no others; those that are attached already keep their mode.

    Nothing is done where it is so already, so that a step of a pipeline can ask at each call.

    Args:
        weights: as in :func:`customize.load_custom`, but 1.0 for each concept where left out.
    """
    family = _family(pipe)
    new = _read(family, sources)
    holder = find(family)
    check_sharing(family, holder)
    before = holder.attached
    names = [concept.info.name for concept in new]
    kept = {name: replace(before[name], weight=1.0) for name in names if name in before}
    found = wanted(kept, new, weights, fuse=False)
    after = {
        name: replace(found[name], fused=name in before and before[name].fused) for name in names
    }
    now, then = ([(e.name, e.weight) for e in each.values()] for each in (before, after))
    if now != then or not all(adapter.is_there() for adapter in holder.adapters):
        _change(pipe, _checked(family, holder, after, new))


@dataclass(frozen=True, eq=False)
class _Changes:
    """What :func:`change` is to be given."""

    family: Family
    holder: Holder
    after: dict[str, Attached]


def _change(pipe: Any, changes: _Changes, merge: str | None = None) -> None:
    family, holder, after = changes.family, changes.holder, changes.after
    merging = merging_of(family, holder, after, merge)
    change(family, holder, after, merging)
    _adjust(pipe, holder)


def _loading(
    family: Family,
    sources: Sequence[str | Path | Adaptation | LoraFile],
    weights: Weights,
    names: Sequence[str | None] | None,
    fuse: bool,
) -> _Changes:
    """Read and check the concepts of a call; nothing changes."""
    new = _read(family, sources)
    if names is not None:
        if not isinstance(names, Sequence) or isinstance(names, str) or len(names) != len(new):
            raise ConfigError(
                f"{names!r} does not name {len(new)} concepts",
                where="names",
                fix="give a list with a name for each, or None where it keeps its own",
            )
        new = [renamed(c, name) if name else c for c, name in zip(new, names, strict=True)]
    holder = find(family)
    check_sharing(family, holder)
    return _checked(family, holder, wanted(holder.attached, new, weights, fuse), new)


def _checked(
    family: Family,
    holder: Holder,
    after: dict[str, Attached],
    new: Sequence[Adaptation],
) -> _Changes:
    """Check what is wanted against the pipeline."""
    before = holder.attached
    family = _with_all_parts(family, holder)
    check_base(family, new)
    for concept in new:
        if concept.info.name not in before:
            check_vocabulary(family, concept)
    for collision in collisions([each.concept.info for each in after.values()]):
        if not {collision.first, collision.second} <= set(before):
            # Before the change, since a warning may be turned into an error.
            warnings.warn(str(collision), stacklevel=5)
    return _Changes(family, holder, after)


def record(
    pipe: Any,
    source: str | Path | Adaptation | LoraFile,
    prompts: Sequence[str] | None,
    words: str | None,
) -> LayerInputs:
    """What :func:`customize.record_inputs` does."""
    family = _family(pipe)
    (concept,) = _read(family, [source])
    holder = find(family)
    check_sharing(family, holder)
    check_base(family, [concept])
    family = _with_all_parts(family, holder)
    return recorded(family, holder, [concept], prompts, words)[concept.info.name]


def unload(pipe: Any, names: Sequence[str]) -> None:
    """What :func:`customize.unload_custom` does."""
    family = _family(pipe)
    holder = find(family)
    if not holder.attached:
        check_sharing(family, holder)
    before = holder.attached
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(
                f"{name!r} is not the name of a concept",
                fix='give each name by itself: unload_custom("rex", "tom")',
            )
        if name not in before:
            raise ConfigError(
                f"no concept {name} is attached",
                fix=f"choose from {', '.join(before)}" if before else "load it first",
            )
    after = {name: kept for name, kept in before.items() if names and name not in names}
    if before:
        change(_with_all_parts(family, holder), holder, after, merging_without(holder, after))
    if not names:
        keep_settings(family, None)
    _adjust(pipe, holder)
    if not names:
        for part in family.components.values():
            if isinstance(part, nn.Module):
                kernels.restore(part)


def summary(pipe: Any) -> Customization:
    """What ``pipe.custom`` shows; never an error, as debuggers and ``hasattr`` read properties."""
    try:
        family = _family(pipe)
    except PipelineError:
        return Customization((), "no known model family")
    holder = find(family)
    colliding: dict[str, list[str]] = {}
    for collision in collisions([each.concept.info for each in holder.attached.values()]):
        colliding.setdefault(collision.first, []).append(collision.second)
        colliding.setdefault(collision.second, []).append(collision.first)
    rows = []
    for name, attached in holder.attached.items():
        info = attached.concept.info
        slices = "none" if info.basis is None else "disjoint"
        if name in colliding:
            slices = "shared with " + ", ".join(colliding[name])
        mode = "fused" if attached.fused else _adapter_mode(holder)
        if info.num_tokens and _lacks_tokens(family, holder, info.trigger):
            mode += " (tokens removed by someone else)"
        said, thing = info.words or "-", info.class_word or "-"
        rows.append(Row(name, said, thing, attached.weight, info.rank, slices, mode))
    denoiser = family.denoiser
    place = f"{family.name} ({denoiser.device}, {str(denoiser.dtype).removeprefix('torch.')})"
    plan = planned_before(family)
    decor = settings_of(family)
    return Customization(
        tuple(rows),
        place,
        merge=holder.merging.method,
        attention=tuple(kernels.report(family.components)),
        memory="" if plan is None else str(plan),
        avoid="" if decor is None else str(decor),
    )


def _adapter_mode(holder: Holder) -> str:
    if not all(each.is_there() for each in holder.adapters):
        return "adapter (removed by someone else)"
    layers = [each for a in holder.adapters for own in a.layers.values() for each in own.values()]
    if any(ADAPTER not in layer.active_adapters or layer.disable_adapters for layer in layers):
        return "adapter (not active)"
    return "adapter"


def _family(pipe: Any) -> Family:
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise PipelineError(
            f"a {type(pipe).__name__} is not a diffusers pipeline",
            fix="give a DiffusionPipeline or ModularPipeline",
        )
    # Below torch.compile's wrapper, where modules have the names that files give them.
    inner = {key: getattr(part, "_orig_mod", part) for key, part in components.items()}
    return family_of(inner, getattr(pipe, "config", None) or {})


def _lacks_tokens(family: Family, holder: Holder, trigger: str) -> bool:
    # Someone may have taken them away, with unload_textual_inversion.
    keys = [family.clip_encoders[key] for key, ours in holder.tokens if ours == trigger]
    return any(trigger not in holder.parts[key].get_added_vocab() for key in keys)


def _adjust(pipe: Any, holder: Holder) -> None:
    from customize.hosts.stages import STAGES  # stages may attach concepts themselves

    layered = any(each.concept.info.token_layers for each in holder.attached.values())
    family = _family(pipe)
    on = bool(holder.attached) or settings_of(family) is not None
    adjust_pipelines(pipe, family.denoiser, on=on, layered=layered, stages=STAGES)


def _with_all_parts(family: Family, holder: Holder) -> Family:
    """The family of what was changed, also where the pipeline has freed or replaced some of it."""
    return type(family)(family.components | holder.parts, family.pipeline_config)


def _read(family: Family, sources: Sequence[object]) -> list[Adaptation]:
    found = [_opened(source) for source in sources]
    # Once for all files, as it takes a walk over the model.
    names = Names(family) if any(isinstance(each, LoraFile) for each in found) else None

    def placed(each: Adaptation | LoraFile, weights: LayerWeights | None = None) -> Adaptation:
        return each.lora(family, weights, names) if isinstance(each, LoraFile) else each

    if not any(isinstance(each, LoraFile) and each.needs_weights for each in found):
        return [placed(each) for each in found]
    originals = find(family).originals
    models = family.adaptable

    def weight(component: str, module: str) -> Tensor:
        place = (component, module)
        return originals[place] if place in originals else base_weight(models, place)

    with settled(models):
        return [placed(each, weight) for each in found]


def _opened(source: object) -> Adaptation | LoraFile:
    if isinstance(source, Concept | Lora | LoraFile):
        return source
    if isinstance(source, str | Path):
        return opened(source)
    raise ConfigError(
        f"a {type(source).__name__} is not a concept",
        fix="give a folder, a .safetensors file, a hub id or a Concept",
    )
