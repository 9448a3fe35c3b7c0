"""The metadata of a run: the settings that its result depends on, its losses and its cost."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from customize.concepts.concept_info import ConceptInfo
from customize.concepts.io.file_layout import INFO_FILE
from customize.concepts.io.read_concept import load_concept
from customize.concepts.types import Concept
from customize.errors import ConceptError, SettingsError
from customize.training.checkpoint import (
    BASE_CONFIG,
    BASE_WEIGHTS,
    JOINT_CONCEPTS,
    SHARED_DIRECTIONS,
    settings_differences,
)
from customize.training.config import TrainConfig
from customize.training.data import dataset
from customize.training.data.changed_images import IMAGE_SETTINGS, ImageHashes, combined_hash
from customize.training.joint_configs import PER_CONCEPT_SETTINGS
from customize.training.run import Run
from customize.training.settings_file import rename_settings
from customize.training.trainable import TrainableConcept

# Settings that may change between the parts of a resumed run, because the result does not depend on
# them. Folders of images are replaced by hashes of the images.
_IGNORED_SETTINGS = {
    *("output", "images", "masks", "prior_images", "library", "device", "resume", "tracker"),
    *("checkpoint_every", "keep_checkpoints", "log_every", "cache_latents"),
    *("gradient_checkpointing", "compile", "samples", "validation_prompts", "validation_every"),
    *("variant", "base_config"),  # replaced by digests of the weights and the configuration
}
# Settings on which only class images depend that the base draws.
_CLASS_IMAGE_SETTINGS = ("prior_count", "prior_prompt", "validation_steps", "validation_guidance")
# A concept's own settings on which the result of the other concepts of the run depends.
_JOINT_SETTINGS = (PER_CONCEPT_SETTINGS - _IGNORED_SETTINGS - {"name"}) | {*IMAGE_SETTINGS}
_MAX_HISTORY = 200  # pairs of step and loss in concept.json
_MAX_NAMED_IMAGES = 2000


def image_digests(samples: Sequence[dataset.TrainingImage]) -> ImageHashes:
    """Return file name -> hash of image, caption and mask, in the order of the images.

    Changed images can then be named. More than 2000 images get one combined hash, and no images
    None.
    """
    hashes = {sample.path.name: sample.digest for sample in samples}
    if 0 < len(samples) == len(hashes) <= _MAX_NAMED_IMAGES:
        return hashes
    return combined_hash(hashes)


def run_settings(
    configs: Sequence[TrainConfig],
    images: Sequence[ImageHashes],
    class_images: Sequence[ImageHashes],
    weights: Mapping[str, str],
    base_config: Mapping[str, Any] | None,
    processes: int,
    previous: Sequence[Mapping[str, Any] | None],
) -> list[dict[str, Any]]:
    """Collect all that the result depends on: runs with equal settings give equal concepts.

    Args:
        configs: Settings of each concept.
        images: From :func:`image_digests`, of each concept.
        class_images: From :func:`image_digests`, of each concept; None where the base draws them.
        weights: From :func:`customize.training.base_fingerprint.weight_digests`.
        base_config: Configuration of the base that training depends on; None before it is loaded.
        processes: Number of training processes.
        previous: Each concept's settings in the run to resume. Slice and shared directions are
            taken from them if the configuration sets no slice; else they are None and "" until
            they are chosen.

    Returns:
        JSON values of each concept, with the settings of the other concepts.
    """
    settings = []
    for config, own_images, own_class_images, earlier in zip(
        configs, images, class_images, previous, strict=True
    ):
        values = config.model_dump(mode="json", exclude=_IGNORED_SETTINGS)
        if not config.prior_weight or own_class_images:
            for key in _CLASS_IMAGE_SETTINGS:
                del values[key]
        settings.append(
            values
            | {
                "slice": (earlier or {}).get("slice") if config.slice is None else config.slice,
                SHARED_DIRECTIONS: (earlier or {}).get(SHARED_DIRECTIONS, ""),
                "pictures": own_images,
                "class_pictures": own_class_images,
                "processes": processes,
                BASE_WEIGHTS: dict(weights),
                BASE_CONFIG: base_config,
            }
        )
    return add_joint_settings(settings)


def add_joint_settings(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add to each concept's settings the per-concept settings of the other concepts.

    Args:
        settings: Of each concept; those of a single concept are returned unchanged.
    """
    per_concept = {
        values["name"]: {key: values[key] for key in sorted(_JOINT_SETTINGS) if key in values}
        for values in settings
    }
    if len(per_concept) == 1:
        return [dict(values) for values in settings]
    return [
        {
            **values,
            JOINT_CONCEPTS: {
                name: others for name, others in per_concept.items() if name != values["name"]
            },
        }
        for values in settings
    ]


