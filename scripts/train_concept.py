"""Learn a concept: `accelerate launch scripts/train_concept.py config.yaml [--steps 400 ...]`.

The file's keys and the flags are the fields of customize.training.config.TrainConfig. Each
`--together tom.yaml` has another concept to learn in the same run.
"""

from __future__ import annotations

import argparse
import sys

from customize.cli.shared import console
from customize.cli.train import where
from customize.errors import CustomizeError, TrainingStopped
from customize.training.config import TrainConfig
from customize.training.loop import train_together
from customize.training.together import load_configs


def main() -> int:
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
    try:
        configs = load_configs(given.pop("config"), given.pop("together"), **given)
        train_together(configs)
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        return 130
    except KeyboardInterrupt:  # before the first step, or a second one in haste
        print(
            "interrupted: run the same again, and training goes on where it was saved",
            file=sys.stderr,
        )
        return 130
    except CustomizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Once, not by every process.
    console().print(where(configs), markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
