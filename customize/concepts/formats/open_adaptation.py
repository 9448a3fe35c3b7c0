"""Opening what a user names: one of our concepts, or a LoRA from elsewhere."""

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
    """Read a concept, a merge of ours, or the file of a LoRA whose model is not known yet.

    Args:
        source: a folder, a ``.safetensors`` file or a hub id. A folder without ``concept.json`` is
            that of a LoRA where it has just one ``.safetensors`` file, or two by the names that we
            write for two denoisers.
        ignore: what to leave out; see :mod:`customize.concepts.formats.ignored_parts`.
        matched: the words of it that left something out are added to it.

    Raises:
        ConceptError: nothing is there, it cannot be read whole, or it is a pickle.
    """
    path = place = locate_concept(source)
    hits = set() if matched is None else matched
    second: Path | None = None
    if path.is_dir():
        if path_exists(path / INFO_FILE):
            return remove_ignored(load_concept(path), ignore, hits)
        # A hub's folder is called by a commit, which is no name.
        hub = not Path(source).exists()
        name = str(source).rpartition("/")[2] if hub else real_path(path).name
        path, second = _find_lora_files(path)
    else:
        name = path.stem
    tensors, metadata = read_safetensors_file(path)
    if INFO_HEADER in metadata:
        return remove_ignored(parse_single_file(tensors, metadata, path), ignore, hits)
    others = None if second is None else read_safetensors_file(second)
    merged = parse_merged_lora(name, path, tensors, metadata, others and others[0])
    if merged is not None:
        return remove_ignored(merged, ignore, hits)
    if place.is_dir():
        _refuse_old_merge(path.parent)
    count = len(tensors)
    tensors = filter_tensors(tensors, ignore, hits, path)
    config = _read_adapter_config(path)
    if config is None and PEFT_HEADER not in metadata:
        _warn_unused_config(path, tensors)
    file = parse_lora_file(name, path, tensors, metadata, config)
    file = replace(file, is_partial=len(tensors) < count)
    if second is None or others is None:
        return replace(file, noise_level=_noise_level_from_path(path))
    rest = filter_tensors(others[0], ignore, hits, second)
    return pair_denoiser_files(
        file, parse_lora_file(name, second, rest, others[1], _read_adapter_config(second))
    )


def open_without_pipeline(source: str | Path, family: str | None = None) -> Adaptation:
    """The same without a pipeline: a LoRA's layers are those of the published model it fits.

    Args:
        family: the name of that model's family, for layers that several families call alike.

    Raises:
        ConceptError: see :func:`open_adaptation`; no published model has all its layers, or its
            updates depend on the base's weights; or the concept is of another family.
        ConfigError: there is no such family.
    """
    return open_all_without_pipeline([source], family)[0]


def open_all_without_pipeline(
    sources: Sequence[str | Path],
    family: str | None = None,
    ignore: str | Sequence[str] | None = None,
) -> list[Adaptation]:
    """Open each source by :func:`open_without_pipeline`, two files of two denoisers as a pair.

    Args:
        ignore: as in :func:`customize.load_custom`.
    """
    if family is not None and family not in FAMILIES:
        raise ConfigError(
            f"there is no family {family!r}",
            where="family",
            fix=suggest_names(family, FAMILIES),
        )
    found = open_adaptations(sources, ignore)
    files = iter(assign_noise_levels([each for each in found if isinstance(each, LoraFile)]))
    return [
        _resolve_published(next(files), family)
        if isinstance(each, LoraFile)
        else _check_family(each, family)
        for each in found
    ]


def open_adaptations(
    sources: Sequence[str | Path], ignore: str | Sequence[str] | None = None
) -> list[Adaptation | LoraFile]:
    """:func:`open_adaptation` of each, without what is to be left out.

    Raises:
        ConfigError: a word of ``ignore`` is none, or leaves nothing out.
    """
    words, matched = check_ignore(ignore), set[str]()
    found = [open_adaptation(source, words, matched) for source in sources]
    check_all_matched(words, matched)
    return found


