"""Unseen identities drawn from reference images: how alike, and at what cost to the prompt?

Identities of the storybook that no training has seen are drawn in scenes that no training of the
references has seen, from 1 to 28 images each: five-image concepts' protocol (two backgrounds, no
accessories), so that what the images share besides the identity can leak. Rivals are poolings of
the same encoder, each trained for the same steps on the same data by
`scripts/train_storybook_references.py --pooling NAME`: the average of each image's tokens, all
images' tokens side by side, and the first image alone; and a concept that is trained on the group.

- identity, prompt, composition, leak: see customize.evaluation.storybook_rates; distance: mean
  cosine distance to the identity.
- a stranger: one of eight images is an outlier, which shows another identity of the class.
  `stranger_loss_ratio` is what it costs in identity, relative to what it costs the average.

Rivals whose weights are not in `--rivals` (folders named after the pooling) have no row.

    python scripts/bench/references.py --json scripts/bench/results/references.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import _common
import numpy as np
import torch
from _scorer import open_quietly
from _workers import folder_name
from torch import Tensor

import customize
from customize.demo.experiment import TRAINING
from customize.evaluation.storybook_rates import (
    GUIDANCE,
    SCENES,
    draw_prompts,
    evaluation_prompts,
    rate_concept,
)
from customize.image_tensors import images_to_tensor
from customize.storybook.bundled_assets import assets_folder
from customize.storybook.example_concepts import ExampleConcept, make_concept
from customize.storybook.judges import Judges, load_judges
from customize.storybook.world import CLASSES

STEPS = 12  # sampling steps, enough for the judges
COUNTS = (1, 2, 4, 8, 16, 28)
OUTLIER_IMAGES = 8  # images of a group in which one is an outlier
OUTLIER_ROW = "{}, a stranger"  # the name of its row in result files
RATES = ("identity", "prompt", "composition", "leak", "distance")
#: Name of a row -> folder of its weights.
RIVALS = {"averaged": "average", "side by side": "concatenate", "one image": "one"}

#: ``encode(subject, images)`` -> what ``draw(prompts, encoded, seed)`` takes.
Encode = Callable[[ExampleConcept, Sequence[Any]], Any]
Draw = Callable[[Sequence[str], Any, int], Tensor]


@dataclass(frozen=True)
class Protocol:
    identities: int
    scenes: int
    seeds: tuple[int, ...]
    counts: tuple[int, ...]


FULL = Protocol(24, 8, (1, 2, 3), COUNTS)
QUICK = Protocol(4, 4, (1,), (1, 8))


def subject(index: int) -> ExampleConcept:
    """An identity of the benchmark with 28 images; its images begin as a concept's of that seed."""
    kind = CLASSES[index % len(CLASSES)]
    return make_concept(f"r{index:02d}", kind, 700 + index, max(COUNTS))


