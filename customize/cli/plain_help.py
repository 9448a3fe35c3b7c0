"""Help pages as plain text, 80 columns wide, and suggestions for misspelt flags."""

from __future__ import annotations

import inspect
from typing import Any

from typer.core import TyperCommand

from customize.near_names import find_near_names
from customize.training.settings_file import RENAMED_SETTINGS


class PlainCommand(TyperCommand):
    """A command whose help lists its flags in groups, without tables that cut long flags off."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "rich_markup_mode": None})

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the docstring line by line, so that examples keep their line breaks."""
        formatter.write_paragraph()
        for line in inspect.cleandoc(self.help or "").splitlines():
            formatter.write(f"  {line}".rstrip() + "\n")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, the flags by group, then the other flags."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        general: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                groups["Arguments"].append((parameter.metavar or record[0], record[1]))
            elif panel := getattr(parameter, "rich_help_panel", None):
                groups.setdefault(panel, []).append(record)
            else:
                general.append(record)
        for title, records in (*groups.items(), ("Options", general)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def suggest_flag(flag: str, command: Any) -> str:
    """``"did you mean --learning-rate? If not, "`` for an unknown flag; empty without a near one.

    Args:
        flag: The flag as typed, such as ``--lr`` or ``--no-resum``.
        command: Command of typer.
    """
    flags = {
        option.lstrip("-").removeprefix("no-"): option
        for parameter in command.params
        for option in (*parameter.secondary_opts, *parameter.opts)
        if option.startswith("--") and not getattr(parameter, "hidden", False)
    }
    name = flag.lstrip("-").partition("=")[0]
    negated = name.startswith(("no-", "no_"))
    positive = name[3:] if negated else name
    renamed = RENAMED_SETTINGS.get(positive.replace("-", "_"), "").replace("_", "-")
    matches = [renamed] if renamed in flags else find_near_names(positive, flags)
    negatives = {option for parameter in command.params for option in parameter.secondary_opts}
    suggestions = [
        f"--no-{match}" if negated and f"--no-{match}" in negatives else flags[match]
        for match in matches
    ]
    return f"did you mean {' or '.join(suggestions)}? If not, " if suggestions else ""
