"""Train the bundled references: `python scripts/train_storybook_references.py`.

A Qwen2-VL of 3.6 M parameters first learns to answer questions about drawn images (stage "mllm").
Run the script again to resume from `--folder`, which receives checkpoints and losses (log.jsonl).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from customize.openmp import limit_spinning

limit_spinning()

import torch  # noqa: E402

from storybook_references.pretrain_mllm import pretrain  # noqa: E402
from storybook_references.render_groups import Groups, render_groups  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/storybook-references"))
    parser.add_argument("--groups", type=int, default=5_000, help="drawn groups of 8 images")
    parser.add_argument("--steps", type=int, default=3_000, help="steps of the stage mllm")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    groups = render_groups(args.folder / "groups", args.groups)
    split = args.groups - max(args.groups // 25, 8)
    pretrain(
        args.folder,
        part(groups, 0, split),
        part(groups, split, args.groups),
        args.steps,
        args.batch,
    )


def part(groups: Groups, first: int, end: int) -> Groups:
    """Some of the groups."""
    return Groups(
        groups.pixels[first:end],
        groups.identities[first:end],
        groups.accessories[first:end],
        groups.backgrounds[first:end],
    )


if __name__ == "__main__":
    main()
