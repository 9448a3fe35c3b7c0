"""Several concepts in one run: which settings each has for itself, and which the run has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

from customize.errors import ConfigError
from customize.safe_read import real_path
from customize.training.config import TrainConfig, build_config, load_config
from customize.training.config_validation import join_problems
from customize.training.field_values import contains_trigger, format_value
from customize.training.settings_file import read_yaml, rename_settings

#: The settings that each concept of a run has for itself; all others belong to the run.
PER_CONCEPT_SETTINGS = frozenset(
    {
        *("images", "masks", "caption", "output", "name", "trigger", "class_word", "token_init"),
        *("slice", "preserve_phrases", "prior_images", "prior_count", "prior_prompt"),
        *("validation_prompts", "validation_every"),
    }
)


def load_configs(
    path: Path | str | None, others: Sequence[Path | str], **overrides: Any
) -> list[TrainConfig]:
    """The configurations of a run's concepts, each from a YAML file of its own.

    Args:
        path, overrides: of the first, as for :func:`customize.training.config.load_config`.
        others: files of the other concepts. Of what belongs to the run they may leave out what
            the first has, and the overrides win over them.

    Raises:
        ConfigError: as ``load_config`` and :func:`check_joint_configs`.
    """
    configs = [load_config(path, **overrides)]
    if others:
        overrides = rename_settings(overrides)
        given = ({} if path is None else read_yaml(Path(path))) | overrides
        for other in others:
            settings = _of_the_run(given) | read_yaml(Path(other)) | _of_the_run(overrides)
            configs.append(build_config(settings, other))
    check_joint_configs(configs)
    return configs


def check_joint_configs(configs: Sequence[TrainConfig]) -> None:
    """See that concepts can be learned in one run.

    Raises:
        ConfigError: there is none, a setting of the run differs between them, or what is each
            one's own is another's as well; the error lists all that is wrong.
    """
    if not configs:
        raise ConfigError("there is no concept to learn", fix="give at least one configuration")
    first = configs[0]
    problems = [
        f"{field} belongs to the run, but is {format_value(getattr(first, field))} for "
        f"{first.name} and {format_value(getattr(other, field))} for {other.name}"
        for other in configs[1:]
        for field in TrainConfig.model_fields
        if field not in PER_CONCEPT_SETTINGS and getattr(other, field) != getattr(first, field)
    ]
    for a, b in combinations(configs, 2):
        problems += [
            f"{field} is {format_value(getattr(a, field))} for two concepts"
            for field in ("name", "trigger", "slice")
            if getattr(a, field) is not None and getattr(a, field) == getattr(b, field)
        ]
        ours, theirs = real_path(a.output), real_path(b.output)
        if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
            problems.append(
                f"output is {format_value(a.output)} for {a.name} and {format_value(b.output)} for "
                f"{b.name}: each needs a folder of its own, outside of the other's"
            )
    for a, b in permutations(configs, 2):
        problems += [
            f"{field} of {a.name} has the trigger of {b.name}, which only captions may have"
            for field in ("class_word", "prior_prompt")
            if a.trigger != b.trigger and contains_trigger(getattr(a, field) or "", b.trigger)
        ]
    if problems:
        raise ConfigError(join_problems(problems))


def _of_the_run(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in settings.items() if field not in PER_CONCEPT_SETTINGS}
