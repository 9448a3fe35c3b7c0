"""The declaration of a method that trains rewriters: its data, defaults, settings and trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from customize.rewriting.load_model import TrainedSettings
    from customize.rewriting.local_model import LocalModel


@dataclass(frozen=True)
class RewriterRun:
    """What a method prepares a training from.

    Attributes:
        config: The :class:`customize.training.rewriting.config.RewriterTrainConfig`.
        rows: Number of a line of the data -> its fields, those of the method.
        model: The language model without a LoRA.
        settings: Its instructions and number of tokens.
        resources: Closes what the method opens, when the training ends.
    """

    config: Any
    rows: Mapping[int, Mapping[str, str]]
    model: LocalModel
    settings: TrainedSettings
    resources: ExitStack


@dataclass(frozen=True)
class TrainerParts:
    """What trl trains with, besides what all methods share.

    Attributes:
        texts: The rows of trl's dataset.
        trainer: Class of the trainer.
        arguments: Class of its arguments.
        options: Arguments that only this method has.
        keywords: Keywords of the trainer that only this method has.
    """

    texts: list[dict[str, str]]
    trainer: Any
    arguments: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    keywords: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingMethod:
    """A method that trains rewriters.

    Attributes:
        name: The name that users type.
        summary: What it does, for help texts: a phrase without a final period.
        fields: Fields of each row of the data, the user's ``prompt`` first.
        learning_rate: The default learning rate.
        prepare: Returns the parts of the trainer. It writes nothing, and raises ConfigError for
            rows and settings that the trainer would change or fail on.
        beta: The default weight of the distance to the reference model; None: it has none.
        settings: Settings of RewriterTrainConfig that not all methods have, besides ``beta``.
        required: Those of them that have no default.
    """

    name: str
    summary: str
    fields: tuple[str, ...]
    learning_rate: float
    prepare: Callable[[RewriterRun], TrainerParts] = field(repr=False)
    beta: float | None = None
    settings: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
