"""What the package offers for training."""

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
        config: A YAML file of settings, or a ``customize.TrainConfig``; None: the settings are all
            there is.
        components: The parts of a pipeline in memory (``pipe.components``), left as they were;
            None: the base is loaded.
        pipeline_config: With components, ``pipe.config``.
        progress: Whether to show a bar.
        settings: Of :class:`customize.TrainConfig`, by name; they win over the file's.

    Raises:
        ConfigError: a setting is wrong; all that are wrong are named.
        DataError, PipelineError, SettingsError, StorageError, TrainingError, TrainingStopped: see
            :func:`customize.training.recipe.train`.
    """
    if isinstance(config, TrainConfig):
        if settings:
            given = config.model_dump(exclude_unset=True)
            if config.trigger == f"<{config.name}>":  # by default; of another name it is another
                del given["trigger"]
            config = TrainConfig(**{**given, **settings})
    elif config is None or isinstance(config, str | Path):
        config = load_config(config, **settings)
    else:
        raise ConfigError(
            f"a {type(config).__name__} is not a configuration",
            fix="give a YAML file, a TrainConfig, or settings by name: train(base=..., images=...)",
        )
    return recipe.train(config, components, progress, pipeline_config=pipeline_config)
