"""Where a run begins: anew, at a checkpoint, or at its end, where all is learned already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from customize.concepts.input_statistics import load_recorded_inputs
from customize.concepts.types import Concept
from customize.errors import ConceptError, SettingsError
from customize.training import checkpoint as checkpoints
from customize.training import run_metadata
from customize.training.checkpoint import Checkpoint
from customize.training.config import TrainConfig

#: What is known of each concept before -> the settings of each.
SettingsAfter = Callable[[Sequence[Mapping[str, Any] | None]], list[dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class ResumeState:
    """Where a run begins.

    Attributes:
        settings: of each concept, from :func:`customize.training.run_metadata.run_settings`.
        checkpoint: to go on from; None: anew.
        before: each concept's settings in the checkpoint.
        done: the concepts, where all are finished.
        saved: the concepts, where all are learned and saved, and a record is lacking that the
            settings ask for: the run was cut off while it was made.
    """

    settings: list[dict[str, Any]]
    checkpoint: Checkpoint | None = None
    before: list[Mapping[str, Any]] | None = None
    done: list[Concept] | None = None
    saved: list[Concept] | None = None


def checkpoint_folder(config: TrainConfig) -> Path:
    """The folder for checkpoints in a concept's; a run uses that of its first concept."""
    return config.output / ".checkpoints"


def find_resume_state(configs: Sequence[TrainConfig], settings_after: SettingsAfter) -> ResumeState:
    """Where a run begins, by what is in its concepts' folders.

    Raises:
        SettingsError: a folder holds a checkpoint or a finished concept of other settings, or of
            other concepts in the run.
    """
    if not configs[0].resume:
        return ResumeState(settings_after(run_metadata.split_joint_settings(None, configs)))
    folder = checkpoint_folder(configs[0])
    found = checkpoints.load_latest_checkpoint(folder)
    finished = [run_metadata.read_finished_concept(config) for config in configs]
    before = run_metadata.split_joint_settings(found.settings if found else None, configs)
    settings = settings_after(before)
    goes_on = found is not None and not checkpoints.settings_differences(
        found.settings, settings[0]
    )
    if found is not None and goes_on and not _all_of_run(finished, found, settings):
        # Some may be finished and not of this run, which is to replace them and was cut off.
        return ResumeState(settings, found, [each or {} for each in before])
    done = [concept for concept in finished if concept is not None]
    if done:
        then = done[0].info.training.get("settings")
        own = settings_after(
            run_metadata.split_joint_settings(then if isinstance(then, dict) else None, configs)
        )
        for config, concept, now in zip(configs, finished, own, strict=True):
            if concept is not None:
                saved = found.settings if found and config is configs[0] else None
                run_metadata.check_finished_settings(concept, now, config, saved)
        if len(done) == len(configs):
            if all(map(has_recorded_inputs, configs, done)):
                return ResumeState(own, done=done)
            return ResumeState(own, before=[*own], saved=done)
    if found is not None:
        checkpoints.check_settings_match(found, settings[0], folder)
    for config in configs[1:]:
        other = checkpoint_folder(config)
        if checkpoints.latest_step(other) is not None:
            raise SettingsError(
                f"a checkpoint of another run with {config.name} is there",
                where=other,
                fix="choose another output folder, or set resume to false (--no-resume) to start "
                "anew",
            )
    return ResumeState(settings)


def has_recorded_inputs(config: TrainConfig, concept: Concept) -> bool:
    """Whether the record of layer inputs that the settings ask for is there, whole, and of this
    concept."""
    if not config.record_inputs:
        return True
    try:
        return load_recorded_inputs(concept.info.name, concept.updates, config.output) is not None
    except ConceptError:
        return False


def _all_of_run(
    finished: Sequence[Concept | None], found: Checkpoint, settings: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether all concepts are finished, and of the run that a checkpoint is of."""
    trained = [each and each.info.training.get("settings") for each in finished]
    then = [run_metadata.without_image_names(found.settings), *settings[1:]]
    return all(
        isinstance(own, dict) and not checkpoints.settings_differences(own, now)
        for own, now in zip(trained, then, strict=True)
    )
