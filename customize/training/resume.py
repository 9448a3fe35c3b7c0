"""Finding where a run starts: at the first step, at a checkpoint, or finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from customize.concepts.input_statistics import load_recorded_inputs
from customize.concepts.types import Concept
from customize.errors import ConceptError, SettingsError
from customize.training.checkpoint import (
    Checkpoint,
    check_settings_match,
    checkpoint_folder,
    latest_step,
    load_latest_checkpoint,
    settings_differences,
)
from customize.training.config import TrainConfig
from customize.training.run_metadata import (
    check_finished_settings,
    read_finished_concept,
    split_joint_settings,
    without_image_names,
)

#: Settings of each concept in an earlier run, if known -> settings of each concept in this run.
SettingsAfter = Callable[[Sequence[Mapping[str, Any] | None]], list[dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class ResumeState:
    """Where a run starts.

    Attributes:
        settings: Settings of each concept, from
            :func:`customize.training.run_metadata.run_settings`.
        checkpoint: Checkpoint to resume from; None: start at the first step.
        previous: Each concept's settings in the checkpoint or the saved concept.
        finished: The concepts, if all are finished.
        saved: The concepts, if all are saved but a layer input recording of the settings is
            missing, because the run ended while it was made.
    """

    settings: list[dict[str, Any]]
    checkpoint: Checkpoint | None = None
    previous: list[Mapping[str, Any]] | None = None
    finished: list[Concept] | None = None
    saved: list[Concept] | None = None


def find_resume_state(configs: Sequence[TrainConfig], settings_after: SettingsAfter) -> ResumeState:
    """Find where a run starts from the files in its concepts' folders.

    Args:
        configs: Settings of each concept.
        settings_after: Returns the settings that the result depends on.

    Raises:
        SettingsError: A folder contains a checkpoint or a finished concept of other settings, or of
            a run with other concepts.
    """
    if not configs[0].resume:
        return ResumeState(settings_after(split_joint_settings(None, configs)))
    folder = checkpoint_folder(configs[0])
    checkpoint = load_latest_checkpoint(folder)
    concepts = [read_finished_concept(config) for config in configs]
    previous = split_joint_settings(checkpoint.settings if checkpoint else None, configs)
    settings = settings_after(previous)
    if (
        checkpoint is not None
        and not settings_differences(checkpoint.settings, settings[0])
        and not _are_of_run(concepts, checkpoint, settings)
    ):
        # Finished concepts may be of an earlier run, which this one was replacing when it ended.
        return ResumeState(settings, checkpoint, [values or {} for values in previous])
    finished = [concept for concept in concepts if concept is not None]
    if finished:
        stored = finished[0].info.training.get("settings")
        stored_settings = stored if isinstance(stored, dict) else None
        current = settings_after(split_joint_settings(stored_settings, configs))
        for config, concept, values in zip(configs, concepts, current, strict=True):
            if concept is not None:
                saved = checkpoint.settings if checkpoint and config is configs[0] else None
                check_finished_settings(concept, values, config, saved)
        if len(finished) == len(configs):
            if all(map(has_recorded_inputs, configs, finished)):
                return ResumeState(current, finished=finished)
            return ResumeState(current, previous=[*current], saved=finished)
    if checkpoint is not None:
        check_settings_match(checkpoint, settings[0], folder)
    for config in configs[1:]:
        other_folder = checkpoint_folder(config)
        if latest_step(other_folder) is not None:
            raise SettingsError(
                f"the output folder holds a checkpoint of another run with {config.name}",
                where=other_folder,
                fix="choose another output folder, or set resume to false (--no-resume) to start "
                "anew",
            )
    return ResumeState(settings)


def has_recorded_inputs(config: TrainConfig, concept: Concept) -> bool:
    """Whether the layer input recording of the settings is complete and of this concept."""
    if not config.record_inputs:
        return True
    try:
        return load_recorded_inputs(concept.info.name, concept.updates, config.output) is not None
    except ConceptError:
        return False


def _are_of_run(
    concepts: Sequence[Concept | None],
    checkpoint: Checkpoint,
    settings: Sequence[Mapping[str, Any]],
) -> bool:
    """Whether all concepts are finished by the run of the checkpoint."""
    trained = [concept and concept.info.training.get("settings") for concept in concepts]
    expected = [without_image_names(checkpoint.settings), *settings[1:]]
    return all(
        isinstance(stored, dict) and not settings_differences(stored, values)
        for stored, values in zip(trained, expected, strict=True)
    )
