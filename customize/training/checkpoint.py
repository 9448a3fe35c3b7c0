"""Checkpoints of a training run: one safetensors file each, written whole or not at all.

A file ``step-000200.safetensors`` holds all that training changes (the adapter, the tokens, the
optimizer's moments) and, in its header, the step, the losses so far and the settings that the
result depends on. Files appear by a rename, so a process killed at any moment leaves only whole
ones, and names that begin with a dot, which nobody reads.
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
from customize.text import one_line
from customize.training.data.changed_images import IMAGE_SETTINGS, describe_changes
from customize.training.field_values import format_value
from customize.training.settings_file import rename_settings

_NAME = re.compile(r"step-(\d{6,})\.safetensors")
_HEADER, _DIGEST = "customize_checkpoint", "customize_checkpoint_sha256"
_MAX_BYTES = 4 * MAX_SAFETENSORS_BYTES  # the optimizer's moments beside what is learned
#: Among a run's settings: component -> digest, from
#: :func:`customize.training.base_fingerprint.weight_digests`.
BASE_WEIGHTS = "base_weights"
#: Among them: what the avoided directions go by.
SHARED_DIRECTIONS = "shared_directions"
#: Among them: from :func:`customize.training.base_fingerprint.base_configuration`.
BASE_CONFIG = "base_config"
#: Among them, where several concepts are learned together: name of each other -> its own settings.
JOINT_CONCEPTS = "together"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a run after some step.

    Attributes:
        step: optimizer steps done.
        tensors: name -> tensor, on any device; all that is needed to go on bit for bit.
        settings: JSON values; a run may go on from here only if its own are equal.
        history: [step, loss] pairs so far, for the concept's facts.
        extra: other JSON values, such as the loss scaler's state.
    """

    step: int
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    history: list[list[float]] = field(default_factory=list)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Checkpoint(step {self.step}: {len(self.tensors)} tensors)"


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, then delete all but it and the ``keep - 1`` before it.

    Raises:
        TrainingError: a tensor is not finite: such a state is worse than none. Nothing changes.
        StorageError: it cannot be written. The earlier ones are still there.
    """
    check_finite(checkpoint.step, checkpoint.tensors)
    path = folder / f"step-{checkpoint.step:06d}.safetensors"
    try:
        write_whole(path, _packed(checkpoint))
        # What stands at a later step was passed over as damaged, or is of a run that began anew.
        found = _steps(folder)
        late, kept = found[: found.index(path)], found[found.index(path) :][: max(keep, 1)]
        # Beside the old ones go the partial files of killed processes.
        for old in [*late, *(p for p in found if p not in kept), *folder.glob(".step-*")]:
            old.unlink(missing_ok=True)
    except OSError as error:
        what = f"the checkpoint of step {checkpoint.step}"
        fix = "allow writing there, then run again: training goes on from the latest checkpoint"
        raise storage_error(error, path, what, fix) from error
    return path


def check_finite(step: int, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not finite: such a state is worse than none.

    Raises:
        TrainingError: a number is NaN or infinite.
    """
    finite = [torch.isfinite(tensor).all().cpu() for tensor in tensors.values()]
    if not all(map(bool, finite)):
        raise TrainingError(
            f"after step {step} the weights are no longer finite",
            fix="lower the learning rate, or train without fp16; earlier checkpoints are kept",
        )


def load_latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in a folder; None if there is none. Damaged ones are passed over.

    Tensors are on the CPU.
    """
    for path in _steps(folder):
        try:
            return _read(path)
        except Exception as error:  # whatever a parser may raise on damaged bytes
            warnings.warn(
                one_line(f"the checkpoint {path} is damaged and passed over: {error}"), stacklevel=2
            )
    return None


def latest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint's name; None where there is none."""
    names = [_NAME.fullmatch(path.name) for path in _steps(folder)]
    return int(names[0][1]) if names and names[0] else None


def delete_checkpoints(folder: Path) -> None:
    """Delete all checkpoints of a folder, and what killed processes left there.

    Raises:
        StorageError: one cannot be deleted.
    """
    try:
        for path in [*_steps(folder), *folder.glob(".step-*")]:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"old checkpoints cannot be deleted: {error.strerror}",
            where=folder,
            fix="allow deleting there, or choose another output folder",
        ) from error


