"""Checkpoints of a training run, each an atomically written safetensors file.

A file ``step-000200.safetensors`` contains adapters, token embeddings and the optimizer's moments
and, in its header, the step, the losses and the settings that the result depends on. A process
killed at any moment leaves complete files and hidden partial ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customize.atomic import write_atomic
from customize.errors import SettingsError, StorageError, TrainingError, storage_error
from customize.safe_read import MAX_SAFETENSORS_BYTES, read_safetensors
from customize.text import one_line, plural
from customize.training.data.changed_images import IMAGE_SETTINGS, describe_changes
from customize.training.field_values import format_value
from customize.training.loop_settings import LoopSettings
from customize.training.settings_file import rename_settings
from customize.training.sharded_tensors import full_tensor, gather_tensor, shard_like

_NAME = re.compile(r"step-(\d{6,})\.safetensors")
_HEADER, _DIGEST = "customize_checkpoint", "customize_checkpoint_sha256"
_MAX_BYTES = 4 * MAX_SAFETENSORS_BYTES  # with the optimizer's moments

#: Key of a run's settings: component -> digest, from
#: :func:`customize.training.base_fingerprint.weight_digests`.
BASE_WEIGHTS = "base_weights"
#: Key of a run's settings: the configuration of the base that training depends on.
BASE_CONFIG = "base_config"
#: Key of a run's settings: name of the shared directions that the slices avoid.
SHARED_DIRECTIONS = "shared_directions"
#: Key of a run's settings: name of each other concept of the run -> that concept's own settings.
JOINT_CONCEPTS = "together"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a run after a step.

    Attributes:
        step: Optimizer steps done.
        tensors: Name -> tensor, on any device; all that is needed to resume bit for bit.
        settings: JSON values; a run may resume only with equal settings.
        history: Pairs of step and mean loss.
        extra: Other JSON values, such as the state of the loss scaler.
    """

    step: int
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    history: list[list[float]] = field(default_factory=list)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Checkpoint(step {self.step}: {plural(len(self.tensors), 'tensor')})"


def checkpoint_folder(config: LoopSettings) -> Path:
    """Return a concept's folder for checkpoints; a run uses that of its first concept."""
    return config.output / ".checkpoints"


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, then delete all but it and the ``keep - 1`` before it.

    Args:
        folder: Folder of the run's checkpoints; created if missing.
        checkpoint: The state to write.
        keep: Number of checkpoints in the folder afterwards.

    Returns:
        Path of the written file.

    Raises:
        TrainingError: A tensor is not finite; the folder is unchanged.
        StorageError: The file cannot be written; earlier checkpoints remain.
    """
    check_finite(checkpoint.step, checkpoint.tensors)
    path = folder / f"step-{checkpoint.step:06d}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _serialize(checkpoint))
        # Files of later steps are damaged or of a run that has started anew.
        paths = _checkpoint_files(folder)
        newest = paths[paths.index(path) :][: max(keep, 1)]
        for old in [*(path for path in paths if path not in newest), *folder.glob(".step-*")]:
            old.unlink(missing_ok=True)
    except OSError as error:
        description = f"the checkpoint of step {checkpoint.step}"
        fix = "allow writing there, then run again: training resumes from the latest checkpoint"
        raise storage_error(error, path, description, fix) from error
    return path


def check_finite(step: int, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights with NaN or infinite values.

    Raises:
        TrainingError: A value is not finite.
    """
    is_finite = [full_tensor(torch.isfinite(t).all()).cpu() for t in tensors.values()]
    if not all(map(bool, is_finite)):
        raise TrainingError(
            f"after step {step} the weights are no longer finite",
            fix="lower the learning rate, or train without fp16; earlier checkpoints are kept",
        )


def load_latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Load the newest undamaged checkpoint of a folder, with tensors on the CPU.

    Warns of damaged files and skips them. Returns None if there is no checkpoint.
    """
    for path in _checkpoint_files(folder):
        try:
            return _read_checkpoint(path)
        except Exception as error:  # parsers raise nearly anything on damaged data
            warnings.warn(
                one_line(f"the checkpoint {path} is damaged and skipped: {error}"), stacklevel=2
            )
    return None


def latest_step(folder: Path) -> int | None:
    """Return the step in the newest checkpoint's name; None if there is no checkpoint."""
    matches = [_NAME.fullmatch(path.name) for path in _checkpoint_files(folder)]
    return int(matches[0][1]) if matches and matches[0] else None


def delete_checkpoints(folder: Path) -> None:
    """Delete all checkpoints of a folder and the partial files of killed processes.

    Raises:
        StorageError: A file cannot be deleted.
    """
    try:
        for path in [*_checkpoint_files(folder), *folder.glob(".step-*")]:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"old checkpoints cannot be deleted: {error.strerror}",
            where=folder,
            fix="allow deleting there, or choose another output folder",
        ) from error


