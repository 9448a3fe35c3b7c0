"""Train the bundled references from scratch: `python scripts/train_storybook_references.py`.

A miniature of EasyRef for the storybook: the vision tower learns to read drawn scenes, the
language model to answer questions about images, then both to condition the frozen denoiser. Run the
script again to resume from `--folder`, which receives checkpoints, losses (log.jsonl) and samples.

With `--start MODEL` the last stage continues a trained reference model, without the others:
`--start assets/references --pooling average --groups 2000 --multi-steps 500` trains a rival.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from customize.openmp import limit_spinning

limit_spinning()  # before torch is imported

import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402

from customize.families import family_of  # noqa: E402
from customize.references.model import ReferenceModel  # noqa: E402
from customize.storybook.bundled_assets import assets_folder  # noqa: E402
from customize.storybook.judges import load_judges  # noqa: E402
from storybook_references.attribute_groups import render_attribute_groups  # noqa: E402
from storybook_references.cache_latents import cache_latents  # noqa: E402
from storybook_references.pretrain_mllm import pretrain  # noqa: E402
from storybook_references.pretrain_vision import pretrain_vision  # noqa: E402
from storybook_references.render_groups import Groups, render_groups  # noqa: E402
from storybook_references.train_stages import POOLINGS, Data, Model, train_stages  # noqa: E402

#: Steps of each stage of EasyRef.
STAGES = {"alignment": 200, "single": 100, "multi": 1_400}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/storybook-references"))
    parser.add_argument("--groups", type=int, default=5_000, help="drawn groups of 8 images")
    parser.add_argument("--vision-steps", type=int, default=1_000)
    parser.add_argument("--mllm-steps", type=int, default=600)
    parser.add_argument("--attribute-groups", type=int, default=4_000)
    for stage, steps in STAGES.items():
        parser.add_argument(f"--{stage}-steps", type=int, default=steps)
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        default="group",
        help="how several images become one condition: all but group are rivals (default: group)",
    )
    parser.add_argument("--start", type=Path, help="continue this reference model")
    parser.add_argument("--base", type=Path, default=assets_folder() / "storybook")
    parser.add_argument("--judges", type=Path, default=assets_folder() / "judges")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    groups = render_groups(args.folder / "groups", args.groups)
    split = args.groups - max(args.groups // 25, 8)
    trained, held_out = part(groups, 0, split), part(groups, split, args.groups)
    if args.start is None:
        pretrain_vision(args.folder, trained, held_out, args.vision_steps)
        pretrain(args.folder, trained, held_out, args.mllm_steps)
    pipe = DiffusionPipeline.from_pretrained(args.base)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)  # the fastest for convolutions on a CPU
    family = family_of(pipe.components)
    latents = cache_latents(args.folder / "latents.npy", groups.pixels, family)
    attributes = render_attribute_groups(args.folder / "groups", args.attribute_groups)
    targets = attributes.pixels[:, :1]
    target_latents = cache_latents(args.folder / "attribute_latents.npy", targets, family)
    data = Data(trained, latents[:split], attributes, target_latents)
    model = Model(
        pipe, args.folder / "mllm.safetensors" if args.start is None else None, args.pooling
    )
    if args.start is not None:
        model.continue_from(ReferenceModel.from_pretrained(args.start))
    names = list(STAGES) if args.start is None else ["multi"]
    stages = {stage: getattr(args, f"{stage}_steps") for stage in names}
    judges = load_judges(args.judges)
    train_stages(args.folder, pipe, judges, model, data, held_out, stages)
    if args.pooling == "group":
        config, output = model.encoder.config, args.folder / "model"
        trained_model = ReferenceModel(config, model.encoder, model.adapter, model.processor)
        trained_model.save_pretrained(output, torch.float16)
        print(f"the reference model is in {output}")


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
