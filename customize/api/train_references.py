"""``customize.train_references``: learn to read groups of reference images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from customize.errors import ConfigError
from customize.references.model import ReferenceModel
from customize.training.references import recipe
from customize.training.references.config import ReferenceTrainConfig, load_reference_config
from customize.training.references.group_dataset import GroupDataset


def train_references(
    config: ReferenceTrainConfig | str | Path | None = None,
    *,
    components: Mapping[str, Any] | None = None,
    pipeline_config: Mapping[str, Any] | None = None,
    dataset: GroupDataset | None = None,
    model: ReferenceModel | None = None,
    progress: bool = True,
    **settings: Any,
) -> ReferenceModel:
    """Train one stage of references on groups of images, save them and return them.

    ::

        customize.train_references(
            base="BASE", images="groups", mllm="Qwen2-VL", stage="alignment", output="refs/1"
        )
        customize.train_references(
            base="BASE", images="groups", init="refs/1", stage="single", output="refs/2"
        )

    Args:
        config: A YAML file of settings, or a ``ReferenceTrainConfig``; None: ``settings`` alone.
        components: Components of a pipeline in memory (``pipe.components``), which are left
            unchanged; None: the base is loaded.
        pipeline_config: With ``components``, ``pipe.config``.
        dataset: Samples instead of ``images``; see
            :class:`customize.training.references.group_dataset.GroupDataset`.
        model: References in memory instead of ``init``; trained in place.
        progress: Whether to show a progress bar.
        settings: Settings of :class:`customize.training.references.config.ReferenceTrainConfig`,
            by name; they override the file's.

    Raises:
        ConfigError: A setting is invalid; the message names all invalid ones.
        DataError, PipelineError, SettingsError, StorageError, TrainingError, TrainingStopped: See
            :func:`customize.training.references.recipe.train_references`.
    """
    if isinstance(config, ReferenceTrainConfig):
        if settings:
            config = ReferenceTrainConfig(**{**config.model_dump(exclude_unset=True), **settings})
    elif config is None or isinstance(config, str | Path):
        config = load_reference_config(config, **settings)
    else:
        raise ConfigError(
            f"a {type(config).__name__} is not a configuration",
            where="config",
            fix="give a YAML file, a ReferenceTrainConfig, or settings by name: "
            "train_references(base=..., images=...)",
        )
    return recipe.train_references(
        config, components, dataset, model, progress, pipeline_config=pipeline_config
    )
