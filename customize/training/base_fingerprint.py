"""Facts about a base before it is loaded: digests of its weights, and its resolution.

A digest samples a few numbers of every tensor, so its cost is small for a base of any size, and
fine-tuned or merged weights have another digest. It ignores tensor names, which libraries change
between file and memory, and precision: a half precision file that is loaded as float32 has the
digest of the weights in memory. Weights that were rounded to half precision after loading have a
digest of their own, because training on them gives another result.
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

_SAMPLES = 16  # numbers per tensor
_STEMS = ("diffusion_pytorch_model", "model")  # weight files of diffusers and transformers
_INDICES = ("model_index.json", "modular_model_index.json")  # of standard and modular pipelines
# Components of all families on which training depends.
_COMPONENTS = sorted(
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
    """Return component -> digest of its weights, of components in memory or of the base's files.

    Args:
        base: Folder or hub id of the base, used without components.
        components: Components of a pipeline in memory.
        variant: Variant of the weight files, such as "fp16".

    Returns:
        Digests of 16 hexadecimal digits; empty if there are no components, or the files are not on
        disk or of an unusual layout.
    """
    if components is None:
        return weight_digests_on_disk(base, variant)
    models = {key: components.get(key) for key in _COMPONENTS}
    return {
        key: tensors_digest(t for t in model.state_dict().values() if isinstance(t, Tensor))
        for key, model in models.items()
        if isinstance(model, nn.Module)
    }


def weight_digests_on_disk(base: str, variant: str | None = None) -> dict[str, str]:
    """Return the digests of a ``save_pretrained`` folder, or of a hub id's latest download.

    They equal the digests of the loaded components. Only the sampled numbers are read.
    """
    folder = local_folder(base)
    if folder is None or _has_external_components(folder):
        return {}
    try:
        variants = select_variants(folder, variant)
    except PipelineError:  # loading the base raises it again
        return {}
    digests = {}
    for component in _COMPONENTS:
        if not (folder / component).is_dir():
            continue
        try:
            samples: set[bytes] = set()
            for file in _component_files(folder / component, variants.get(component, "")):
                with map_float_tensors(file) as tensors:
                    samples |= _sample_tensors(tensor for _, tensor in tensors)
        except Exception:  # loading the base raises an error for missing or damaged files
            return {}
        digests[component] = _hash_samples(samples)
    return digests


def resolution_before_loading(
    config: TrainConfig, components: Mapping[str, Any] | None
) -> int | None:
    """Return the side of the training images in pixels; None if it requires the loaded base.

    It allows shrinking photographs as they are read.
    """
    if config.resolution is not None:
        return config.resolution
    try:
        if components is not None:
            return family_of(components).default_resolution
        folder = local_folder(config.base)
        if folder is None:
            return None
        sides = [
            _read_config(folder / f.denoiser_key).get("sample_size") for f in FAMILIES.values()
        ]
        size = next(side for side in sides if side is not None)
        levels = len(_read_config(folder / "vae")["block_out_channels"])
        # Equal to Family.default_resolution of the loaded models.
        return int(size if isinstance(size, int) else size[0]) * 2 ** (levels - 1)
    except Exception:  # loading the base raises an error
        return None


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Return a digest of weights; order, device and repetition of tensors do not matter."""
    return _hash_samples(_sample_tensors(tensors))


def _sample_tensors(tensors: Iterable[Tensor]) -> set[bytes]:
    """Shape and sampled numbers of each tensor, copied to the CPU at once."""
    # Not integers, because position ids are in some files only; and not quantized weights, whose
    # tensor subclasses cannot be indexed.
    plain = (t for t in tensors if type(t) in (Tensor, nn.Parameter) and not t.is_meta)
    floats = [t for t in plain if t.is_floating_point() and t.numel()]
    if not floats:
        return set()
    samples = [t.detach().reshape(-1)[:: max(t.numel() // _SAMPLES, 1)][:_SAMPLES] for t in floats]
    numbers = torch.cat([values.float() for values in samples]).cpu()
    return {
        f"{tuple(t.shape)} ".encode() + values.numpy().astype("<f4").tobytes()
        for t, values in zip(floats, numbers.split([len(s) for s in samples]), strict=True)
    }


def _hash_samples(samples: set[bytes]) -> str:
    return hashlib.sha256(b"\n".join(sorted(samples))).hexdigest()[:16]


def _has_external_components(folder: Path) -> bool:
    """Whether a modular base refers to components outside of its folder."""
    standard, modular = (folder / name for name in _INDICES)
    if standard.is_file() or not modular.is_file():
        return False
    try:
        index = read_json(modular, MAX_TABLE_BYTES)
    except (OSError, ValueError):  # loading the base raises an error
        return True
    return any(key in index and not (folder / key).is_dir() for key in _COMPONENTS)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    config: dict[str, Any] = read_json(file, MAX_TABLE_BYTES) if file.is_file() else {}
    return config


def _component_files(folder: Path, variant: str) -> list[Path]:
    """The safetensors files that ``from_pretrained`` loads a component from."""
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
