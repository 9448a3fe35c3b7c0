"""The output folder of a training of references: settings, resuming, facts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from customize.atomic import write_atomic
from customize.errors import SettingsError, storage_error
from customize.references.model import ReferenceModel
from customize.references.model_files import CONFIG_FILE, FACTS_FILE
from customize.safe_read import MAX_TABLE_BYTES, read_json
from customize.training.checkpoint import (
    BASE_CONFIG,
    BASE_WEIGHTS,
    Checkpoint,
    check_settings_match,
    checkpoint_folder,
    load_latest_checkpoint,
    settings_differences,
)
from customize.training.data.changed_images import combined_hash
from customize.training.references.config import ENCODER_SETTINGS, ReferenceTrainConfig

_MAX_HISTORY = 200  # pairs of step and loss
_MAX_NAMED_IMAGES = 2000
# Settings that the result does not depend on. Folders are replaced by digests of their content.
_IGNORED_SETTINGS = {
    *("output", "images", "mllm", "init", "device", "resume", "tracker", "variant", "base_config"),
    *("checkpoint_every", "keep_checkpoints", "log_every", "cache_latents"),
    *("gradient_checkpointing", "validation_images", "validation_groups", "validation_prompts"),
    *("validation_every", "validation_steps", "validation_guidance"),
}


def reference_settings(
    config: ReferenceTrainConfig,
    data: Mapping[str, str] | int,
    initial: str,
    weights: Mapping[str, str],
    base_config: Mapping[str, Any] | None,
    processes: int,
) -> dict[str, Any]:
    """Collect all that the result depends on: runs with equal settings give equal references.

    Args:
        config: The settings.
        data: Name -> digest of the images, or the number of targets of a data set in memory.
        initial: Digest of the weights that the run starts from.
        weights: Digests of the base's components.
        base_config: Configuration of the base that training depends on; None before it is loaded.
        processes: Number of training processes.

    Returns:
        JSON values.
    """
    ignored = _IGNORED_SETTINGS | ({*ENCODER_SETTINGS} if config.mllm is None else set())
    pictures: Any = data
    if isinstance(data, Mapping) and len(data) > _MAX_NAMED_IMAGES:
        pictures = combined_hash(data)
    return config.model_dump(mode="json", exclude=ignored) | {
        "learning_rate": config.peak_learning_rate,
        "pictures": pictures if isinstance(data, Mapping) else None,
        "targets": len(data) if isinstance(data, Mapping) else data,
        "initial_weights": initial,
        "processes": processes,
        BASE_WEIGHTS: dict(weights),
        BASE_CONFIG: base_config,
    }


def find_reference_state(
    config: ReferenceTrainConfig, settings: Mapping[str, Any]
) -> tuple[Checkpoint | None, ReferenceModel | None]:
    """Return the checkpoint to resume from, and the references if they are finished.

    Raises:
        SettingsError: The output folder has a checkpoint or references of other settings.
    """
    if not config.resume:
        return None, None
    folder = checkpoint_folder(config)
    checkpoint = load_latest_checkpoint(folder)
    finished = _read_finished_settings(config.output)
    if finished is not None and not settings_differences(finished, settings):
        return None, ReferenceModel.from_pretrained(config.output)
    if checkpoint is not None:
        check_settings_match(checkpoint, settings, folder)
        return checkpoint, None
    if finished is not None:
        changes = settings_differences(finished, settings)
        raise SettingsError(
            "the output folder has references of other settings: " + "; ".join(changes),
            where=config.output,
            fix="choose another output folder, or set resume to false (--no-resume) to replace "
            "them",
        )
    return None, None


def write_training_facts(
    config: ReferenceTrainConfig,
    settings: Mapping[str, Any],
    history: list[list[float]],
    seconds_per_step: float,
) -> None:
    """Write the settings, the losses and the time per step beside the references.

    Raises:
        StorageError: The file cannot be written.
    """
    stride = -(-len(history) // _MAX_HISTORY) or 1
    facts = {
        "settings": settings,
        "losses": [*history[:-1:stride], *history[-1:]],
        "seconds_per_step": round(seconds_per_step, 4),
    }
    try:
        text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
        write_atomic(config.output / FACTS_FILE, text.encode())
    except OSError as error:
        raise storage_error(error, config.output) from error


def _read_finished_settings(folder: Path) -> dict[str, Any] | None:
    try:
        settings = read_json(folder / FACTS_FILE, MAX_TABLE_BYTES)["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return settings if isinstance(settings, dict) and (folder / CONFIG_FILE).exists() else None
