"""Train references: `accelerate launch scripts/train_references.py config.yaml [--steps 400 ...]`.

The file's keys and the flags are the fields of
customize.training.references.config.ReferenceTrainConfig.
"""

from __future__ import annotations

import sys

from customize.cli.terminal import print_line
from customize.cli.training_script import make_parser, run_script


def train() -> int:
    from customize.training.references.config import ReferenceTrainConfig, load_reference_config
    from customize.training.references.recipe import train_references

    settings = vars(make_parser(ReferenceTrainConfig, __doc__).parse_args())
    config = load_reference_config(settings.pop("config"), **settings)
    train_references(config)
    print_line(f"the references are in {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(train))
