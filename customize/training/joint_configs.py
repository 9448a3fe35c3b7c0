"""Configurations of several concepts in one run, with per-concept and shared settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

from customize.errors import ConfigError
from customize.safe_read import as_path, real_path
from customize.training.config import TrainConfig, build_config, load_config
from customize.training.config_validation import Problem, join_problems
from customize.training.field_values import contains_trigger, format_value
from customize.training.settings_file import read_yaml, rename_settings

#: Settings that may differ between the concepts of a run; all others are shared.
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
    """Load the configurations of a run's concepts, each from a YAML file of its own.

    Args:
        path: File of the first concept; see :func:`customize.training.config.load_config`.
        others: Files of the other concepts. Shared settings default to those of the first concept,
            and shared overrides take precedence over the files.
        overrides: Settings that replace those of the first file.

    Raises:
        ConfigError: See ``load_config`` and :func:`check_joint_configs`.
    """
    configs = [load_config(path, **overrides)]
    if others:
        overrides = rename_settings(overrides)
        first = ({} if path is None else read_yaml(as_path(path, "path"))) | overrides
        for other in others:
            settings = (
                _shared_settings(first) | read_yaml(Path(other)) | _shared_settings(overrides)
            )
            configs.append(build_config(settings, other))
    check_joint_configs(configs)
    return configs


def check_joint_configs(configs: Sequence[TrainConfig]) -> None:
    """Check that concepts can be learned in one run.

    Raises:
        ConfigError: There is no concept, a shared setting differs between concepts, or names,
            triggers, slices or output folders of two concepts are equal or nested. The error lists
            all problems.
    """
    if not configs:
        raise ConfigError("there is no concept to learn", fix="give at least one configuration")
    first = configs[0]
    problems = [
        Problem(
            field,
            f"{field} belongs to the run, but is {format_value(getattr(first, field))} for "
            f"{first.name} and {format_value(getattr(other, field))} for {other.name}",
            "give both the same value",
        )
        for other in configs[1:]
        for field in TrainConfig.model_fields
        if field not in PER_CONCEPT_SETTINGS and getattr(other, field) != getattr(first, field)
    ]
    for a, b in combinations(configs, 2):
        problems += [
            Problem(
                field,
                f"{field} is {format_value(getattr(a, field))} for two concepts",
                "give each its own",
            )
            for field in ("name", "trigger", "slice")
            if getattr(a, field) is not None and getattr(a, field) == getattr(b, field)
        ]
        output_a, output_b = real_path(a.output), real_path(b.output)
        if output_a.is_relative_to(output_b) or output_b.is_relative_to(output_a):
            problems.append(
                Problem(
                    "output",
                    f"output is {format_value(a.output)} for {a.name} and "
                    f"{format_value(b.output)} for {b.name}: neither folder may be inside the"
                    " other",
                    "choose separate folders",
                )
            )
    for a, b in permutations(configs, 2):
        problems += [
            Problem(
                field,
                f"{field} of {a.name} has the trigger of {b.name}, which only captions may have",
                "leave the trigger out there",
            )
            for field in ("class_word", "prior_prompt")
            if a.trigger != b.trigger and contains_trigger(getattr(a, field) or "", b.trigger)
        ]
    if problems:
        raise join_problems(problems)


def _shared_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in settings.items() if field not in PER_CONCEPT_SETTINGS}
