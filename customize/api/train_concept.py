"""``customize.train``: learn a concept from pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from customize.concepts.types import Concept
from customize.errors import ConfigError
from customize.training import recipe
from customize.training.config import TrainConfig, load_config


def train(
    config: TrainConfig | str | Path | None = None,
    *,
    components: Mapping[str, Any] | None = None,
    pipeline_config: Mapping[str, Any] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Concept:
    """Learn a concept from a folder of pictures, save it and return it.

    ::

        rex = customize.train(
            base="BASE", images="photos", output="concepts/rex", name="rex", class_word="dog"
        )

    Args:
        config: A YAML file of settings, or a ``customize.TrainConfig``; None: ``settings`` alone.
        components: Components of a pipeline in memory (``pipe.components``), which are left
            unchanged; None: the base is loaded.
        pipeline_config: With ``components``, ``pipe.config``.
        progress: Whether to show a progress bar.
        settings: Settings of :class:`customize.TrainConfig`, by name; they override the file's.

    Raises:
        ConfigError: A setting is invalid; the message names all invalid ones.
        DataError, PipelineError, SettingsError, StorageError, TrainingError, TrainingStopped: See
            :func:`customize.training.recipe.train`.
    """
    if isinstance(config, TrainConfig):
        if settings:
            values = config.model_dump(exclude_unset=True)
            if config.trigger == f"<{config.name}>":  # the default, which follows a new name
                del values["trigger"]
            config = TrainConfig(**{**values, **settings})
    elif config is None or isinstance(config, str | Path):
        config = load_config(config, **settings)
    else:
        raise ConfigError(
            f"a {type(config).__name__} is not a configuration",
            where="config",
            fix="give a YAML file, a TrainConfig, or settings by name: train(base=..., images=...)",
        )
    return recipe.train(config, components, progress, pipeline_config=pipeline_config)