def split_joint_settings(
    settings: Mapping[str, Any] | None, configs: Sequence[TrainConfig]
) -> list[Mapping[str, Any] | None]:
    """Return the settings of each concept as far as the settings of one concept contain them.

    Args:
        settings: From :func:`add_joint_settings`, of one concept; None if there are none.
        configs: Settings of the concepts of the run.
    """
    if settings is None:
        return [None] * len(configs)
    by_name = {settings.get("name"): settings}
    for name, values in settings.get(JOINT_CONCEPTS, {}).items():
        by_name[name] = {**values, SHARED_DIRECTIONS: settings.get(SHARED_DIRECTIONS, "")}
    return [by_name.get(config.name) for config in configs]


def read_finished_concept(config: TrainConfig) -> Concept | None:
    """Read the concept in the output folder; None if there is none or it is incomplete."""
    if not os.path.isfile(config.output / INFO_FILE):
        return None
    try:
        return load_concept(config.output)
    except ConceptError:
        return None  # the run ended while it was saved, and the last checkpoint has its state


def check_finished_settings(
    concept: Concept,
    settings: Mapping[str, Any],
    config: TrainConfig,
    checkpoint_settings: Mapping[str, Any] | None = None,
) -> None:
    """Refuse to return a finished concept that was trained with other settings.

    Args:
        concept: The finished concept.
        settings: Settings of this run.
        config: Configuration of the concept.
        checkpoint_settings: Settings of the run's last checkpoint, which name the images.

    Raises:
        SettingsError: They differ; the message names each setting with both values.
    """
    stored = concept.info.training.get("settings")
    before = _add_defaults(stored) if isinstance(stored, dict) else {}
    for key in IMAGE_SETTINGS:
        hashes = (checkpoint_settings or {}).get(key)
        if isinstance(hashes, dict) and combined_hash(hashes) == before.get(key):
            before[key] = hashes
    changes = settings_differences(before, settings)
    if changes:
        raise SettingsError(
            f"the concept {config.name} is already finished, learned with other settings: "
            + "; ".join(changes),
            where=config.output,
            fix="choose another output folder, or set resume to false (--no-resume) to replace it",
        )


def _add_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A finished concept's settings, with the defaults of settings added in later versions."""
    defaults = {
        key: field.default
        for key, field in TrainConfig.model_fields.items()
        if key not in {*_IGNORED_SETTINGS, *_CLASS_IMAGE_SETTINGS} and not field.is_required()
    }
    return json.loads(json.dumps(defaults)) | rename_settings(settings)


def concept_info(run: Run, concept: TrainableConcept, training: Mapping[str, Any]) -> ConceptInfo:
    """Return the content of a learned concept's ``concept.json``.

    Args:
        run: The run.
        concept: The learned concept.
        training: From :func:`training_facts`.
    """
    config = concept.config
    return ConceptInfo(
        name=config.name,
        trigger=config.trigger,
        class_word=config.class_word,
        family=run.family.name,
        base=config.base,
        fingerprint=dict(run.fingerprint),
        method=config.method,
        basis=concept.basis,
        rank=config.rank,
        alpha=config.adapter_alpha,
        slices={str(width): list(columns) for width, columns in concept.slice_columns.items()},
        num_tokens=config.num_tokens if concept.token_rows else 0,
        token_layers=concept.layers,
        training=dict(training) | {"output": run.family.output},
    )


def training_facts(
    settings: Mapping[str, Any],
    history: Sequence[Sequence[float]],
    seconds_per_step: float,
    device: torch.device,
) -> dict[str, Any]:
    """Return the entry "training" of ``concept.json``.

    "final_loss" is the mean over the last tenth of the steps. "losses" are at most 200 pairs of a
    step and the mean loss since the previous pair. "peak_memory_mb" is of the device, or of the
    whole process on a CPU, in MiB.
    """
    last = [loss for step, loss in history if step > 0.9 * history[-1][0]]
    stride = -(-len(history) // _MAX_HISTORY)
    return {
        "settings": without_image_names(settings),
        "final_loss": sum(last) / len(last),
        "losses": [list(pair) for pair in history[::-1][::stride][::-1]],
        "seconds_per_step": seconds_per_step,
        "peak_memory_mb": peak_memory(device) / 2**20,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }


def without_image_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the names of image files by one hash, because ``concept.json`` may be published."""
    others = settings.get(JOINT_CONCEPTS)
    published = {
        **settings,
        **{key: combined_hash(settings[key]) for key in IMAGE_SETTINGS if key in settings},
    }
    if others:
        published[JOINT_CONCEPTS] = {
            name: without_image_names(values) for name, values in others.items()
        }
    return published


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the CUDA device, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    try:
        # On Linux, getrusage starts at the parent's memory.
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def tracker_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as trackers accept them: scalars and strings only."""
    scalars = {key: "" if value is None else value for key, value in settings.items()}
    return {k: json.dumps(v) if isinstance(v, dict) else v for k, v in scalars.items()}