def _resolve_published(file: LoraFile, family: str | None) -> Lora:
    several = bool(file.noise_level or file.into)
    return file.to_lora(detect_base(file.groups, file.where, family, several=several))


def _check_family(concept: Adaptation, family: str | None) -> Adaptation:
    if family not in (None, concept.info.family):
        raise ConceptError(
            f"the concept {concept.info.name} is of family {concept.info.family}, not {family}",
            where=concept.source,
            fix="leave the family out: a concept of ours says it itself",
        )
    return concept


def _find_lora_files(folder: Path) -> tuple[Path, Path | None]:
    """The folder's LoRA, and that of a second denoiser if there is one."""
    found = (file for file in list_folder(folder) if file.suffix == ".safetensors")
    files = sorted(file for file in found if not file.name.endswith(LAYER_INPUTS_FILE))
    if path_exists(folder / MERGED_FILE):  # beside its LoRA are its tokens, for other programs
        tokens = set(folder.glob(MERGED_EMBEDS_FILE.format("*")))
        files = [file for file in files if file not in tokens]
    if len(files) == 1:
        return files[0], None
    if [file.name for file in files] == [LORA_FILE, SECOND_LORA_FILE]:
        return files[0], files[1]
    # A pair says by its files' names which is which, or by those of the folders that they are in.
    named = {file.stem: file for file in files} or _find_in_subfolders(folder)
    noises = parse_noise_levels(*named) if len(named) == 2 else None
    if noises is not None:
        one, other = named.values()
        return (one, other) if noises[0] == "high" else (other, one)
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
        + (f" and {len(files)} files that may be a LoRA" if files else ""),
        where=folder,
        fix="name a folder that customize has written, or a single .safetensors file",
    )


def _find_in_subfolders(folder: Path) -> dict[str, Path]:
    """Folders that are named after levels of noise -> the only file of each."""
    found = {}
    for path in sorted(folder.iterdir()):
        files = (
            list(path.glob("*.safetensors"))
            if parse_noise_level(path.name) and path.is_dir()
            else []
        )
        if len(files) == 1:
            found[path.name] = files[0]
    return found


def _noise_level_from_path(path: Path) -> NoiseLevel | None:
    """The level of noise that a file is for, by its name; None where that says none."""
    return "low" if path.name == SECOND_LORA_FILE else parse_noise_level(path.stem)


def _refuse_old_merge(folder: Path) -> None:
    """Refuse a merge of earlier versions, whose LoRA does not have its tokens in the header."""
    own = (folder / KOHYA_EMBEDS_FOLDER, *folder.glob(MERGED_EMBEDS_FILE.format("*")))
    if (folder / MERGED_FILE).is_file() and any(path.exists() for path in own):
        raise ConceptError(
            "an earlier version merged concepts here whose tokens would be left out",
            where=folder,
            fix="merge the concepts again, or give them instead of the merge",
        )


def _warn_unused_config(path: Path, tensors: Iterable[str]) -> None:
    """Tell of a configuration that may be this file's or another's, where it matters."""
    keys = list(tensors)
    plain = any(".lora_A." in key for key in keys) and not any(k.endswith(".alpha") for k in keys)
    if plain and path_exists(path.parent / PEFT_FILES[1]):
        weights, config = PEFT_FILES
        file = one_line(str(path))
        warnings.warn(
            f"{file}: {config} lies beside it and beside other files, so that it was not used, and "
            f"alpha is taken to be the rank; if it is of this file, call the file {weights} or put "
            "both into a folder of their own",
            stacklevel=2,
        )


def _read_adapter_config(path: Path) -> dict[str, Any] | None:
    """peft keeps rank and alpha in a file of their own beside the tensors.

    It is that of a file by peft's name, or of the only one in its folder.
    """
    weights, config = PEFT_FILES
    if not path_exists(path.parent / config):
        return None
    if path.name != weights and len(list(path.parent.glob("*.safetensors"))) != 1:
        return None
    values = read_json_file(path.parent / config)
    if not isinstance(values, dict):
        raise ConceptError(
            "the adapter's configuration is no JSON object",
            where=path.parent / config,
            fix="get the file anew",
        )
    return values
