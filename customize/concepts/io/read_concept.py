"""Reading a concept: every file is checked whole before anything is returned."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

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
from customize.concepts.types import MAX_NAME, Concept, ConceptInfo, parse_info
from customize.core.lowrank import LowRank
from customize.errors import ConceptError
from customize.safe_read import path_exists, read_bytes, read_safetensors

_FACTOR = re.compile(r"([A-Za-z0-9_]+)\.(.+)\.lora_([AB])\.weight")
_ANEW = "get an unchanged copy of the concept"
_MAX_JSON = 16 * 2**20


def load_concept(source: str | Path) -> Concept:
    """Read a concept from a folder, a ``.safetensors`` file or a hub id (``user/name``).

    Raises:
        ConceptError: nothing is there, a part is missing, cut short, changed, of wrong shape or
            not finite, a key is missing or too many, the schema is unknown, or it is a pickle.
    """
    path = locate(source)
    return _read_folder(path) if path.is_dir() else _read_single(path)


def read_info(folder: Path) -> ConceptInfo:
    """The facts of a concept folder alone, without its tensors.

    Raises:
        ConceptError: ``concept.json`` is missing or wrong.
    """
    return _parsed_info(_bytes(folder / INFO_FILE, _MAX_JSON), folder / INFO_FILE)[0]


def parse_header_info(metadata: Mapping[str, str], where: Path) -> ConceptInfo:
    """The facts on the concept in a single file, from its header, which has them.

    Raises:
        ConceptError: they are wrong.
    """
    return _parsed_info(metadata[INFO_HEADER].encode(), where)[0]


def _read_folder(folder: Path) -> Concept:
    if not path_exists(folder / INFO_FILE):
        refuse_pickles(folder)
        merged = path_exists(folder / MERGED_FILE)
        raise ConceptError(
            "the folder is a merge of concepts, not a concept"
            if merged
            else f"the folder has no {INFO_FILE}",
            where=folder,
            fix="load it with load_custom, or merge and inspect it like a concept"
            if merged
            else "name a concept's folder, or its single .safetensors file",
        )
    path = folder / INFO_FILE
    info, digest = _parsed_info(_bytes(path, _MAX_JSON), path)
    lora, metadata = _read_tensors(folder / LORA_FILE)
    products = _unpacked(lora, info, metadata, folder / LORA_FILE)
    if path_exists(folder / SECOND_LORA_FILE):
        products |= _read_second(folder / SECOND_LORA_FILE, info)
    embeddings = _read_embeddings(folder / EMBEDS_FILE, info) if info.num_tokens else {}
    if info.token_layers:
        embeddings = _read_layers(folder / LAYERWISE_EMBEDS_FILE, embeddings)
    return _checked(info, products, embeddings, digest, folder)


def _read_second(path: Path, info: ConceptInfo) -> dict[str, dict[str, LowRank]]:
    """The updates of a second denoiser, which are under the first one's name in the file."""
    names = {first: second for second, first in SECOND_DENOISERS.items()}
    tensors, metadata = _read_tensors(path)
    products = _unpacked(tensors, info, metadata, path)
    others = sorted(products.keys() - names.keys())
    if others:
        raise ConceptError(
            f"updates of {', '.join(others)} are in the file of a second denoiser",
            where=path,
            fix=_ANEW,
        )
    return {names[component]: updates for component, updates in products.items()}


def _read_embeddings(path: Path, info: ConceptInfo) -> dict[str, Tensor]:
    embeds, _ = _read_tensors(path)
    if set(embeds) == {info.trigger}:
        return {"text_encoder": embeds[info.trigger]}
    if info.trigger in embeds:
        extra = next(key for key in embeds if key != info.trigger)
        raise ConceptError(f"the key {extra} is too many", where=path, fix=_ANEW)
    names = {community: key for key, community in COMMUNITY_KEYS.items()}
    if set(embeds) != set(names):
        raise ConceptError(
            f"there should be the key {info.trigger} or the keys {', '.join(names)}, "
            f"not {', '.join(embeds) or 'none'}",
            where=path,
            fix=_ANEW,
        )
    return {names[key]: rows for key, rows in embeds.items()}


