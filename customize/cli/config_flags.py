"""The flags of trainings, generated from the fields of their settings."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from customize.training.config import TrainConfig
from customize.training.settings_file import RENAMED_SETTINGS

#: The first field of each group -> the group's title, in the order of TrainConfig.
GROUPS = {
    "base": "Concept and data",
    "method": "Adapter",
    "train_text_encoder": "Text encoder and tokens",
    "steps": "Optimization",
    "preserve": "Class preservation",
    "mixed_precision": "Precision and device",
    "checkpoint_every": "Checkpoints, samples and logs",
}


def add_config_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command(config, together, settings)`` a flag for each field of TrainConfig.

    Values arrive as text (booleans as bool, repeated flags as lists), and only those that the user
    typed, so that TrainConfig validates them and they override a configuration file. Hidden flags
    accept the former names of settings with a warning.
    """

    def run(config: Path | None = None, together: list[Path] | None = None, **values: Any) -> None:
        settings = {name: value for name, value in values.items() if value not in (None, [], ())}
        for old in RENAMED_SETTINGS.keys() & settings.keys():
            warnings.warn(
                f"{_option(old)} is now called {_option(RENAMED_SETTINGS[old])}", stacklevel=2
            )
        command(config, together or [], settings)

    annotations: dict[str, Any] = {
        "config": Annotated[Path | None, CONFIG_OPTION],
        "together": Annotated[list[Path] | None, _TOGETHER],
    }
    annotations |= setting_flags(TrainConfig.model_fields, GROUPS)
    for old, new in RENAMED_SETTINGS.items():
        annotations[old] = _flag(old, TrainConfig.model_fields[new], "", hidden=True)
    return with_flags(run, command, annotations)


def add_flags(
    fields: Mapping[str, FieldInfo], groups: Mapping[str, str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give ``command(config, settings)`` a flag for each field.

    Args:
        fields: Setting -> field.
        groups: First setting of each group -> title of the group in the help.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(config: Path | None = None, **values: Any) -> None:
            command(config, {name: v for name, v in values.items() if v not in (None, [], ())})

        annotations: dict[str, Any] = {"config": Annotated[Path | None, CONFIG_OPTION]}
        return with_flags(run, command, annotations | setting_flags(fields, groups))

    return decorate


def setting_flags(fields: Mapping[str, FieldInfo], groups: Mapping[str, str]) -> dict[str, Any]:
    """Return setting -> annotation of its flag.

    Args:
        fields: Setting -> field.
        groups: First setting of each group -> title of the group in the help.
    """
    flags, group = {}, ""
    for name, field in fields.items():
        group = groups.get(name, group)
        flags[name] = _flag(name, field, group)
    return flags


def with_flags(
    run: Callable[..., None], command: Callable[..., None], annotations: Mapping[str, Any]
) -> Callable[..., None]:
    """Give a function flags, and the name and help of a command.

    Args:
        run: Takes the flags as keyword arguments.
        command: The command.
        annotations: Argument -> annotation; all default to None.
    """
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in annotations.items()
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = dict(annotations)
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


CONFIG_OPTION = typer.Option(
    "--config",
    metavar="FILE",
    help="YAML file with the settings below as keys; flags override it",
    rich_help_panel="Configuration files",
    show_default=False,
)
_TOGETHER = typer.Option(
    "--together",
    metavar="FILE",
    help="YAML file of another concept to train in the same run, with its own name, class_word,"
    " images and output. All other settings are shared, and flags override both files. Repeatable",
    rich_help_panel="Configuration files",
    show_default=False,
)


def _option(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def _flag(name: str, field: FieldInfo, group: str, hidden: bool = False) -> Any:
    types = _plain_types(field.annotation)
    option = _option(name)
    text = field.description or name
    if field.is_required():
        text += " [required]"
    elif isinstance(field.default, bool):
        text += f" [default: {'yes' if field.default else 'no'}]"
    elif field.default not in (None, "", (), {}):
        text += f" [default: {_format_default(field.default)}]"
    settings: dict[str, Any] = {
        "help": text,
        "rich_help_panel": group,
        "show_default": False,
        "hidden": hidden,
    }
    if bool in types:
        no = "--no-" + name.replace("_", "-")
        return Annotated[bool | None, typer.Option(f"{option}/{no}", **settings)]
    settings["metavar"] = "NAME=X" if dict in types else _metavar(field)
    if dict in types:
        return Annotated[list[str] | None, typer.Option(option, **settings)]
    if tuple in types:
        settings["help"] += ". Repeatable"
        return Annotated[list[str] | None, typer.Option(option, **settings)]
    return Annotated[str | None, typer.Option(option, **settings)]


def _format_default(default: Any) -> str:
    """The default as a user would type it."""
    if isinstance(default, dict):
        return ",".join(f"{name}={value:g}" for name, value in default.items())
    return str(default)


def _metavar(field: FieldInfo) -> str:
    for annotation in (field.annotation, *get_args(field.annotation)):
        if get_origin(annotation) is Literal:
            choices = "|".join(map(str, get_args(annotation)))
            return choices if len(choices) <= 40 else "NAME"
    names = {int: "N", float: "X", Path: "PATH"}
    return next((names[kind] for kind in _plain_types(field.annotation) if kind in names), "TEXT")


def _plain_types(annotation: Any) -> set[Any]:
    """The plain types within an annotation: float and NoneType in ``float | None``."""
    inner = get_args(annotation) if get_origin(annotation) is not Literal else ()
    containers = {get_origin(annotation)} & {tuple, dict}
    if inner:
        return containers.union(*map(_plain_types, inner))
    return containers | {annotation}
