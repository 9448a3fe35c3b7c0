"""Train references: `accelerate launch scripts/train_references.py config.yaml [--steps 400 ...]`.

The file's keys and the flags are the fields of
customize.training.references.config.ReferenceTrainConfig.
"""

from __future__ import annotations

import argparse
import sys

from customize.cli.interrupts import INTERRUPTED, handle_interrupts, print_last_line
from customize.cli.terminal import print_line
from customize.errors import CustomizeError, TrainingStopped


def main() -> int:
    with handle_interrupts(exit_afterwards=True):
        try:
            return _run()
        except TrainingStopped as stopped:
            return print_last_line(str(stopped), INTERRUPTED)
        except KeyboardInterrupt:  # before the first step, or pressed twice
            return print_last_line(
                "interrupted: run the same command again to resume from the last checkpoint",
                INTERRUPTED,
            )
        except CustomizeError as error:
            return print_last_line(f"error: {error}", 2)


def _run() -> int:
    from customize.training.references.config import ReferenceTrainConfig, load_reference_config
    from customize.training.references.recipe import train_references

    parser = argparse.ArgumentParser(
        description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("config", nargs="?", default=None, help="YAML file")
    for name, field in ReferenceTrainConfig.model_fields.items():
        nargs = "+" if name == "validation_prompts" else None
        text = (field.description or "").replace("%", "%%")
        parser.add_argument("--" + name.replace("_", "-"), nargs=nargs, metavar="VALUE", help=text)
    settings = vars(parser.parse_args())
    config = load_reference_config(settings.pop("config"), **settings)
    train_references(config)
    print_line(f"the references are in {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
