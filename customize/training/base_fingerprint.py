"""What can be told of a base before it is loaded: which weights it has, and its resolution.

A digest looks at a few numbers of every tensor, so it costs little of a base of any size, and
weights that were trained further, or merged with others, have another. It doesn't look at names,
which libraries change between a file and memory, nor at precision: a file in half precision that
is loaded as float32 has the digest of what is in memory, but weights that were rounded to half
precision after loading have one of their own, as something else is learned from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from customize.base.weight_files import list_weight_files, local_folder, select_variants
from customize.errors import PipelineError
from customize.families import FAMILIES, family_of
from customize.safe_read import MAX_TABLE_BYTES, map_float_tensors, read_json
from customize.training.config import TrainConfig

_SAMPLED = 16  # numbers of a tensor that are looked at
_STEMS = ("diffusion_pytorch_model", "model")  # of diffusers' weight files and transformers'
_INDICES = ("model_index.json", "modular_model_index.json")  # of standard and modular pipelines
#: The components that what is learned depends on, in all families.
_PARTS = sorted(
    {
        key
        for family in FAMILIES.values()
        for key in (
            *(family.denoiser_key, *family.other_denoisers),
            *("vae", *family.clip_encoders, *family.other_encoders),
        )
    }
)


def weight_digests(
    base: str, components: Mapping[str, Any] | None, variant: str | None = None
) -> dict[str, str]:
    """Component -> digest of its weights: of components in memory, else of the base's files.

    Empty where no component is given, or the files aren't at hand or are of an unusual layout.
    """
    if components is None:
        return weight_digests_on_disk(base, variant)
    models = {key: components.get(key) for key in _PARTS}
    return {
        key: tensors_digest(t for t in model.state_dict().values() if isinstance(t, Tensor))
        for key, model in models.items()
        if isinstance(model, nn.Module)
    }


def base_configuration(
    components: Mapping[str, Any] | None, pipeline_config: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """What :meth:`Family.configured` says of components in memory; None where there are none yet.

    Raises:
        PipelineError: no family knows them, or theirs lacks something in the configuration.
    """
    if not components:
        return None
    return family_of(components, pipeline_config or {}).relevant_config()


def weight_digests_on_disk(base: str, variant: str | None = None) -> dict[str, str]:
    """The digests of a folder as ``save_pretrained`` writes it, or of a hub id's latest download.

    They are those of the loaded components. Only the numbers that count are read.
    """
    folder = local_folder(base)
    if folder is None or _elsewhere(folder):
        return {}
    try:
        variants = select_variants(folder, variant)
    except PipelineError:  # opening the base raises it again
        return {}
    found = {}
    for part in _PARTS:
        if not (folder / part).is_dir():
            continue
        try:
            entries: set[bytes] = set()
            for file in _files(folder / part, variants.get(part, "")):
                with map_float_tensors(file) as tensors:
                    entries |= _entries(tensors)
        except Exception:  # missing or damaged files: loading them will tell
            return {}
        found[part] = _hashed(entries)
    return found


def resolution_before_loading(
    config: TrainConfig, components: Mapping[str, Any] | None
) -> int | None:
    """The side of the training pictures, as far as it can be told before the base is loaded.

    So photographs can be shrunk as they are read. None where it can't, as with other layouts.
    """
    if config.resolution is not None:
        return config.resolution
    try:
        if components is not None:
            return family_of(components).default_resolution
        folder = local_folder(config.base)
        if folder is None:
            return None
        sides = [_config(folder / f.denoiser_key).get("sample_size") for f in FAMILIES.values()]
        size = next(side for side in sides if side is not None)
        levels = len(_config(folder / "vae")["block_out_channels"])
        # As Family.default_resolution computes it of the loaded models.
        return int(size if isinstance(size, int) else size[0]) * 2 ** (levels - 1)
    except Exception:  # what is wrong with the base is told when it is loaded
        return None


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """A name for some weights, on any device, in any order, with shared ones once or many times."""
    return _hashed(_entries(tensors))


def _entries(tensors: Iterable[Tensor]) -> set[bytes]:
    """Shape and a few numbers of each tensor; the numbers come to the CPU together."""
    # Not integers: positions are in some files and made up by others. Not quantized weights, which
    # are of classes of their own and cannot be cut into.
    plain = (t for t in tensors if type(t) in (Tensor, nn.Parameter) and not t.is_meta)
    kept = [t for t in plain if t.is_floating_point() and t.numel()]
    if not kept:
        return set()
    picked = [t.detach().reshape(-1)[:: max(t.numel() // _SAMPLED, 1)][:_SAMPLED] for t in kept]
    numbers = torch.cat([values.float() for values in picked]).cpu()
    parts = numbers.split([len(values) for values in picked])
    return {
        f"{tuple(t.shape)} ".encode() + values.numpy().astype("<f4").tobytes()
        for t, values in zip(kept, parts, strict=True)
    }


def _hashed(entries: set[bytes]) -> str:
    return hashlib.sha256(b"\n".join(sorted(entries))).hexdigest()[:16]


def _elsewhere(folder: Path) -> list[str]:
    """The parts that a modular base has in other places."""
    standard, modular = (folder / name for name in _INDICES)
    if standard.is_file() or not modular.is_file():
        return []
    try:
        listed = read_json(modular, MAX_TABLE_BYTES)
    except (OSError, ValueError):  # loading it will tell
        return list(_PARTS)
    return [part for part in _PARTS if part in listed and not (folder / part).is_dir()]


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    values: dict[str, Any] = read_json(file, MAX_TABLE_BYTES) if file.is_file() else {}
    return values


def _files(folder: Path, variant: str) -> list[Path]:
    """The safetensors files that ``from_pretrained`` reads a component from."""
    if variant:
        return list_weight_files(folder, variant)
    for stem in _STEMS:
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return [single]
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            names = set(read_json(index, MAX_TABLE_BYTES)["weight_map"].values())
            return [folder / name for name in sorted(names)]
    raise FileNotFoundError(f"no safetensors in {folder}")