def settings_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which settings differ, each with both values, in words; empty if none does.

    The base's weights and configuration count where both know them.
    """
    before, now = rename_settings(before), rename_settings(json.loads(json.dumps(now)))
    missing = object()
    found = [
        f"{key} was {format_value(before.get(key, 'not set'))} "
        f"and is {format_value(now.get(key, 'not set'))}"
        for key in sorted(
            {*before, *now} - {BASE_WEIGHTS, BASE_CONFIG, JOINT_CONCEPTS, *IMAGE_SETTINGS}
        )
        if before.get(key, missing) != now.get(key, missing)
    ]
    pictures = (
        describe_changes(before.get(key), now.get(key), what)
        for key, what in IMAGE_SETTINGS.items()
    )
    found += [told for told in pictures if told]
    old, new = before.get(JOINT_CONCEPTS, {}), now.get(JOINT_CONCEPTS, {})
    if old.keys() != new.keys():
        was, is_ = (", ".join(sorted(each)) or "none" for each in (old, new))
        found.append(f"the concepts learned together with it were {was} and are {is_}")
    for name in sorted(old.keys() & new.keys()):
        own = settings_differences(old[name], new[name])
        found += [f"{name}'s {change.removeprefix('the ')}" for change in own]
    old, new = before.get(BASE_CONFIG), now.get(BASE_CONFIG)
    if old is not None and new is not None:
        found += [f"the base's {change}" for change in settings_differences(old, new)]
    old, new = before.get(BASE_WEIGHTS), now.get(BASE_WEIGHTS)
    if old and new and old != new:
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        found.append(f"the base's weights have changed ({', '.join(changed)})")
    return found


def check_settings_match(checkpoint: Checkpoint, settings: Mapping[str, Any], where: Path) -> None:
    """Refuse to go on with other settings than a checkpoint's.

    Raises:
        SettingsError: they differ; the message names each field with both values.
    """
    found = settings_differences(checkpoint.settings, settings)
    if found:
        raise SettingsError(
            f"the checkpoint of step {checkpoint.step} was made with other settings: "
            + "; ".join(found),
            where=where,
            fix="train with the settings of before, choose another output folder, or set resume "
            "to false (--no-resume) to start anew",
        )


def check_slices_match(checkpoint: Checkpoint, sketches: Mapping[str, Tensor], where: Path) -> None:
    """Refuse to go on in other columns than a checkpoint's.

    Args:
        sketches: from :meth:`customize.training.trainable.Trainable.slice_sketches`.

    Raises:
        SettingsError: they differ by more than rounding.
    """
    for name, now in sketches.items():
        before = checkpoint.tensors.get(name)
        if before is None:  # of an earlier version, which notes none
            continue
        same = before.shape == now.shape
        if not same or bool(((before - now).norm(dim=(1, 2)) > 0.05 * now.norm(dim=(1, 2))).any()):
            raise SettingsError(
                f"the checkpoint of step {checkpoint.step} was made in slices that avoid other "
                "shared directions",
                where=where,
                fix="put the file .shared_directions-*.safetensors that was in the library, or "
                "beside the output folder, back there, or set resume to false to start anew",
            )


def capture_state(
    step: int,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    settings: Mapping[str, Any],
    history: list[list[float]],
    sketches: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """The state of a run after a step; it shares memory with what trains.

    Args:
        sketches: of what does not train; see :func:`check_slices_match`.
    """
    tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    tensors |= sketches or {}
    tensors |= optimizer_tensors(optimizer, parameters)
    return Checkpoint(step, tensors, settings, history, {"scaler": scaler.state_dict()})


@torch.no_grad()
def restore_state(
    start: Checkpoint,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Put a state from :func:`capture_state` back, on each parameter's device."""
    for name, parameter in parameters.items():
        parameter.copy_(start.tensors[name])
    restore_optimizer(optimizer, parameters, start.tensors)
    scaler.load_state_dict(dict(start.extra["scaler"]))


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, torch.nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's state as tensors: ``optimizer/<parameter name>/<entry>``."""
    return {
        f"optimizer/{name}/{entry}": torch.as_tensor(value)
        for name, parameter in names.items()
        for entry, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put a state from :func:`optimizer_tensors` back, on each parameter's device."""
    for name, parameter in names.items():
        prefix = f"optimizer/{name}/"
        optimizer.state[parameter] = {
            key.removeprefix(prefix): value.to(parameter.device, copy=True)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there wholly or not at all, even after a power cut.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)


def _packed(checkpoint: Checkpoint) -> bytes:
    from safetensors.torch import save as to_bytes

    facts = {
        "step": checkpoint.step,
        "settings": dict(checkpoint.settings),
        "history": checkpoint.history,
        "extra": dict(checkpoint.extra),
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
    text = json.dumps(facts)
    return to_bytes(tensors, metadata={_HEADER: text, _DIGEST: _digest(text, tensors)})


def _read(path: Path) -> Checkpoint:
    from safetensors.torch import load

    # Read into memory: a mapped file is cut from under the tensors when it is replaced.
    data = read_safetensors(path, _MAX_BYTES)
    tensors = load(data)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])["__metadata__"]
    # Checkpoints of earlier versions have no digest.
    if _DIGEST in header and header[_DIGEST] != _digest(header[_HEADER], tensors):
        raise ValueError("its content is not what was written")
    facts = json.loads(header[_HEADER])
    kinds = {"step": int, "settings": dict, "history": list, "extra": dict}
    if not all(isinstance(facts[name], kind) for name, kind in kinds.items()):
        raise ValueError("its facts are of wrong types")
    return Checkpoint(facts["step"], tensors, facts["settings"], facts["history"], facts["extra"])


def _digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the facts, and names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _steps(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, newest first."""
    found = [
        (match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for match, path in sorted(found, key=lambda pair: -int(pair[0].group(1)))]
