"""Detecting the base model of an adapter file from the names and shapes of its layers."""

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

_FIX_OTHER_BASE = "load it into a pipeline of the base that it was made for"


def detect_base(
    groups: Sequence[TensorGroup],
    where: object,
    family: str | None = None,
    *,
    several: bool = False,
) -> Family:
    """Find the published model that has all layers of a file; it has no weights.

    Args:
        groups: The layers of the file.
        where: Path of the file, for messages.
        family: Name of the model family, for layer names that several families share.
        several: Whether to prefer models with more than one denoiser.

    Raises:
        ConceptError: If no model has all the layers, or models of several families do.
    """
    bases = [base for base in _matching_bases(groups) if family in (None, base.name)]
    names = {base.name for base in bases}
    if len(names) == 1:
        with_two_denoisers = [base for base in bases if len(base.denoisers) > 1]
        return with_two_denoisers[0] if several and with_two_denoisers else bases[0]
    if names:
        raise ConceptError(
            f"the file may belong to {join_alternatives(names)}, which all have these layers",
            where=where,
            fix=f"name the family: --family {min(names)}, or family={min(names)!r} in Python; or "
            "load the file into a pipeline with load_custom",
        )
    missing: Sequence[TensorGroup] = groups
    for base, name_map in _published_name_maps():
        if family in (None, base.name):
            unresolved = [group for group in groups if name_map.resolve_group(group) is None]
            missing = min(missing, unresolved, key=len)
    models = f"model of family {family}" if family else "model of a supported family"
    which = f", such as {join_names(group.path for group in missing)}" if missing else ""
    which = which or ", in these shapes"
    raise ConceptError(
        f"no published {models} has all the layers that the file changes{which}",
        where=where,
        fix="load it into a pipeline of its base with load_custom",
    )


def detect_families(groups: Sequence[TensorGroup]) -> set[str]:
    """Names of the families with a published model that has these layers."""
    return {family.name for family in _matching_bases(groups)}


def missing_layers_error(
    groups: Sequence[TensorGroup], missing: Sequence[TensorGroup], family: Family, where: object
) -> CustomizeError:
    """The error for a file with layers that a model does not have.

    Args:
        groups: The layers of the file.
        missing: Those that the model does not have.
        family: The model.
        where: Path of the file, for messages.
    """
    keys = join_names(key for group in missing for key in group.keys.values())
    families = detect_families(groups) - {family.name}
    if families:
        return ConceptError(
            f"the file looks like a LoRA of {join_alternatives(families)}, and this model is one of"
            f" {family.name}, which has no layer for {keys}",
            where=where,
            fix=_FIX_OTHER_BASE,
        )
    encoders = {match_text_encoder(group.path) for group in missing}
    if None not in encoders:
        changed = " and ".join(sorted(f"the {encoder}" for encoder in encoders if encoder))
        unloaded = [key for key in family.clip_encoders if key not in family.text_encoders]
        if "T5" not in encoders and unloaded:
            return PipelineError(
                f"the file changes {changed}, which this pipeline lacks: {keys}",
                where=where,
                fix=f"load the pipeline with its {' and '.join(unloaded)}",
            )
        return ConceptError(
            f"the file changes {changed}, which takes no adapter in family {family.name}: {keys}",
            where=where,
            fix=f"leave these parts out: ignore={_ignore_argument(encoders, family)}",
        )
    others = {
        other.name
        for other, name_map in _published_name_maps()
        if other.name != family.name and any(name_map.resolve_group(group) for group in missing)
    }
    is_mixed = len(missing) < len(groups) and others
    mixture = f" (it has keys of {family.name} and of {join_alternatives(others)})"
    return ConceptError(
        f"{len(missing)} of the file's {len(groups)} layers are not in this {family.name} "
        f"model, and a file is not loaded in part{mixture if is_mixed else ''}: {keys}",
        where=where,
        fix=_FIX_OTHER_BASE,
    )


def _ignore_argument(encoders: set[str | None], family: Family) -> str:
    """The ``ignore=`` argument that leaves out text encoders; a T5 follows the CLIP encoders."""
    components = {
        "text encoder": "text_encoder",
        "second text encoder": "text_encoder_2",
        "T5": "text_encoder_3" if len(family.clip_encoders) > 1 else "text_encoder_2",
    }
    return json.dumps(sorted({components[encoder] for encoder in encoders if encoder}))


def update_shape(target: LayerTarget, names: LayerNameMap) -> tuple[int, int]:
    """(out, in) of an update with this target."""
    _, width = names.layers[target.component][target.rows[0].module]
    return sum(rows.stop - rows.start for rows in target.rows), width


def join_alternatives(names: Iterable[str]) -> str:
    """Join sorted names for a message: "a or b"."""
    return " or ".join(sorted(names))


@functools.cache
def _published_name_maps() -> list[tuple[Family, LayerNameMap]]:
    return [(family, LayerNameMap(family)) for family in published_families()]


def _matching_bases(groups: Sequence[TensorGroup]) -> list[Family]:
    """Published models with all these layers: those of matching shapes, if there are any."""
    by_name, by_shape = [], []
    for family, name_map in _published_name_maps():
        targets = [(group, name_map.resolve_group(group)) for group in groups]
        if all(target is not None for _, target in targets):
            by_name.append(family)
            if all(
                _has_matching_shape(name_map, group, target)
                for group, target in targets
                if target is not None
            ):
                by_shape.append(family)
    return by_shape or by_name


def _has_matching_shape(names: LayerNameMap, group: TensorGroup, target: LayerTarget) -> bool:
    if has_only_vectors(group):
        width = sum(rows.stop - rows.start for rows in target.rows)
        return all(part.numel() in (width, 1) for part in group.parts.values())
    shapes = zip(visible_shape(remove_vectors(group)), update_shape(target, names), strict=True)
    return all(visible in (None, side) for visible, side in shapes)
