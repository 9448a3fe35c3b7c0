"""What is written down about a run: the settings its result depends on, and what it cost."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from customize.concepts.concept_info import BasisInfo, ConceptInfo
from customize.concepts.io.file_layout import INFO_FILE
from customize.concepts.io.read_concept import load_concept
from customize.concepts.types import Concept
from customize.errors import ConceptError, SettingsError
from customize.families import Family
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
from customize.training.settings_file import rename_settings
from customize.training.trainable import TrainableConcept

# Settings that may change when a run goes on, because the result does not depend on them; the
# pictures themselves are compared, not their folders.
_FREE = {
    *("output", "images", "masks", "prior_images", "library", "device", "resume", "tracker"),
    *("checkpoint_every", "keep_checkpoints", "log_every", "cache_latents"),
    *("gradient_checkpointing", "compile", "samples", "validation_prompts", "validation_every"),
    *("variant", "base_config"),  # the base's weights and configuration are compared themselves
}
# Those that only class pictures drawn by the base depend on.
_DRAWN = ("prior_count", "prior_prompt", "validation_steps", "validation_guidance")
# What of a concept's settings those that are learned with it have to know.
_OTHERS = (PER_CONCEPT_SETTINGS - _FREE - {"name"}) | {"pictures", "class_pictures"}
_LONGEST_HISTORY = 200
_MOST_NAMED = 2000


def image_digests(samples: Sequence[dataset.TrainingImage]) -> ImageHashes:
    """A name for pictures, captions and masks, in their order; None for none.

    File name -> hash, so that those can be named that have changed; one hash of many thousands.
    """
    hashes = {sample.path.name: sample.digest for sample in samples}
    return hashes if 0 < len(samples) == len(hashes) <= _MOST_NAMED else combined_hash(hashes)


def run_settings(
    config: TrainConfig,
    pictures: ImageHashes,
    class_pictures: ImageHashes,
    weights: Mapping[str, str],
    configured: Mapping[str, Any] | None,
    processes: int,
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All that the result depends on, as JSON values: two runs of equal ones give the same.

    Args:
        pictures, class_pictures: from :func:`image_digests`; None where the base draws the latter.
        weights: of the base, from :func:`customize.training.base_fingerprint.weight_digests`.
        configured: from :func:`customize.training.base_fingerprint.base_configuration`.
        before: those of the run that may go on. Its slice holds unless the configuration names
            one. Without both the slice is None until it is chosen; see
            :func:`customize.training.slice_reservation.reserve_slices`. So do the directions that
            it avoids.
    """
    values = config.model_dump(mode="json", exclude=_FREE)
    if not config.prior_weight or class_pictures:
        for key in _DRAWN:  # class pictures that are given are compared themselves
            del values[key]
    return values | {
        "slice": (before or {}).get("slice") if config.slice is None else config.slice,
        SHARED_DIRECTIONS: (before or {}).get(SHARED_DIRECTIONS, ""),
        "pictures": pictures,
        "class_pictures": class_pictures,
        "processes": processes,
        BASE_WEIGHTS: dict(weights),
        BASE_CONFIG: configured,
    }


def joint_run_settings(
    configs: Sequence[TrainConfig],
    pictures: Sequence[ImageHashes],
    class_pictures: Sequence[ImageHashes],
    weights: Mapping[str, str],
    configured: Mapping[str, Any] | None,
    processes: int,
    before: Sequence[Mapping[str, Any] | None],
) -> list[dict[str, Any]]:
    """:func:`run_settings` of each concept of a run, with what it has to know of the others."""
    each = zip(configs, pictures, class_pictures, before, strict=True)
    return add_joint_settings(
        [
            run_settings(config, own, classes, weights, configured, processes, then)
            for config, own, classes, then in each
        ]
    )


