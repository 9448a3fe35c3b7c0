"""Train a concept: `accelerate launch scripts/train_concept.py config.yaml [--steps 400 ...]`.

The file's keys and the flags are the fields of customize.training.config.TrainConfig. Each
`--together tom.yaml` adds another concept to the run.
"""

from __future__ import annotations

import sys

from customize.cli.terminal import print_line
from customize.cli.training_script import make_parser, run_script


def train() -> int:
    from customize.cli.train_command import describe_outputs
    from customize.training.config import TrainConfig
    from customize.training.joint_configs import load_configs
    from customize.training.recipe import train_jointly

    parser = make_parser(TrainConfig, __doc__)
    parser.add_argument(
        "--together",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file of another concept to train in the same run; repeatable",
    )
    settings = vars(parser.parse_args())
    configs = load_configs(settings.pop("config"), settings.pop("together"), **settings)
    train_jointly(configs)
    print_line(describe_outputs(configs))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(train))