def _read_layers(path: Path, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The embeddings of all layers, whose means other programs read from a file of their own."""
    layered, _ = _read_tensors(path)
    if set(layered) != set(means):
        raise ConceptError(
            f"there should be the keys {', '.join(means)}, not {', '.join(layered) or 'none'}",
            where=path,
            fix=_ANEW,
        )
    for key, rows in layered.items():
        if rows.ndim != 3 or not _near(mean_rows(rows), means[key]):
            raise ConceptError(
                f"the embeddings of the layers do not have those of {EMBEDS_FILE} as their mean",
                where=path,
                fix=_ANEW,
            )
    return layered


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, which may differ between machines."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-5, equal_nan=True)


def _read_single(path: Path) -> Concept:
    tensors, metadata = read_safetensors_file(path)
    if INFO_HEADER not in metadata:
        raise ConceptError(
            "the file's header says nothing on a concept",
            where=path,
            fix="name the folder if it is from a concept's; load an ordinary LoRA into a pipeline "
            "with load_custom",
        )
    return parse_single_file(tensors, metadata, path)


def read_safetensors_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a ``.safetensors`` file, and its header's metadata.

    Raises:
        ConceptError: it has another ending, is missing, or cannot be parsed.
    """
    if path.suffix.lower() != ".safetensors":
        raise ConceptError(
            "a concept is a folder or a .safetensors file", where=path, fix="name one of these"
        )
    return _read_tensors(path)


def parse_single_file(
    tensors: dict[str, Tensor], metadata: Mapping[str, str], path: Path
) -> Concept:
    """The concept in a single file, whose header has :data:`INFO_HEADER`.

    Raises:
        ConceptError: see :func:`load_concept`.
    """
    info, digest = _parsed_info(metadata[INFO_HEADER].encode(), path)
    embeddings = {
        key.removeprefix(EMBEDS_PREFIX): tensors.pop(key)
        for key in list(tensors)
        if key.startswith(EMBEDS_PREFIX)
    }
    products = _unpacked(tensors, info, metadata, path)
    return _checked(info, products, embeddings, digest, path)


def _checked(
    info: ConceptInfo,
    products: dict[str, dict[str, LowRank]],
    embeddings: dict[str, Tensor],
    digest: str,
    where: Path,
) -> Concept:
    try:
        concept = Concept(info, products, embeddings, where)
    except ConceptError as error:
        place = f"{where}: {error.where}" if error.where else where
        raise ConceptError(error.problem, where=place, fix=error.fix) from error
    if digest_concept(concept) != digest:
        raise ConceptError(
            "the tensors and the facts are not those that were saved together",
            where=where,
            fix="get an unchanged copy of the concept, or save it again where it was learned",
        )
    return concept


def _unpacked(
    tensors: Mapping[str, Tensor], info: ConceptInfo, metadata: Mapping[str, str], where: Path
) -> dict[str, dict[str, LowRank]]:
    factors: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise ConceptError(f"the key {key} is too many", where=where, fix=_ANEW)
        component, module, factor = match.groups()
        factors.setdefault((component, module), {})[factor] = tensor
    products: dict[str, dict[str, LowRank]] = {}
    for (component, module), pair in factors.items():
        if len(pair) != 2:
            missing = f"{component}.{module}.lora_{'B' if 'A' in pair else 'A'}.weight"
            raise ConceptError(f"the key {missing} is missing", where=where, fix=_ANEW)
        try:
            update = LowRank(pair["B"], pair["A"], info.scale)
        except ConceptError as error:
            place = f"{where}: {component}.{module}"
            raise ConceptError(error.problem, where=place, fix=_ANEW) from error
        products.setdefault(component, {})[module] = update
    _check_peft_header(metadata, info, products, where)
    return products


def _check_peft_header(
    metadata: Mapping[str, str], info: ConceptInfo, components: Mapping[str, Any], where: Path
) -> None:
    """Other programs take the scale from here, so it must say what ``concept.json`` says."""
    try:
        stated = _json(metadata[PEFT_HEADER]) if PEFT_HEADER in metadata else {}
        wrong = [
            f"{component}.{key}"
            for component in components
            for key, value in (("r", info.rank), ("lora_alpha", info.alpha))
            if stated.get(f"{component}.{key}") != value
        ]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConceptError(
            "the adapter's header cannot be parsed", where=where, fix=_ANEW
        ) from error
    if wrong:
        raise ConceptError(
            f"the adapter's header and the facts on the concept disagree on {wrong[0]}",
            where=where,
            fix=_ANEW,
        )


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its header's metadata.

    The bytes are read once and parsed from memory: a mapped file that is replaced or cut short
    later would change the tensors or crash the process.
    """
    from safetensors.torch import load

    try:
        data = read_safetensors(path)
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except OSError as error:
        raise _unreadable(error, path) from error
    except Exception as error:  # whatever a parser may raise on bytes of others
        raise ConceptError(
            f"the file is damaged or no safetensors file: {str(error)[:MAX_NAME]}",
            where=path,
            fix="get the file anew",
        ) from error
    longest = max(map(len, tensors), default=0)
    if longest > MAX_NAME:  # names are shown where something is wrong with them
        raise ConceptError(
            f"the file has a tensor with a name of {longest} characters, more than any layer's",
            where=path,
            fix="get an unchanged copy of the file",
        )
    return tensors, metadata


def _parsed_info(data: bytes, where: Path) -> tuple[ConceptInfo, str]:
    try:
        values = _json(data)
    except (ValueError, RecursionError) as error:
        raise ConceptError(
            f"the facts on the concept are no JSON: {error}", where=where, fix="get the file anew"
        ) from error
    digest = values.pop(DIGEST_KEY, None) if isinstance(values, dict) else None
    info = parse_info(values, where)
    if not isinstance(digest, str):
        raise ConceptError("the digest is missing", where=where, fix=_ANEW)
    return info, digest


def read_json(path: Path) -> Any:
    """What a small JSON file says.

    Raises:
        ConceptError: it cannot be read or parsed.
    """
    try:
        return _json(_bytes(path, _MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise ConceptError(f"it is no JSON: {error}", where=path, fix="get it anew") from error


def _json(text: str | bytes) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON number")

    return json.loads(text, parse_constant=refuse)


def _bytes(path: Path, limit: int) -> bytes:
    try:
        return read_bytes(path, limit)
    except OSError as error:
        raise _unreadable(error, path) from error


def _unreadable(error: OSError, path: Path) -> ConceptError:
    if isinstance(error, FileNotFoundError):
        return ConceptError("the file is missing", where=path, fix="get it anew")
    denied = isinstance(error, PermissionError)
    return ConceptError(
        f"the file cannot be read: {error.strerror or error}",
        where=path,
        fix="allow reading it" if denied else _ANEW,
    )
