"""Recording what a concept's layers read on a pipeline, which is afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from customize.concepts.formats.lora import Adaptation
from customize.concepts.inputs import (
    PROMPTS,
    LayerInputs,
    class_words,
    place_beside,
    record,
    texts,
    updates_digest,
)
from customize.concepts.merge import FUSION
from customize.errors import ConceptError, ConfigError
from customize.families import Family
from customize.hosts.change import change
from customize.hosts.state import Attached, Holder, Merging

SUM = "sum"


def check_method(method: str | None) -> None:
    """Refuse what no pipeline's concepts can be merged by.

    Raises:
        ConfigError: no such method.
    """
    if method not in (None, SUM, FUSION):
        raise ConfigError(
            f"a pipeline's concepts cannot be merged by {method!r}",
            where="merge",
            fix=f"choose {SUM} or {FUSION}; customize merge has others",
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

    Records that lie beside the concepts are read, and those that lack are made, for which the
    pipeline draws.

    Raises:
        ConfigError: a concept that has no record has no words to draw it with.
        ConceptError: a record cannot be read, or is not of this concept.
    """
    method = method or holder.merging.method
    if method == SUM or len(after) < 2:
        return Merging(method)
    known: dict[str, LayerInputs] = {}
    for name, each in after.items():
        path = None if each.source is None else place_beside(each.source)
        if name in holder.merging.inputs:
            known[name] = holder.merging.inputs[name]
        elif path is not None and path.is_file():
            known[name] = LayerInputs.load(path)
            if known[name].of != updates_digest(each.concept.products):
                raise ConceptError(
                    f"the record of layer inputs is not of {name} as it is now",
                    where=path,
                    fix="delete it, or record it again: customize record",
                )
    lacking = [each.concept for name, each in after.items() if name not in known]
    return Merging(method, known | recorded(family, holder, lacking))


def recorded(
    family: Family,
    holder: Holder,
    concepts: Sequence[Adaptation],
    prompts: Sequence[str] | None = None,
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
        if not concept.info.words:
            raise ConfigError(
                f"{concept.info.name} says no words that call it, so nobody knows what to draw",
                where=concept.info.name,
                fix="record it with prompts of your own, which need no {} then",
            )
    if not concepts:
        return {}
    side = family.default_resolution
    with torch.no_grad():
        shape = family.encode_images(torch.zeros(1, 3, side, side))[0].shape[1:]
    found: dict[str, LayerInputs] = {}
    with _set_aside(family, holder):
        for concept in concepts:
            products, info = concept.products, concept.info
            change(family, holder, {})
            generic = record(family, products, texts(class_words(info.class_word), prompts), shape)
            change(family, holder, {info.name: Attached(concept, 1.0, fused=False)})
            own = record(family, products, texts(info.words, prompts), shape)
            found[info.name] = LayerInputs(updates_digest(products), own, generic)
    return found


@contextmanager
def _set_aside(family: Family, holder: Holder) -> Iterator[None]:
    """Within it anything may be attached; afterwards that is again what was before."""
    before = holder.attached
    try:
        yield
    finally:
        change(family, holder, before)
