"""Recording what a concept's layers read on a pipeline, which is afterwards as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from customize.concepts.formats.lora import Adaptation
from customize.concepts.inputs import (
    PROMPTS,
    LayerInputs,
    base_prompts,
    layers_of,
    record,
    record_beside,
    texts,
    updates_digest,
)
from customize.concepts.merge import AUTO, FUSION, SUM
from customize.errors import ConfigError
from customize.families import Family
from customize.hosts.change import change
from customize.hosts.offload import check_placed
from customize.hosts.state import Attached, Holder, Merging


def check_method(method: str | None) -> None:
    """Refuse what no pipeline's concepts can be merged by.

    Raises:
        ConfigError: no such method.
    """
    if method not in (None, AUTO, SUM, FUSION):
        raise ConfigError(
            f"a pipeline's concepts cannot be merged by {method!r}",
            where="merge",
            fix=f"choose {AUTO}, {SUM} or {FUSION}; customize merge has others",
        )


def merging_of(
    family: Family,
    holder: Holder,
    after: Mapping[str, Attached],
    method: str | None,
) -> Merging:
    """How the concepts that are to be attached will be merged.

    Args:
        family: of all that the holder knows to be changed.
        method: None: as before.

    Records that lie beside the concepts are read. For "fusion" those that lack are made, for which
    the pipeline draws.

    Raises:
        ConfigError: a concept that has no record has no words to draw it with.
        ConceptError: a record cannot be read, or is not of this concept.
    """
    method = method or holder.merging.chosen
    if method == SUM or len(after) < 2:
        return Merging(method)
    known = {
        name: own
        for name, own in holder.merging.inputs.items()
        if name in after and not after[name].routed
    }
    shelf = holder.shelf
    for name, each in after.items():
        if name not in known:
            found = _record(each.concept) if shelf is None else shelf.record(each.concept, _record)
            known |= {} if found is None else {name: found}
    lacking = [each.concept for name, each in after.items() if name not in known]
    if lacking and method == AUTO:
        if known:
            names = ", ".join(concept.info.name for concept in lacking)
            warnings.warn(
                f"the concepts are summed, not fused, as there is no record of what the layers of "
                f'{names} read; make one here with merge="fusion", or once with customize record',
                stacklevel=5,
            )
        return Merging(method, SUM, known)
    made = recorded(family, holder, lacking)
    if shelf is not None:
        for concept in lacking:
            shelf.keep_record(concept, made[concept.info.name])
    return Merging(method, FUSION, known | made)


def _record(concept: Adaptation) -> LayerInputs | None:
    return record_beside(concept.info.name, concept.products, concept.source)


def merging_without(holder: Holder, after: Mapping[str, Attached]) -> Merging:
    """How what is left will be merged when some concepts are gone; nothing is read or drawn."""
    before = holder.merging
    known = {name: own for name, own in before.inputs.items() if name in after}
    fused = before.chosen != SUM and known.keys() == after.keys() and len(after) > 1
    return Merging(before.chosen, FUSION if fused else SUM, known)


def recorded(
    family: Family,
    holder: Holder,
    concepts: Sequence[Adaptation],
    prompts: Sequence[str] | None = None,
    words: str | None = None,
) -> dict[str, LayerInputs]:
    """Concept's name -> its record; see :func:`customize.record_inputs`.

    Args:
        family: of all that the holder knows to be changed.
    """
    prompts = PROMPTS if prompts is None else tuple(prompts)
    if not prompts or any("{}" not in prompt for prompt in prompts):
        raise ConfigError(
            "a prompt to record with has no {} for the concept's words",
            where="prompts",
            fix='write such as "a photo of {} on a beach"; some ten of different places do',
        )
    for concept in concepts:
        if not (words or concept.info.words):
            raise ConfigError(
                f"{concept.info.name} says no words that call it, so nobody knows what to draw",
                where=concept.info.name,
                fix="say them once: customize record --words, or record_inputs(words=)",
            )
    if not concepts:
        return {}
    check_placed(family.adaptable | {"vae": family.vae})
    side = family.default_resolution
    with torch.no_grad():
        shape = family.encode_images(torch.zeros(1, 3, side, side))[0].shape[1:]
    found: dict[str, LayerInputs] = {}
    with _set_aside(family, holder):
        for concept in concepts:
            products, info = concept.products, concept.info
            layers = layers_of(family, products)
            change(family, holder, {}, Merging())
            generic = record(family, layers, base_prompts(info.class_word, prompts), shape)
            change(family, holder, {info.name: Attached(concept, 1.0, fused=False)}, Merging())
            own = record(family, layers, texts(words or info.words, prompts), shape)
            found[info.name] = LayerInputs(updates_digest(products), own, generic)
    return found


@contextmanager
def _set_aside(family: Family, holder: Holder) -> Iterator[None]:
    """Within it anything may be attached; afterwards that is again what was before."""
    before, merging = holder.attached, holder.merging
    try:
        yield
    finally:
        change(family, holder, before, merging)
