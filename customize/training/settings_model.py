"""What the settings of all trainings share: conversion of values, and errors as ConfigError."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from customize.errors import ConfigError
from customize.training.config_validation import config_error
from customize.training.field_values import normalize_value

#: Experiment trackers of accelerate.
Tracker = Literal[
    "none",
    "tensorboard",
    "wandb",
    "trackio",
    "comet_ml",
    "aim",
    "mlflow",
    "clearml",
    "dvclive",
    "swanlab",
]

S = TypeVar("S", bound="SettingsModel")


class SettingsModel(BaseModel):
    """Settings of a training; each field is also a YAML key and a command-line flag."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __repr_args__(self) -> Any:
        fields = type(self).model_fields
        return [(n, v) for n, v in super().__repr_args__() if v != fields[str(n)].default]

    @classmethod
    def _complete(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the settings by their current names, with those that others imply."""
        return settings

    @model_validator(mode="wrap")
    @classmethod
    def _raise_config_error(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, dict):
            data = cls._complete(data)
        try:
            return handler(data)
        except ValidationError as error:
            raise config_error(error, cls.model_fields) from None

    @field_validator("*", mode="before")
    @classmethod
    def _normalize(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        annotation = cls.model_fields[name].annotation
        return normalize_value(name, value, (annotation, *get_args(annotation)))


def build_settings(model: type[S], settings: Mapping[str, Any], where: Path | str | None) -> S:
    """Validate settings.

    Args:
        model: The class of the settings.
        settings: Field -> value.
        where: Source of the settings, for the error.

    Raises:
        ConfigError: A setting is invalid.
    """
    try:
        return model(**settings)
    except ConfigError as error:
        raise ConfigError(error.problem, where=where, fix=error.fix) from None
