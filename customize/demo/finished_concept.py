"""Training that resumes, and loads what is finished, as both demos do it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from customize.errors import SettingsError

if TYPE_CHECKING:
    from customize.concepts.types import Concept
    from customize.training.config import TrainConfig


def train_or_load(config: TrainConfig, components: Mapping[str, Any], fix: str) -> Concept:
    """Train a concept, resume its training, or load it if it is finished.

    Args:
        config: Its settings.
        components: Components of the base pipeline.
        fix: What to do if its folder contains another concept.

    Raises:
        SettingsError: The folder contains a concept of other pictures or settings.
    """
    from customize.training.recipe import train

    try:
        return train(config, components)
    except SettingsError as error:
        raise SettingsError(error.problem, where=error.where, fix=fix) from None
