"""Reading a concept from a folder or a single file: every file is validated before it returns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customize.concepts.concept_info import ConceptInfo, parse_info
from customize.concepts.io.data_files import (
    parse_json,
    read_file_bytes,
    read_safetensors_file,
    read_tensors,
)
from customize.concepts.io.file_layout import (
    COMMUNITY_KEYS,
    DIGEST_KEY,
    EMBEDS_FILE,
    EMBEDS_PREFIX,
    INFO_FILE,
    INFO_HEADER,
    LAYERWISE_EMBEDS_FILE,
    LORA_FILE,
    MERGED_FILE,
    PEFT_HEADER,
    SECOND_DENOISERS,
    SECOND_LORA_FILE,
    digest_concept,
)
from customize.concepts.io.find_files import locate, refuse_pickles
from customize.concepts.tokens.layerwise_embeddings import mean_rows
from customize.concepts.types import Concept
from customize.core.lowrank import LowRank
from customize.errors import ConceptError
from customize.safe_read import path_exists

_FACTOR = re.compile(r"([A-Za-z0-9_]+)\.(.+)\.lora_([AB])\.weight")
_FIX = "get an unchanged copy of the concept"


def load_concept(source: str | Path) -> Concept:
    """Read a concept from a folder, a ``.safetensors`` file or a hub id (``user/name``).

    Raises:
        ConceptError: If the source does not exist or is a pickle; a file is missing, truncated or
            changed; a tensor has a wrong shape or a value that is not finite; a key is missing or
            unknown; or the schema version is unknown.
        ConfigError: If the source is no path.
    """
    path = locate(source)
    return _read_folder(path) if path.is_dir() else _read_single_file(path)


def read_info(folder: Path) -> ConceptInfo:
    """The facts about the concept in a folder, without its tensors.

    Raises:
        ConceptError: If ``concept.json`` is missing or invalid.
    """
    path = folder / INFO_FILE
    return _parse_info_and_digest(read_file_bytes(path), path)[0]


def parse_header_info(metadata: Mapping[str, str], where: Path) -> ConceptInfo:
    """The facts about the concept in a single file whose header has :data:`INFO_HEADER`.

    Raises:
        ConceptError: If the facts are invalid.
    """
    return _parse_info_and_digest(metadata[INFO_HEADER].encode(), where)[0]


def parse_single_file(
    tensors: dict[str, Tensor], metadata: Mapping[str, str], path: Path
) -> Concept:
    """The concept in a single file whose header has :data:`INFO_HEADER`.

    Args:
        tensors: The file's tensors; embeddings are removed from it.
        metadata: Metadata of the file's header.
        path: The file.

    Raises:
        ConceptError: See :func:`load_concept`.
    """
    info, digest = _parse_info_and_digest(metadata[INFO_HEADER].encode(), path)
    embeddings = {
        key.removeprefix(EMBEDS_PREFIX): tensors.pop(key)
        for key in list(tensors)
        if key.startswith(EMBEDS_PREFIX)
    }
    updates = _parse_updates(tensors, info, metadata, path)
    return _build_concept(info, updates, embeddings, digest, path)


def _read_folder(folder: Path) -> Concept:
    path = folder / INFO_FILE
    if not path_exists(path):
        refuse_pickles(folder)
        if path_exists(folder / MERGED_FILE):
            raise ConceptError(
                "the folder is a merge of concepts, not a concept",
                where=folder,
                fix="load it with load_custom, or merge and inspect it like a concept",
            )
        raise ConceptError(
            f"the folder has no {INFO_FILE}",
            where=folder,
            fix="name a concept's folder, or its single .safetensors file",
        )
    info, digest = _parse_info_and_digest(read_file_bytes(path), path)
    tensors, metadata = read_tensors(folder / LORA_FILE)
    updates = _parse_updates(tensors, info, metadata, folder / LORA_FILE)
    if path_exists(folder / SECOND_LORA_FILE):
        updates |= _read_second_denoiser(folder / SECOND_LORA_FILE, info)
    embeddings = _read_embeddings(folder / EMBEDS_FILE, info) if info.num_tokens else {}
    if info.token_layers:
        embeddings = _read_layerwise_embeddings(folder / LAYERWISE_EMBEDS_FILE, embeddings)
    return _build_concept(info, updates, embeddings, digest, folder)


def _read_single_file(path: Path) -> Concept:
    tensors, metadata = read_safetensors_file(path)
    if INFO_HEADER not in metadata:
        raise ConceptError(
            "the file's header has no facts about a concept",
            where=path,
            fix="name the folder if it is from a concept's; load an ordinary LoRA into a pipeline "
            "with load_custom",
        )
    return parse_single_file(tensors, metadata, path)


def _read_second_denoiser(path: Path, info: ConceptInfo) -> dict[str, dict[str, LowRank]]:
    """The updates of a second denoiser; the file has them under the first denoiser's name."""
    names = {first: second for second, first in SECOND_DENOISERS.items()}
    tensors, metadata = read_tensors(path)
    updates = _parse_updates(tensors, info, metadata, path)
    others = sorted(updates.keys() - names.keys())
    if others:
        raise ConceptError(
            f"the file of a second denoiser has updates of {', '.join(others)}",
            where=path,
            fix=_FIX,
        )
    return {names[component]: layers for component, layers in updates.items()}


