"""Learn a concept: `accelerate launch scripts/train_concept.py config.yaml [--steps 400 ...]`.

The file's keys and the flags are the fields of customize.training.config.TrainConfig. Each
`--together tom.yaml` has another concept to learn in the same run.
"""

from __future__ import annotations

import argparse
import sys

from customize.cli.command_support import console
from customize.cli.interrupts import INTERRUPTED, handle_interrupts, print_last_line
from customize.errors import CustomizeError, TrainingStopped


def main() -> int:
    with handle_interrupts(to_the_end=True):
        try:
            return _run()
        except TrainingStopped as stopped:
            return print_last_line(str(stopped), INTERRUPTED)
        except KeyboardInterrupt:  # before the first step, or a second one in haste
            return print_last_line(
                "interrupted: run the same again, and training goes on where it was saved",
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
        help="YAML file of another concept to learn in the same run; may be given often",
    )
    for name, field in TrainConfig.model_fields.items():
        many = "+" if name == "validation_prompts" else None
        text = (field.description or "").replace("%", "%%")
        parser.add_argument("--" + name.replace("_", "-"), nargs=many, metavar="VALUE", help=text)
    given = vars(parser.parse_args())
    configs = load_configs(given.pop("config"), given.pop("together"), **given)
    train_jointly(configs)
    # Once, not by every process.
    console().print(describe_outputs(configs), markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