def add_joint_settings(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings of concepts that are learned together, each with what is the others' own: the
    result depends on that as well. One alone stays as it is.

    Args:
        settings: from :func:`run_settings`, of each.
    """
    own = {
        each["name"]: {key: each[key] for key in sorted(_OTHERS) if key in each}
        for each in settings
    }
    if len(own) == 1:
        return [dict(each) for each in settings]
    return [
        {
            **each,
            JOINT_CONCEPTS: {name: facts for name, facts in own.items() if name != each["name"]},
        }
        for each in settings
    ]


def split_joint_settings(
    settings: Mapping[str, Any] | None, configs: Sequence[TrainConfig]
) -> list[Mapping[str, Any] | None]:
    """What is known of each concept from the settings of one that was learned with them.

    Args:
        settings: as :func:`add_joint_settings` makes them; None where there are none.
    """
    if settings is None:
        return [None] * len(configs)
    known = {settings.get("name"): settings}
    for name, own in settings.get(JOINT_CONCEPTS, {}).items():
        known[name] = {**own, SHARED_DIRECTIONS: settings.get(SHARED_DIRECTIONS, "")}
    return [known.get(config.name) for config in configs]


def read_finished_concept(config: TrainConfig) -> Concept | None:
    """The concept that the output folder holds already; None where there is none, or not whole."""
    if not os.path.isfile(config.output / INFO_FILE):
        return None
    try:
        return load_concept(config.output)
    except ConceptError:
        return None  # cut off while it was saved: the last checkpoint has it


def check_finished_settings(
    concept: Concept,
    settings: Mapping[str, Any],
    config: TrainConfig,
    saved: Mapping[str, Any] | None = None,
) -> None:
    """Refuse to hand out a finished concept for other settings than its own.

    Args:
        saved: the settings of the run's last checkpoint, which name its pictures.

    Raises:
        SettingsError: they differ; the message names each field with both values.
    """
    settings_then = concept.info.training.get("settings")
    before = _as_of_now(settings_then) if isinstance(settings_then, dict) else {}
    before |= {
        key: saved[key]
        for key in IMAGE_SETTINGS
        if saved
        and isinstance(saved.get(key), dict)
        and combined_hash(saved[key]) == before.get(key)
    }
    found = settings_differences(before, settings)
    if found:
        raise SettingsError(
            f"the concept {config.name} is there already, learned with other settings: "
            + "; ".join(found),
            where=config.output,
            fix="choose another output folder, or set resume to false (--no-resume) to replace it",
        )


def _as_of_now(before: Mapping[str, Any]) -> dict[str, Any]:
    """A finished concept's settings with those that came later, which are as their defaults say."""
    fields = {key: field for key, field in TrainConfig.model_fields.items() if key not in _FREE}
    later = {k: f.default for k, f in fields.items() if not f.is_required() and k not in _DRAWN}
    return json.loads(json.dumps(later)) | rename_settings(before)


def concept_info(
    learned: TrainableConcept,
    family: Family,
    basis: BasisInfo | None,
    fingerprint: Mapping[str, Any],
    training: Mapping[str, Any],
) -> ConceptInfo:
    """The facts of a concept that a run learns."""
    config = learned.config
    return ConceptInfo(
        name=config.name,
        trigger=config.trigger,
        class_word=config.class_word,
        family=family.name,
        base=config.base,
        fingerprint=dict(fingerprint),
        method=config.method,
        basis=basis,
        rank=config.rank,
        alpha=config.adapter_alpha,
        slices={str(width): list(columns) for width, columns in learned.slice_columns.items()},
        num_tokens=config.num_tokens if learned.trainable_rows else 0,
        token_layers=learned.layers,
        training=dict(training) | {"output": family.output},
    )


def training_facts(
    settings: Mapping[str, Any],
    history: Sequence[Sequence[float]],
    seconds_per_step: float,
    device: torch.device,
) -> dict[str, Any]:
    """What ``concept.json`` says of the run.

    "final_loss" is the mean over the last tenth of the steps; "losses" are [step, mean loss up to
    it]; "peak_memory_mb" is the device's, or the whole process's on a CPU.
    """
    last = [loss for step, loss in history if step > 0.9 * history[-1][0]]
    every = -(-len(history) // _LONGEST_HISTORY)
    return {
        "settings": without_image_names(settings),
        "final_loss": sum(last) / len(last),
        "losses": [list(pair) for pair in history[::-1][::every][::-1]],
        "seconds_per_step": seconds_per_step,
        "peak_memory_mb": peak_memory(device) / 2**20,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }


def without_image_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a concept's facts, which are shown to others: without the pictures' names."""
    others = settings.get(JOINT_CONCEPTS)
    return {
        **settings,
        **{key: combined_hash(settings[key]) for key in IMAGE_SETTINGS if key in settings},
        **(
            {JOINT_CONCEPTS: {name: without_image_names(own) for name, own in others.items()}}
            if others
            else {}
        ),
    }


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's memory since the reset, or of the process's since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    try:
        # Not getrusage: on Linux that starts at what the parent process held.
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def tracker_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for trackers, which take only plain values."""
    plain = {key: "" if value is None else value for key, value in settings.items()}
    return {k: json.dumps(v) if isinstance(v, dict) else v for k, v in plain.items()}
