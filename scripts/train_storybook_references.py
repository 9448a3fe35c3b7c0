"""Train the bundled references from scratch: `python scripts/train_storybook_references.py`.

A miniature of EasyRef for the storybook: the vision tower learns to read drawn scenes, the
language model to answer questions about images, then both to condition the frozen denoiser. Run the
script again to resume from `--folder`, which receives checkpoints, losses (log.jsonl) and samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from customize.openmp import limit_spinning

limit_spinning()  # before torch is imported

import torch  # noqa: E402

from storybook_references.pretrain_mllm import pretrain  # noqa: E402
from storybook_references.pretrain_vision import pretrain_vision  # noqa: E402
from storybook_references.render_groups import Groups, render_groups  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/storybook-references"))
    parser.add_argument("--groups", type=int, default=5_000, help="drawn groups of 8 images")
    parser.add_argument("--vision-steps", type=int, default=1_000)
    parser.add_argument("--mllm-steps", type=int, default=600)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    groups = render_groups(args.folder / "groups", args.groups)
    split = args.groups - max(args.groups // 25, 8)
    trained, held_out = part(groups, 0, split), part(groups, split, args.groups)
    pretrain_vision(args.folder, trained, held_out, args.vision_steps)
    pretrain(args.folder, trained, held_out, args.mllm_steps)


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
