"""The flags of ``customize train``, made from the fields of TrainConfig: names, help, defaults."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from customize.near_names import find_near_names
from customize.training.config import TrainConfig
from customize.training.settings_file import RENAMED_SETTINGS

# The first field of each group, in the order of TrainConfig. A new field joins the group it
# stands in, without a change here.
PANELS = {
    "base": "Concept and data",
    "method": "Adapter",
    "train_text_encoder": "Text encoder and tokens",
    "steps": "Optimization",
    "preserve": "Class preservation",
    "mixed_precision": "Precision and device",
    "checkpoint_every": "Checkpoints, samples and logs",
}


def add_config_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command(config, together, settings)`` a flag for each field.

    Values reach it as text (yes or no as bool, lists as lists) and only those that were given,
    so that TrainConfig alone decides what is valid, and what a configuration file overrides. Flags
    by the names of earlier versions still work, with a note, and are not in the help.
    """

    def run(config: Path | None = None, together: list[Path] | None = None, **values: Any) -> None:
        given = {name: value for name, value in values.items() if value not in (None, [], ())}
        for old in RENAMED_SETTINGS.keys() & given.keys():
            warnings.warn(
                f"{_option(old)} is now called {_option(RENAMED_SETTINGS[old])}", stacklevel=2
            )
        command(config, together or [], given)

    kind = inspect.Parameter.KEYWORD_ONLY
    annotations: dict[str, Any] = {
        "config": Annotated[Path | None, _CONFIG],
        "together": Annotated[list[Path] | None, _TOGETHER],
    }
    panel = ""
    for name, field in TrainConfig.model_fields.items():
        panel = PANELS.get(name, panel)
        annotations[name] = _flag(name, field, panel)
    for old, new in RENAMED_SETTINGS.items():
        annotations[old] = _flag(old, TrainConfig.model_fields[new], "", hidden=True)
    parameters = [
        inspect.Parameter(name, kind, default=None, annotation=annotation)
        for name, annotation in annotations.items()
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = annotations
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


class PlainHelp(TyperCommand):
    """Help in plain lines: the tables of other commands would cut long flags off."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "rich_markup_mode": None})

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the flags of each group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            line = parameter.get_help_record(ctx)
            if line is not None:
                panel = getattr(parameter, "rich_help_panel", None) or "Options"
                groups.setdefault(panel, []).append(line)
        for title, lines in groups.items():
            with formatter.section(title):
                formatter.write_dl(lines)


def suggest_flag(flag: str, command: Any) -> str:
    """``"did you mean --learning-rate? If not, "`` for a flag that a command lacks, or nothing.

    Args:
        flag: as it was given, such as ``--lr`` or ``--no-resum``.
        command: typer's.
    """
    flags = {
        each.lstrip("-").removeprefix("no-"): each
        for parameter in command.params
        for each in (*parameter.secondary_opts, *parameter.opts)
        if each.startswith("--") and not getattr(parameter, "hidden", False)
    }
    name = flag.lstrip("-").partition("=")[0]
    negated = name.startswith(("no-", "no_"))
    plain = name[3:] if negated else name
    renamed = RENAMED_SETTINGS.get(plain.replace("-", "_"), "").replace("_", "-")
    found = [renamed] if renamed in flags else find_near_names(plain, flags)
    off = {each for parameter in command.params for each in parameter.secondary_opts}
    told = [f"--no-{each}" if negated and f"--no-{each}" in off else flags[each] for each in found]
    return f"did you mean {' or '.join(told)}? If not, " if told else ""


_CONFIG = typer.Option(
    "--config",
    metavar="FILE",
    help="YAML file with any of the settings below as keys; flags win over it",
    show_default=False,
)


_TOGETHER = typer.Option(
    "--together",
    metavar="FILE",
    help="YAML file of another concept to learn in the same run: its name, class_word, images,"
    " output and what else is a concept's own. All other settings are the run's, so the file may"
    " leave them out, and flags for them count for all; give the flag once for each",
    show_default=False,
)


def _option(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def _flag(name: str, field: FieldInfo, panel: str, hidden: bool = False) -> Any:
    kinds = _kinds(field.annotation)
    option = _option(name)
    text = field.description or name
    if field.is_required():
        text += " [required]"
    elif field.default not in (None, "", (), {}) and not isinstance(field.default, bool):
        text += f" [default: {_shown(field.default)}]"
    elif isinstance(field.default, bool):
        text += f" [default: {'yes' if field.default else 'no'}]"
    settings: dict[str, Any] = {
        "help": text,
        "rich_help_panel": panel,
        "show_default": False,
        "hidden": hidden,
    }
    if bool in kinds:
        no = "--no-" + name.replace("_", "-")
        return Annotated[bool | None, typer.Option(f"{option}/{no}", **settings)]
    settings["metavar"] = "NAME=X" if dict in kinds else _metavar(field)
    if dict in kinds:
        return Annotated[list[str] | None, typer.Option(option, **settings)]
    if tuple in kinds:
        settings["help"] += "; give the flag once for each"
        return Annotated[list[str] | None, typer.Option(option, **settings)]
    return Annotated[str | None, typer.Option(option, **settings)]


def _shown(default: Any) -> str:
    """As it would be given."""
    if isinstance(default, dict):
        return ",".join(f"{name}={value:g}" for name, value in default.items())
    return str(default)


def _metavar(field: FieldInfo) -> str:
    kinds = _kinds(field.annotation)
    for each in (field.annotation, *get_args(field.annotation)):
        if get_origin(each) is Literal:
            choices = "|".join(map(str, get_args(each)))
            return choices if len(choices) <= 40 else "NAME"
    names = {int: "N", float: "X", Path: "PATH"}
    return next((names[kind] for kind in kinds if kind in names), "TEXT")


def _kinds(annotation: Any) -> set[Any]:
    """The plain types within an annotation: ``float | None`` has float and NoneType."""
    inner = get_args(annotation) if get_origin(annotation) is not Literal else ()
    origin = get_origin(annotation)
    found = {origin} & {tuple, dict}
    return found.union(*map(_kinds, inner)) if inner else found | {annotation}