def settings_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe which settings differ, each with both values; empty if they are equal.

    The base's weights and configuration are compared if both runs know them.
    """
    before, now = rename_settings(before), rename_settings(json.loads(json.dumps(now)))
    missing = object()
    compared_apart = {BASE_WEIGHTS, BASE_CONFIG, JOINT_CONCEPTS, *IMAGE_SETTINGS}
    changes = [
        f"{key} was {format_value(before.get(key, 'not set'))} "
        f"and is {format_value(now.get(key, 'not set'))}"
        for key in sorted({*before, *now} - compared_apart)
        if before.get(key, missing) != now.get(key, missing)
    ]
    changes += [
        change
        for key, kind in IMAGE_SETTINGS.items()
        if (change := describe_changes(before.get(key), now.get(key), kind))
    ]
    old, new = before.get(JOINT_CONCEPTS, {}), now.get(JOINT_CONCEPTS, {})
    if old.keys() != new.keys():
        old_names, new_names = (", ".join(sorted(names)) or "none" for names in (old, new))
        changes.append(
            f"the concepts learned together with it were {old_names} and are {new_names}"
        )
    for name in sorted(old.keys() & new.keys()):
        changes += [
            f"{name}'s {change.removeprefix('the ')}"
            for change in settings_differences(old[name], new[name])
        ]
    old, new = before.get(BASE_CONFIG), now.get(BASE_CONFIG)
    if old is not None and new is not None:
        changes += [f"the base's {change}" for change in settings_differences(old, new)]
    old, new = before.get(BASE_WEIGHTS), now.get(BASE_WEIGHTS)
    if old and new and old != new:
        components = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        changes.append(f"the base's weights have changed ({', '.join(components)})")
    return changes


def check_settings_match(checkpoint: Checkpoint, settings: Mapping[str, Any], where: Path) -> None:
    """Refuse to resume with settings that differ from a checkpoint's.

    Raises:
        SettingsError: They differ; the message names each setting with both values.
    """
    changes = settings_differences(checkpoint.settings, settings)
    if changes:
        raise SettingsError(
            f"the checkpoint of step {checkpoint.step} was made with other settings: "
            + "; ".join(changes),
            where=where,
            fix="train with the previous settings, choose another output folder, or set resume "
            "to false (--no-resume) to start anew",
        )


def check_slices_match(checkpoint: Checkpoint, sketches: Mapping[str, Tensor], where: Path) -> None:
    """Refuse to resume in slices that differ from a checkpoint's by more than rounding.

    Args:
        checkpoint: The checkpoint to resume from.
        sketches: From :meth:`customize.training.trainable.Trainable.slice_sketches`.
        where: Folder of the checkpoint, for the error.

    Raises:
        SettingsError: They differ.
    """
    for name, now in sketches.items():
        before = checkpoint.tensors.get(name)
        if before is None:  # checkpoints of earlier versions have no sketches
            continue
        same_shape = before.shape == now.shape
        if not same_shape or bool(
            ((before - now).norm(dim=(1, 2)) > 0.05 * now.norm(dim=(1, 2))).any()
        ):
            raise SettingsError(
                f"the checkpoint of step {checkpoint.step} was made in slices that avoid other "
                "shared directions",
                where=where,
                fix="put the file .shared_directions-*.safetensors that was in the library, or "
                "beside the output folder, back there, or set resume to false to start anew",
            )


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named ``optimizer/<parameter name>/<key>``.

    Sharded ones are gathered by :func:`customize.training.sharded_tensors.gather_tensor`.
    """
    return {
        f"optimizer/{name}/{key}": gather_tensor(torch.as_tensor(value))
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Restore a state from :func:`optimizer_tensors` on each parameter's device."""
    for name, parameter in parameters.items():
        prefix = f"optimizer/{name}/"
        optimizer.state[parameter] = {
            key.removeprefix(prefix): shard_like(value, parameter)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }


def _serialize(checkpoint: Checkpoint) -> bytes:
    from safetensors.torch import save

    header = json.dumps(
        {
            "step": checkpoint.step,
            "settings": dict(checkpoint.settings),
            "history": checkpoint.history,
            "extra": dict(checkpoint.extra),
        }
    )
    tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
    return save(tensors, metadata={_HEADER: header, _DIGEST: _digest(header, tensors)})


def _read_checkpoint(path: Path) -> Checkpoint:
    from safetensors.torch import load

    # Read into memory, because a mapped file may be replaced while its tensors are in use.
    data = read_safetensors(path, _MAX_BYTES)
    tensors = load(data)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    # Checkpoints of earlier versions have no digest.
    if _DIGEST in metadata and metadata[_DIGEST] != _digest(metadata[_HEADER], tensors):
        raise ValueError("the digest differs from the content's")
    header = json.loads(metadata[_HEADER])
    types = {"step": int, "settings": dict, "history": list, "extra": dict}
    if not all(isinstance(header[key], type_) for key, type_ in types.items()):
        raise ValueError("the header has values of wrong types")
    return Checkpoint(
        header["step"], tensors, header["settings"], header["history"], header["extra"]
    )


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the header and the names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, newest first."""
    matches = [
        (match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for match, path in sorted(matches, key=lambda pair: -int(pair[0].group(1)))]
