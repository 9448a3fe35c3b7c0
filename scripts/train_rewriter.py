"""Train a rewriter: `accelerate launch scripts/train_rewriter.py config.yaml [--epochs 2 ...]`.

The file's keys and the flags are the fields of
customize.training.rewriting.config.RewriterTrainConfig.
"""

from __future__ import annotations

import sys

from customize.cli.terminal import print_line
from customize.cli.training_script import make_parser, run_script


def train() -> int:
    from customize.training.rewriting.config import RewriterTrainConfig, load_rewriter_config
    from customize.training.rewriting.recipe import train_rewriter

    settings = vars(make_parser(RewriterTrainConfig, __doc__).parse_args())
    folder = train_rewriter(load_rewriter_config(settings.pop("config"), **settings))
    print_line(f"the LoRA is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(train))
