"""Train a concept: `accelerate launch scripts/train_concept.py config.yaml [--steps 400 ...]`.

The file's keys and the flags are the fields of customize.training.config.TrainConfig. Each
`--together tom.yaml` adds another concept to the run.
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
    from customize.cli.train_command import describe_outputs
    from customize.training.config import TrainConfig
    from customize.training.joint_configs import load_configs
    from customize.training.recipe import train_jointly

    parser = argparse.ArgumentParser(
        description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("config", nargs="?", default=None, help="YAML file")
    parser.add_argument(
        "--together",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file of another concept to train in the same run; repeatable",
    )
    for name, field in TrainConfig.model_fields.items():
        nargs = "+" if name == "validation_prompts" else None
        text = (field.description or "").replace("%", "%%")
        parser.add_argument("--" + name.replace("_", "-"), nargs=nargs, metavar="VALUE", help=text)
    settings = vars(parser.parse_args())
    configs = load_configs(settings.pop("config"), settings.pop("together"), **settings)
    train_jointly(configs)
    print_line(describe_outputs(configs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
