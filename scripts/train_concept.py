"""Learn one concept: `accelerate launch scripts/train_concept.py config.yaml [--steps 400 ...]`.

The file's keys and the flags are the fields of customize.training.config.TrainConfig.
"""

from __future__ import annotations

import argparse
import sys

from customize.cli.shared import console
from customize.errors import CustomizeError, TrainingStopped
from customize.training.config import TrainConfig, load_config
from customize.training.loop import train


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("config", nargs="?", default=None, help="YAML file")
    for name, field in TrainConfig.model_fields.items():
        many = "+" if name == "validation_prompts" else None
        text = (field.description or "").replace("%", "%%")
        parser.add_argument("--" + name.replace("_", "-"), nargs=many, metavar="VALUE", help=text)
    given = vars(parser.parse_args())
    try:
        config = load_config(given.pop("config"), **given)
        train(config)
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
    console().print(
        f"the concept {config.name} is in {config.output}", markup=False, soft_wrap=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