def _read_embeddings(path: Path, info: ConceptInfo) -> dict[str, Tensor]:
    tensors, _ = read_tensors(path)
    if set(tensors) == {info.trigger}:
        return {"text_encoder": tensors[info.trigger]}
    if info.trigger in tensors:
        extra = next(key for key in tensors if key != info.trigger)
        raise ConceptError(f"the key {extra} is unknown", where=path, fix=_FIX)
    components = {key: component for component, key in COMMUNITY_KEYS.items()}
    if set(tensors) != set(components):
        raise ConceptError(
            f"expected the key {info.trigger} or the keys {', '.join(components)}, "
            f"found {', '.join(tensors) or 'none'}",
            where=path,
            fix=_FIX,
        )
    return {components[key]: rows for key, rows in tensors.items()}


def _read_layerwise_embeddings(path: Path, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The embeddings of every cross-attention layer: (tokens, layers, width) each.

    Args:
        path: The file.
        means: Component -> (tokens, width), the mean over the layers, from the file that other
            programs read.
    """
    tensors, _ = read_tensors(path)
    if set(tensors) != set(means):
        raise ConceptError(
            f"expected the keys {', '.join(means)}, found {', '.join(tensors) or 'none'}",
            where=path,
            fix=_FIX,
        )
    for key, rows in tensors.items():
        if rows.ndim != 3 or not _equal_up_to_rounding(mean_rows(rows), means[key]):
            raise ConceptError(
                f"the mean of the layers' embeddings differs from {EMBEDS_FILE}",
                where=path,
                fix=_FIX,
            )
    return tensors


def _equal_up_to_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding, which may differ between machines."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-5, equal_nan=True)


def _build_concept(
    info: ConceptInfo,
    updates: dict[str, dict[str, LowRank]],
    embeddings: dict[str, Tensor],
    digest: str,
    path: Path,
) -> Concept:
    try:
        concept = Concept(info, updates, embeddings, path)
    except ConceptError as error:
        where = f"{path}: {error.where}" if error.where else path
        raise ConceptError(error.problem, where=where, fix=error.fix) from error
    if digest_concept(concept) != digest:
        raise ConceptError(
            "the digest in the facts is not that of the facts and tensors",
            where=path,
            fix="get an unchanged copy of the concept, or save it again where it was learned",
        )
    return concept


def _parse_updates(
    tensors: Mapping[str, Tensor], info: ConceptInfo, metadata: Mapping[str, str], where: Path
) -> dict[str, dict[str, LowRank]]:
    factors: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise ConceptError(f"the key {key} is unknown", where=where, fix=_FIX)
        component, module, factor = match.groups()
        factors.setdefault((component, module), {})[factor] = tensor
    updates: dict[str, dict[str, LowRank]] = {}
    for (component, module), pair in factors.items():
        if len(pair) != 2:
            missing = f"{component}.{module}.lora_{'B' if 'A' in pair else 'A'}.weight"
            raise ConceptError(f"the key {missing} is missing", where=where, fix=_FIX)
        try:
            update = LowRank(pair["B"], pair["A"], info.scale)
        except ConceptError as error:
            layer = f"{where}: {component}.{module}"
            raise ConceptError(error.problem, where=layer, fix=_FIX) from error
        updates.setdefault(component, {})[module] = update
    _check_peft_header(metadata, info, updates, where)
    return updates


def _check_peft_header(
    metadata: Mapping[str, str], info: ConceptInfo, components: Mapping[str, Any], where: Path
) -> None:
    """Refuse a header whose rank or alpha differs from the facts: other programs scale by it."""
    try:
        header = parse_json(metadata[PEFT_HEADER]) if PEFT_HEADER in metadata else {}
        wrong = [
            f"{component}.{key}"
            for component in components
            for key, value in (("r", info.rank), ("lora_alpha", info.alpha))
            if header.get(f"{component}.{key}") != value
        ]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConceptError(
            "the adapter's header cannot be parsed", where=where, fix=_FIX
        ) from error
    if wrong:
        raise ConceptError(
            f"the adapter's header and the concept's facts disagree on {wrong[0]}",
            where=where,
            fix=_FIX,
        )


def _parse_info_and_digest(data: bytes, where: Path) -> tuple[ConceptInfo, str]:
    try:
        values = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise ConceptError(
            f"the concept's facts are not valid JSON: {error}",
            where=where,
            fix="get an unchanged copy",
        ) from error
    digest = values.pop(DIGEST_KEY, None) if isinstance(values, dict) else None
    info = parse_info(values, where)
    if not isinstance(digest, str):
        raise ConceptError("the digest is missing", where=where, fix=_FIX)
    return info, digest
