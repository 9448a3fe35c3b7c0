"""Reliability of the storybook's judges, and prompt accuracy of its base model.

The judges are measured on drawn scenes that no training used: attributes on clean images and on
images degraded like generated ones; identity as area under the ROC curve, one image against the
five references of a concept, negatives of the same class only.

The base model draws prompts that name every attribute (25 steps, guidance 2.5), and the attribute
judge counts the requested attributes shown; `ceiling` is its count for drawn scenes of the same
prompts, the score of a perfect model.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import ROOT, parser, report
from diffusers import DiffusionPipeline

from customize.evaluation.storybook_rates import GUIDANCE, STEPS, attribute_accuracy, draw_prompts
from customize.storybook import scene_drawing
from customize.storybook.caption_grammar import caption
from customize.storybook.judges import HEADS, Judges, judge_inputs, load_judges
from customize.storybook.world import CLASSES, COLOURS, Scene, compose_scene, random_identity
from storybook_training.contact_sheet import save_contact_sheet
from storybook_training.measure_judges import measure_judges

SEEDS = (1, 2, 3)


def scenes_to_ask_for(count: int, seed: int, things: int) -> list[Scene]:
    """Scenes whose bodies all have a colour word, with evenly distributed classes."""
    rng = np.random.default_rng((seed, things, 2024))
    drawn_scenes = []
    for k in range(count):
        kinds = [CLASSES[(k + 3 * slot) % len(CLASSES)] for slot in range(things)]
        identities = [random_identity(rng, kind, str(rng.choice(COLOURS))) for kind in kinds]
        drawn_scenes.append(compose_scene(rng, tuple(identities)))
    return drawn_scenes


def judge_rows(figures: dict[str, float]) -> list[dict[str, Any]]:
    """Held-out accuracy of each attribute, the mean over its heads."""
    rows = []
    for state in ("clean", "rough"):
        row: dict[str, Any] = {"what": f"judge on {state} renders"}
        row["all"] = figures[f"{state}_accuracy"]
        for attribute in ("class", "colour", "pattern", "accessory", "place", "count"):
            stem = "kind" if attribute == "class" else attribute
            heads = [head for head in HEADS if head.rstrip("01") == stem]
            row[attribute] = statistics.mean(figures[f"{state}_{head}"] for head in heads)
        rows.append(row)
    return rows


def base_rows(
    pipe: Any, judges: Judges, things: int, pictures: int, sheet: Path | None
) -> list[dict[str, Any]]:
    """A row per seed, and one of a perfect model."""
    rows, scenes, shown = [], [], []
    name = "one thing" if things == 1 else "two things"
    for seed in SEEDS:
        scenes_of_seed = scenes_to_ask_for(pictures, seed, things)
        prompts = [caption(scene) for scene in scenes_of_seed]
        images = draw_prompts(pipe, prompts, seed)
        rows.append(
            {"what": f"base, {name}, seed {seed}"} | attribute_accuracy(judges, images, prompts)
        )
        scenes += scenes_of_seed
        shown.append(images)
    renders = judge_inputs([scene_drawing.draw_scene(scene) for scene in scenes])
    ceiling = attribute_accuracy(judges, renders, [caption(scene) for scene in scenes])
    if sheet is not None:
        save_contact_sheet(torch.cat(shown), sheet.with_stem(f"{sheet.stem}-{things}"), columns=16)
    return [*rows, {"what": f"ceiling, {name}"} | ceiling]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--base", type=Path, default=ROOT / "assets/storybook")
    flags.add_argument("--judges", type=Path, default=ROOT / "assets/judges")
    flags.add_argument(
        "--pictures", type=int, help="generated images per seed (default: 96, quick 32)"
    )
    flags.add_argument("--sheet", type=Path, help="PNG file for the generated images")
    args = flags.parse_args()
    pictures = args.pictures or (32 if args.quick else 96)
    if not (args.base / "model_index.json").is_file():
        raise SystemExit(f"there is no base model in {args.base}; name another with --base")
    judges = load_judges(args.judges)
    pipe = DiffusionPipeline.from_pretrained(args.base)
    pipe.set_progress_bar_config(disable=True)
    held_out = measure_judges(
        judges, pipe.vae, 500 if args.quick else 2000, 120 if args.quick else 400
    )
    single = base_rows(pipe, judges, 1, pictures, args.sheet)
    rows = [*judge_rows(held_out), *single]
    if not args.quick:
        rows += base_rows(pipe, judges, 2, pictures, args.sheet)
    over_seeds = [row["all"] for row in single[: len(SEEDS)]]
    print(f"{len(SEEDS)} x {pictures} pictures, {STEPS} steps, guidance {GUIDANCE}")
    report(
        "storybook",
        args,
        rows,
        {
            "judge_attribute_accuracy": held_out["clean_accuracy"],
            "judge_attribute_accuracy_rough": held_out["rough_accuracy"],
            "judge_identity_auc": held_out["identity_auc"],
            "judge_identity_equal_error": held_out["equal_error"],
            "base_attribute_accuracy": statistics.mean(over_seeds),
            "base_attribute_accuracy_sd_over_seeds": statistics.stdev(over_seeds),
        },
    )


if __name__ == "__main__":
    main()
