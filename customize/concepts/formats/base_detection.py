"""For which base a file of a LoRA was made, by the names and shapes of its layers."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence

from customize.concepts.formats.bias_and_norm_updates import has_only_vectors, remove_vectors
from customize.concepts.formats.layer_names import LayerNameMap, LayerTarget, match_text_encoder
from customize.concepts.formats.layer_updates import visible_shape
from customize.concepts.formats.tensor_group import TensorGroup, join_names
from customize.errors import ConceptError, CustomizeError, PipelineError
from customize.families import Family, published_families


def detect_base(
    groups: Sequence[TensorGroup],
    where: object,
    family: str | None = None,
    *,
    several: bool = False,
) -> Family:
    """The published model that a file was made for, without weights.

    Args:
        groups: the layers of the file.
        family: the name of the model's family, where layers of several families are called alike.
        several: whether the model must have more than one denoiser, if any of these has.

    Raises:
        ConceptError: none has all its layers, or several families do.
    """
    found = [each for each in _matching_bases(groups) if family in (None, each.name)]
    names = {each.name for each in found}
    if len(names) == 1:
        more = [each for each in found if len(each.denoisers) > 1]
        return more[0] if several and more else found[0]
    if names:
        raise ConceptError(
            f"the file may be one of {join_alternatives(names)}: they all have these layers",
            where=where,
            fix=f"name the family: --family {min(names)}, or family={min(names)!r} in Python; or "
            "load the file into a pipeline with load_custom",
        )
    lost: Sequence[TensorGroup] = groups
    for base, known in _published_name_maps():
        if family in (None, base.name):
            here = [group for group in groups if known.resolve_group(group) is None]
            lost = min(lost, here, key=len)
    asked = f"family {family}" if family else "the families here"
    which = f", such as {join_names(group.path for group in lost)}" if lost else " in their sizes"
    raise ConceptError(
        f"no published model of {asked} has all the layers that the file changes{which}",
        where=where,
        fix="load it into a pipeline of its base with load_custom",
    )


def detect_families(groups: Sequence[TensorGroup]) -> set[str]:
    """The names of the families with a published model that has these layers."""
    return {family.name for family in _matching_bases(groups)}


def missing_layers_error(
    groups: Sequence[TensorGroup], lost: Sequence[TensorGroup], family: Family, where: object
) -> CustomizeError:
    """Why a file whose layers are not all of this model is refused.

    Args:
        groups: the layers of the file.
        lost: those that the model lacks.
    """
    keys = join_names(key for group in lost for key in group.keys.values())
    kin = detect_families(groups) - {family.name}
    if kin:
        return ConceptError(
            f"the file looks like a LoRA of {join_alternatives(kin)}, and this model is one of "
            f"{family.name}, which has no layer for {keys}",
            where=where,
            fix="load it into a pipeline of the base that it was made for",
        )
    encoders = {match_text_encoder(group.path) for group in lost}
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
            fix="leave out what is for it by your own word: "
            f"ignore={_ignore_argument(encoders, family)}",
        )
    others = set()
    for other, known in _published_name_maps():
        if other.name != family.name and any(known.resolve_group(group) for group in lost):
            others.add(other.name)
    mixed = len(lost) < len(groups) and others
    also = f": it has keys of {family.name} and of {join_alternatives(others)}" if mixed else ""
    return ConceptError(
        f"{len(lost)} of the file's {len(groups)} layers are not in this {family.name} "
        f"model, and nothing is loaded by half{also}: {keys}",
        where=where,
        fix="load it into a pipeline of the base that it was made for",
    )


def _ignore_argument(encoders: set[str | None], family: Family) -> str:
    """The words that leave out what is for these encoders; a T5 comes after the CLIP encoders."""
    words = {
        "text encoder": "text_encoder",
        "second text encoder": "text_encoder_2",
        "T5": "text_encoder_3" if len(family.clip_encoders) > 1 else "text_encoder_2",
    }
    return json.dumps(sorted({words[each] for each in encoders if each}))


def update_shape(place: LayerTarget, names: LayerNameMap) -> tuple[int, int]:
    """(out, in) of an update that goes there."""
    _, width = names.layers[place.component][place.rows[0].module]
    return sum(each.stop - each.start for each in place.rows), width


def join_alternatives(names: Iterable[str]) -> str:
    """Names for a message: "a or b"."""
    return " or ".join(sorted(names))


@functools.cache
def _published_name_maps() -> list[tuple[Family, LayerNameMap]]:
    return [(family, LayerNameMap(family)) for family in published_families()]


def _matching_bases(groups: Sequence[TensorGroup]) -> list[Family]:
    """The published models that have all these layers; those of their shapes, if any is."""
    named, shaped = [], []
    for family, known in _published_name_maps():
        places = [(group, known.resolve_group(group)) for group in groups]
        if all(place is not None for _, place in places):
            named.append(family)
            if all(
                _has_matching_shapes(known, group, place)
                for group, place in places
                if place is not None
            ):
                shaped.append(family)
    return shaped or named


def _has_matching_shapes(names: LayerNameMap, group: TensorGroup, place: LayerTarget) -> bool:
    if has_only_vectors(group):
        widths = {sum(each.stop - each.start for each in place.rows)}
        return all(part.numel() in widths | {1} for part in group.parts.values())
    group = remove_vectors(group)
    shape = update_shape(place, names)
    return all(seen in (None, side) for seen, side in zip(visible_shape(group), shape, strict=True))
