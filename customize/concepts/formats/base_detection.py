"""For which base a file of a LoRA was made, by the names and shapes of its layers."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence

from customize.concepts.formats.bias_and_norm_updates import is_vector, matrices_of
from customize.concepts.formats.layer_names import Names, Place, encoder_of
from customize.concepts.formats.layer_updates import shape_of
from customize.concepts.formats.tensor_keys import Group, listed
from customize.errors import ConceptError, CustomizeError, PipelineError
from customize.families import Family, published_families


def published_base(
    groups: Sequence[Group], where: object, family: str | None = None, *, several: bool = False
) -> Family:
    """The published model that a file was made for, without weights.

    Args:
        groups: the layers of the file.
        family: the name of the model's family, where layers of several families are called alike.
        several: whether the model must have more than one denoiser, if any of these has.

    Raises:
        ConceptError: none has all its layers, or several families do.
    """
    found = [each for each in _published_bases(groups) if family in (None, each.name)]
    names = {each.name for each in found}
    if len(names) == 1:
        more = [each for each in found if len(each.denoisers) > 1]
        return more[0] if several and more else found[0]
    if names:
        raise ConceptError(
            f"the file may be one of {either(names)}: they all have these layers",
            where=where,
            fix=f"name the family: --family {min(names)}, or family={min(names)!r} in Python; or "
            "load the file into a pipeline with load_custom",
        )
    lost: Sequence[Group] = groups
    for base, known in _published():
        if family in (None, base.name):
            here = [group for group in groups if known.place_of(group) is None]
            lost = min(lost, here, key=len)
    asked = f"family {family}" if family else "the families here"
    which = f", such as {listed(group.path for group in lost)}" if lost else " in their sizes"
    raise ConceptError(
        f"no published model of {asked} has all the layers that the file changes{which}",
        where=where,
        fix="load it into a pipeline of its base with load_custom",
    )


def families_of(groups: Sequence[Group]) -> set[str]:
    """The names of the families with a published model that has these layers."""
    return {family.name for family in _published_bases(groups)}


def refusal(
    groups: Sequence[Group], lost: Sequence[Group], family: Family, where: object
) -> CustomizeError:
    """Why a file whose layers are not all of this model is refused.

    Args:
        groups: the layers of the file.
        lost: those that the model lacks.
    """
    keys = listed(key for group in lost for key in group.keys.values())
    kin = families_of(groups) - {family.name}
    if kin:
        return ConceptError(
            f"the file looks like a LoRA of {either(kin)}, and this model is one of {family.name}, "
            f"which has no layer for {keys}",
            where=where,
            fix="load it into a pipeline of the base that it was made for",
        )
    encoders = {encoder_of(group.path) for group in lost}
    if None not in encoders:
        what = " and ".join(sorted(f"the {each}" for each in encoders if each))
        takes = [key for key in family.clip_encoders if key not in family.text_encoders]
        if "T5" not in encoders and takes:
            return PipelineError(
                f"the file changes {what}, which this pipeline lacks: {keys}",
                where=where,
                fix=f"load the pipeline with its {' and '.join(takes)}",
            )
        return ConceptError(
            f"the file changes {what}, which takes no adapter in family {family.name}: {keys}",
            where=where,
            fix=f"leave out what is for it by your own word: ignore={_ignored(encoders, family)}",
        )
    others = set()
    for other, known in _published():
        if other.name != family.name and any(known.place_of(group) for group in lost):
            others.add(other.name)
    mixed = len(lost) < len(groups) and others
    also = f": it has keys of {family.name} and of {either(others)}" if mixed else ""
    return ConceptError(
        f"{len(lost)} of the file's {len(groups)} layers are not in this {family.name} "
        f"model, and nothing is loaded by half{also}: {keys}",
        where=where,
        fix="load it into a pipeline of the base that it was made for",
    )


def _ignored(encoders: set[str | None], family: Family) -> str:
    """The words that leave out what is for these encoders; a T5 comes after the CLIP encoders."""
    words = {
        "text encoder": "text_encoder",
        "second text encoder": "text_encoder_2",
        "T5": "text_encoder_3" if len(family.clip_encoders) > 1 else "text_encoder_2",
    }
    return json.dumps(sorted({words[each] for each in encoders if each}))


def update_shape(place: Place, names: Names) -> tuple[int, int]:
    """(out, in) of an update that goes there."""
    _, width = names.layers[place.component][place.rows[0].module]
    return sum(each.stop - each.start for each in place.rows), width


def either(names: Iterable[str]) -> str:
    """Names for a message: "a or b"."""
    return " or ".join(sorted(names))


@functools.cache
def _published() -> list[tuple[Family, Names]]:
    return [(family, Names(family)) for family in published_families()]


def _published_bases(groups: Sequence[Group]) -> list[Family]:
    """The published models that have all these layers; those of their shapes, if any is."""
    named, shaped = [], []
    for family, known in _published():
        places = [(group, known.place_of(group)) for group in groups]
        if all(place is not None for _, place in places):
            named.append(family)
            if all(_fits(known, group, place) for group, place in places if place is not None):
                shaped.append(family)
    return shaped or named


def _fits(names: Names, group: Group, place: Place) -> bool:
    if is_vector(group):
        widths = {sum(each.stop - each.start for each in place.rows)}
        return all(part.numel() in widths | {1} for part in group.parts.values())
    group = matrices_of(group)
    shape = update_shape(place, names)
    return all(seen in (None, side) for seen, side in zip(shape_of(group), shape, strict=True))
