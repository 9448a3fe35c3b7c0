"""What the training scripts share: flags for all settings, and messages and codes at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from customize.cli.interrupts import INTERRUPTED, handle_interrupts, print_last_line
from customize.errors import CustomizeError, TrainingStopped

if TYPE_CHECKING:
    from customize.training.settings_model import SettingsModel


def run_script(train: Callable[[], int]) -> int:
    """Run a training and return the exit code; errors and interrupts end with one line."""
    with handle_interrupts(exit_afterwards=True):
        try:
            return train()
        except TrainingStopped as stopped:
            return print_last_line(str(stopped), INTERRUPTED)
        except KeyboardInterrupt:  # before the first step, or pressed twice
            return print_last_line(
                "interrupted: run the same command again to resume from the last checkpoint",
                INTERRUPTED,
            )
        except CustomizeError as error:
            return print_last_line(f"error: {error}", 2)


def make_parser(settings: type[SettingsModel], description: str | None) -> argparse.ArgumentParser:
    """Return a parser of a YAML file, ``config``, and a flag for each setting.

    Flags that are not given are missing from what it parses.

    Args:
        settings: The class of the settings.
        description: Shown by ``--help``.
    """
    parser = argparse.ArgumentParser(
        description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("config", nargs="?", default=None, help="YAML file")
    for name, field in settings.model_fields.items():
        nargs = "+" if name == "validation_prompts" else None
        text = (field.description or "").replace("%", "%%")
        parser.add_argument("--" + name.replace("_", "-"), nargs=nargs, metavar="VALUE", help=text)
    return parser