def outlier_group(index: int) -> list[Any]:
    """Eight images of a subject, of which one, in the middle, is of another one of its class."""
    images = subject(index).images()[:OUTLIER_IMAGES]
    images[OUTLIER_IMAGES // 2] = subject(index + 10 * len(CLASSES)).images()[0]
    return images


def class_words(concept: ExampleConcept) -> str:
    """The words of a subject in prompts that have references."""
    return f"a {concept.identity.kind}"


def rate(
    judges: Judges,
    protocol: Protocol,
    encode: Encode,
    draw: Draw,
    groups: Sequence[Sequence[Any]],
    words: Callable[[ExampleConcept], str] = class_words,
) -> dict[str, float]:
    """Mean rates over all subjects, with the standard error of identity, and seconds an image."""
    rows: list[dict[str, float]] = []
    seconds = 0.0
    for index, images in enumerate(groups):
        concept = subject(index)
        prompts = evaluation_prompts(words(concept), SCENES[: protocol.scenes])
        prototype = judges.prototype(images_to_tensor(concept.images()[: protocol.counts[-1]]))
        encoded = encode(concept, images)
        drawn = []
        for seed in protocol.seeds:
            started = time.perf_counter()
            drawn.append(draw(prompts, encoded, seed))
            seconds += time.perf_counter() - started
        rates = rate_concept(
            judges,
            torch.cat(drawn),
            prompts * len(protocol.seeds),
            prototype,
            concept.identity.kind,
            concept.backgrounds,
        )
        rows.append({key: getattr(rates, key) for key in RATES})
    pictures = len(groups) * protocol.scenes * len(protocol.seeds)
    means = {key: mean(row[key] for row in rows) for key in RATES}
    error = float(np.std([row["identity"] for row in rows]) / max(len(rows) - 1, 1) ** 0.5)
    return means | {"identity_se": error, "seconds_an_image": seconds / pictures}


def seeds_of(prompts: Sequence[str], seed: int) -> list[int]:
    """The seed of each image, as :func:`draw_prompts` has them."""
    return [1000 * seed + k for k in range(len(prompts))]


def product_calls(pipe: Any, references: Any) -> tuple[Encode, Draw]:
    """Encoding and drawing by `reference_images=`."""
    pipe.load_custom(references)

    def draw(prompts: Sequence[str], group: Any, seed: int) -> Tensor:
        generators = [torch.Generator().manual_seed(k) for k in seeds_of(prompts, seed)]
        images = pipe(
            list(prompts),
            reference_images=group,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generators,
            output_type="pt",
        ).images
        return images.float() * 2 - 1

    return lambda _, images: references.encode(images), draw


def rival_calls(pipe: Any, pooling: str, weights: Path) -> tuple[Encode, Draw]:
    """Encoding and drawing by another pooling of the same encoder."""
    from storybook_references.train_stages import Model, draw, load_model

    model = Model(pipe, None, pooling)
    load_model(model, weights)
    model.eval()

    @torch.no_grad()
    def encode(_: ExampleConcept, images: Sequence[Any]) -> Tensor:
        return model.encode([[np.asarray(image) for image in images]])

    def draw_tokens(prompts: Sequence[str], tokens: Tensor, seed: int) -> Tensor:
        rows = tokens.expand(len(prompts), -1, -1)
        return draw(model, pipe, prompts, rows, seeds_of(prompts, seed), STEPS, GUIDANCE)

    return encode, draw_tokens


def trained_calls(args: argparse.Namespace, seconds: list[float]) -> tuple[Encode, Draw]:
    """Training a concept on the images, and drawing it.

    Args:
        args: Of the command line.
        seconds: Receives the seconds of each training's steps.
    """

    def encode(subject: ExampleConcept, images: Sequence[Any]) -> Any:
        folder = args.folder / "images" / f"{subject.name}-{len(images)}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            image.save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(subject.captions()[number] + "\n")
        concept = customize.train(
            base=str(args.base),
            images=folder,
            output=args.folder / "learned" / folder_name(f"{subject.name} {len(images)}"),
            name=subject.name,
            class_word=subject.identity.kind,
            progress=False,
            record_inputs=False,
            **TRAINING | {"checkpoint_every": 0},
        )
        seconds.append(TRAINING["steps"] * concept.info.training["seconds_per_step"])
        return open_quietly(args.base).load_custom(concept)

    return encode, lambda prompts, pipe, seed: draw_prompts(pipe, prompts, seed, STEPS)


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """All rows and figures."""
    protocol = QUICK if args.quick else FULL
    judges = load_judges(args.judges)
    pipe = open_quietly(args.base)
    pipe.unet.to(memory_format=torch.channels_last)
    references = customize.References.from_pretrained(args.references)
    systems: dict[str, tuple[Encode, Draw]] = {"references": product_calls(pipe, references)}
    for name, pooling in RIVALS.items():
        weights = args.rivals / pooling / "references.safetensors"
        if weights.exists():
            systems[name] = rival_calls(open_quietly(args.base), pooling, weights)
    rows: list[dict[str, Any]] = []
    identities = range(protocol.identities)
    for name, (encode, draw) in systems.items():
        counts = (1,) if name == "one image" else protocol.counts
        for count in counts:
            groups = [subject(k).images()[:count] for k in identities]
            rates = rate(judges, protocol, encode, draw, groups)
            rows.append({"drawn by": name, "images": count} | rates)
            print(rows[-1], flush=True)
        if name != "one image":
            rates = rate(judges, protocol, encode, draw, [outlier_group(k) for k in identities])
            rows.append({"drawn by": OUTLIER_ROW.format(name), "images": OUTLIER_IMAGES} | rates)
            print(rows[-1], flush=True)
    if not args.without_training:
        seconds: list[float] = []
        groups = [subject(k).images()[:OUTLIER_IMAGES] for k in identities]
        calls = trained_calls(args, seconds)
        rates = rate(judges, protocol, *calls, groups, lambda concept: concept.trigger)
        rates["training_seconds"] = mean(seconds)
        rows.append({"drawn by": "concept trained on the images", "images": OUTLIER_IMAGES} | rates)
    return rows, figures(rows)


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The figures of rows that are there."""
    by_key = {(row["drawn by"], row["images"]): row for row in rows}
    ours = by_key["references", OUTLIER_IMAGES]
    result = {f"{key}_8": ours[key] for key in ("identity", "leak")}
    result["prompt_rate_8"] = ours["prompt"]
    averaged = by_key.get(("averaged", OUTLIER_IMAGES))
    if averaged is not None and averaged["identity"]:
        result["identity_8_over_averaged"] = ours["identity"] / averaged["identity"]
        lost = [
            row["identity"] - by_key[OUTLIER_ROW.format(name), OUTLIER_IMAGES]["identity"]
            for name, row in (("references", ours), ("averaged", averaged))
        ]
        if lost[1] > 0:
            result["stranger_loss_ratio"] = lost[0] / lost[1]
    trained = by_key.get(("concept trained on the images", OUTLIER_IMAGES))
    if trained is not None:
        result["identity_8_over_trained"] = ours["identity"] / trained["identity"]
    return result


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--references", type=Path, default=assets_folder() / "references")
    parser.add_argument("--rivals", type=Path, default=Path("runs/storybook-references"))
    parser.add_argument("--base", type=Path, default=assets_folder() / "storybook")
    parser.add_argument("--judges", type=Path, default=assets_folder() / "judges")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-references"))
    parser.add_argument(
        "--without-training", action="store_true", help="leave out the concepts that are trained"
    )
    args = parser.parse_args()
    rows, result = measure(args)
    _common.report("references", args, rows, result)


if __name__ == "__main__":
    main()
