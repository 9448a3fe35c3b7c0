"""Opening concepts, merged LoRAs and adapter files of other programs by path or hub id."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from customize.concepts.formats.base_detection import detect_base
from customize.concepts.formats.denoiser_labels import (
    NoiseLevel,
    parse_noise_level,
    parse_noise_levels,
)
from customize.concepts.formats.ignored_parts import (
    check_all_matched,
    check_ignore,
    filter_tensors,
    remove_ignored,
)
from customize.concepts.formats.lora_file import (
    LoraFile,
    assign_noise_levels,
    pair_denoiser_files,
    parse_lora_file,
)
from customize.concepts.formats.merged_lora import parse_merged_lora
from customize.concepts.io.data_files import read_json_file, read_safetensors_file
from customize.concepts.io.file_layout import (
    INFO_FILE,
    INFO_HEADER,
    KOHYA_EMBEDS_FOLDER,
    LAYER_INPUTS_FILE,
    LORA_FILE,
    MERGED_EMBEDS_FILE,
    MERGED_FILE,
    PEFT_FILES,
    PEFT_HEADER,
    PIPELINE_FILE,
    SECOND_LORA_FILE,
)
from customize.concepts.io.find_files import list_folder, locate_concept, refuse_pickles
from customize.concepts.io.read_concept import load_concept, parse_single_file
from customize.concepts.types import Adaptation, Lora
from customize.errors import ConceptError, ConfigError
from customize.families import FAMILIES
from customize.near_names import suggest_names
from customize.safe_read import path_exists, real_path
from customize.text import one_line


def open_adaptation(
    source: str | Path, ignore: Sequence[str] = (), matched: set[str] | None = None
) -> Adaptation | LoraFile:
    """Open a concept, a merged LoRA, or an adapter file whose model is not known yet.

    Args:
        source: A folder, a ``.safetensors`` file or a hub id. A folder without ``concept.json``
            must contain one ``.safetensors`` file, or two with names that mark them as those of two
            denoisers.
        ignore: Parts to leave out; see :mod:`customize.concepts.formats.ignored_parts`.
        matched: Selectors of ``ignore`` that match are added to it.

    Raises:
        ConceptError: If there is no such file, it is damaged or unsupported, or it is a pickle.
    """
    path = location = locate_concept(source)
    matched = set() if matched is None else matched
    second: Path | None = None
    if path.is_dir():
        if path_exists(path / INFO_FILE):
            return remove_ignored(load_concept(path), ignore, matched)
        # The folder of a hub repository is named after a commit.
        is_hub_id = not Path(source).exists()
        name = str(source).rpartition("/")[2] if is_hub_id else real_path(path).name
        path, second = _find_lora_files(path)
    else:
        name = path.stem
    tensors, metadata = read_safetensors_file(path)
    if INFO_HEADER in metadata:
        return remove_ignored(parse_single_file(tensors, metadata, path), ignore, matched)
    second_file = None if second is None else read_safetensors_file(second)
    merged = parse_merged_lora(name, path, tensors, metadata, second_file and second_file[0])
    if merged is not None:
        return remove_ignored(merged, ignore, matched)
    if location.is_dir():
        _refuse_old_merge(path.parent)
    count = len(tensors)
    tensors = filter_tensors(tensors, ignore, matched, path)
    config = _read_adapter_config(path)
    if config is None and PEFT_HEADER not in metadata:
        _warn_unused_config(path, tensors)
    file = parse_lora_file(name, path, tensors, metadata, config)
    file = replace(file, is_partial=len(tensors) < count)
    if second is None or second_file is None:
        return replace(file, noise_level=_noise_level_from_path(path))
    second_tensors = filter_tensors(second_file[0], ignore, matched, second)
    second_config = _read_adapter_config(second)
    return pair_denoiser_files(
        file, parse_lora_file(name, second, second_tensors, second_file[1], second_config)
    )


def open_without_pipeline(source: str | Path, family: str | None = None) -> Adaptation:
    """Open a source, and resolve adapter files in the published model that has their layers.

    Args:
        source: As for :func:`open_adaptation`.
        family: Name of the model family, for layer names that several families share.

    Raises:
        ConceptError: As :func:`open_adaptation`; or if no published model has all the layers, the
            updates depend on base weights, or the concept belongs to another family.
        ConfigError: If there is no such family.
    """
    return open_all_without_pipeline([source], family)[0]


def open_all_without_pipeline(
    sources: Sequence[str | Path],
    family: str | None = None,
    ignore: str | Sequence[str] | None = None,
) -> list[Adaptation]:
    """Open each source by :func:`open_without_pipeline`, with files of two denoisers as a pair.

    Args:
        sources: As for :func:`open_adaptation`.
        family: As for :func:`open_without_pipeline`.
        ignore: As for :func:`customize.load_custom`.
    """
    if family is not None and family not in FAMILIES:
        raise ConfigError(
            f"unknown model family {family!r}",
            where="family",
            fix=suggest_names(family, FAMILIES),
        )
    opened = open_adaptations(sources, ignore)
    files = iter(assign_noise_levels([item for item in opened if isinstance(item, LoraFile)]))
    return [
        _resolve_published(next(files), family)
        if isinstance(item, LoraFile)
        else _check_family(item, family)
        for item in opened
    ]


def open_adaptations(
    sources: Sequence[str | Path], ignore: str | Sequence[str] | None = None
) -> list[Adaptation | LoraFile]:
    """Open each source by :func:`open_adaptation`, without ignored parts.

    Raises:
        ConfigError: If a selector of ``ignore`` is invalid, or matches nothing.
    """
    selectors, matched = check_ignore(ignore), set[str]()
    opened = [open_adaptation(source, selectors, matched) for source in sources]
    check_all_matched(selectors, matched)
    return opened


def _resolve_published(file: LoraFile, family: str | None) -> Lora:
    several = bool(file.noise_level or file.into)
    return file.to_lora(detect_base(file.groups, file.where, family, several=several))


def _check_family(concept: Adaptation, family: str | None) -> Adaptation:
    if family not in (None, concept.info.family):
        raise ConceptError(
            f"the concept {concept.info.name} is of family {concept.info.family}, not {family}",
            where=concept.source,
            fix="leave the family out: the concept stores it",
        )
    return concept


def _find_lora_files(folder: Path) -> tuple[Path, Path | None]:
    """Find the LoRA file of a folder, and that of a second denoiser or None."""
    files = sorted(
        file
        for file in list_folder(folder)
        if file.suffix == ".safetensors" and not file.name.endswith(LAYER_INPUTS_FILE)
    )
    if path_exists(folder / MERGED_FILE):  # with token embeddings for other programs
        tokens = set(folder.glob(MERGED_EMBEDS_FILE.format("*")))
        files = [file for file in files if file not in tokens]
    if len(files) == 1:
        return files[0], None
    if [file.name for file in files] == [LORA_FILE, SECOND_LORA_FILE]:
        return files[0], files[1]
    # The names of a pair of files, or of their folders, contain the noise levels.
    named = {file.stem: file for file in files} or _find_in_subfolders(folder)
    noises = parse_noise_levels(*named) if len(named) == 2 else None
    if noises is not None:
        first, second = named.values()
        return (first, second) if noises[0] == "high" else (second, first)
    if (folder / PIPELINE_FILE).is_file():
        raise ConceptError(
            "the folder is a whole pipeline, not a concept",
            where=folder,
            fix="give it as the base: --base on the command line",
        )
    if not files:
        refuse_pickles(folder)
    raise ConceptError(
        f"the folder has no {INFO_FILE}"
        + (f", and {len(files)} files that may be a LoRA" if files else ""),
        where=folder,
        fix="give a folder written by customize, or a single .safetensors file",
    )


def _find_in_subfolders(folder: Path) -> dict[str, Path]:
    """Names of folders with a noise level -> the only file in each."""
    files_by_folder = {}
    for path in sorted(folder.iterdir()):
        files = (
            list(path.glob("*.safetensors"))
            if parse_noise_level(path.name) and path.is_dir()
            else []
        )
        if len(files) == 1:
            files_by_folder[path.name] = files[0]
    return files_by_folder


def _noise_level_from_path(path: Path) -> NoiseLevel | None:
    """The noise level in the name of a file; None if there is none."""
    return "low" if path.name == SECOND_LORA_FILE else parse_noise_level(path.stem)


def _refuse_old_merge(folder: Path) -> None:
    """Refuse a merge of earlier versions, without token embeddings in the header of its LoRA."""
    embeddings = (folder / KOHYA_EMBEDS_FOLDER, *folder.glob(MERGED_EMBEDS_FILE.format("*")))
    if (folder / MERGED_FILE).is_file() and any(path.exists() for path in embeddings):
        raise ConceptError(
            "the folder is a merge of an earlier version, whose tokens would be left out",
            where=folder,
            fix="merge the concepts again, or load the concepts instead",
        )


def _warn_unused_config(path: Path, tensors: Iterable[str]) -> None:
    """Warn of a configuration that may belong to this file or to another one in the folder."""
    keys = list(tensors)
    has_no_alpha = not any(key.endswith(".alpha") for key in keys)
    if (
        has_no_alpha
        and any(".lora_A." in key for key in keys)
        and path_exists(path.parent / PEFT_FILES[1])
    ):
        weights, config = PEFT_FILES
        file = one_line(str(path))
        warnings.warn(
            f"{file}: {config} is not used, because it may belong to another file of the folder,"
            f" and alpha is set to the rank; if it belongs to this file, rename the file to"
            f" {weights}, or move both to a folder of their own",
            stacklevel=2,
        )


def _read_adapter_config(path: Path) -> dict[str, Any] | None:
    """Read peft's configuration, which stores rank and alpha beside the tensors; None without one.

    It belongs to the file with peft's name, or to the only file of its folder.
    """
    weights, config = PEFT_FILES
    if not path_exists(path.parent / config):
        return None
    if path.name != weights and len(list(path.parent.glob("*.safetensors"))) != 1:
        return None
    values = read_json_file(path.parent / config)
    if not isinstance(values, dict):
        raise ConceptError(
            "the adapter's configuration is not a JSON object",
            where=path.parent / config,
            fix="download the file again",
        )
    return values
