"""Unseen identities drawn from reference images: how alike, and at what cost to the prompt?

Identities of the storybook that no training has seen are drawn in scenes that no training of the
references has seen, from 1 to 28 images each: five-image concepts' protocol (two backgrounds, no
accessories), so that what the images share besides the identity can leak. Rivals are other
poolings of the same encoder: the average of each image's tokens, all images' tokens side by side,
and the first image alone. They continue the bundled reference model for 500 steps, so they have
been trained for longer than it:

    python scripts/train_storybook_references.py --start assets/references --groups 2000 \
        --multi-steps 500 --pooling average

The last rival is a concept that is trained on the group.

- identity, prompt, composition, leak: see customize.evaluation.storybook_rates; distance: mean
  cosine distance to the identity.
- a stranger: one of eight images is an outlier, which shows another identity of the class.
  `stranger_loss_ratio` is what it costs in identity, relative to what it costs the average.

Rivals whose weights are not in `--rivals` (folders named after the pooling) have no row. A whole
run takes hours: the file of `--json` is written after every row, and `--resume` keeps its rows.

    python scripts/bench/references.py --json scripts/bench/results/references.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
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
Groups = Sequence[Sequence[Any]]
Row = dict[str, Any]


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
    groups: Groups,
    words: Callable[[ExampleConcept], str] = class_words,
) -> dict[str, float]:
    """Mean rates over all subjects, with the standard error of identity."""
    rows: list[dict[str, float]] = []
    for index, images in enumerate(groups):
        concept = subject(index)
        prompts = evaluation_prompts(words(concept), SCENES[: protocol.scenes])
        prototype = judges.prototype(images_to_tensor(concept.images()[: protocol.counts[-1]]))
        encoded = encode(concept, images)
        drawn = torch.cat([draw(prompts, encoded, seed) for seed in protocol.seeds])
        rates = rate_concept(
            judges,
            drawn,
            prompts * len(protocol.seeds),
            prototype,
            concept.identity.kind,
            concept.backgrounds,
        )
        rows.append({key: getattr(rates, key) for key in RATES})
    means = {key: mean(row[key] for row in rows) for key in RATES}
    error = float(np.std([row["identity"] for row in rows]) / max(len(rows) - 1, 1) ** 0.5)
    return means | {"identity_se": error}


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


def measure(args: argparse.Namespace) -> tuple[list[Row], dict[str, float]]:
    """All rows and figures."""
    protocol = QUICK if args.quick else FULL
    judges = load_judges(args.judges)
    rows = _common.measured_rows(args)
    identities = range(protocol.identities)

    def add(
        name: str, count: int, groups: Groups, calls: tuple[Encode, Draw], **words: Any
    ) -> None:
        rates = rate(judges, protocol, *calls, groups, **words)
        rows.append({"drawn by": name, "images": count} | rates)
        print(rows[-1], flush=True)
        _common.write_result("references", args, rows, figures(rows))

    def is_missing(name: str, count: int) -> bool:
        return all((row["drawn by"], row["images"]) != (name, count) for row in rows)

    for name, counts, make_calls in systems(args, protocol):
        wanted = [count for count in counts if is_missing(name, count)]
        outlier = OUTLIER_ROW.format(name)
        needs_outlier = name != "one image" and is_missing(outlier, OUTLIER_IMAGES)
        if not wanted and not needs_outlier:
            continue
        calls = make_calls()
        for count in wanted:
            add(name, count, [subject(k).images()[:count] for k in identities], calls)
        if needs_outlier:
            add(outlier, OUTLIER_IMAGES, [outlier_group(k) for k in identities], calls)
    trained = "concept trained on the images"
    if not args.without_training and is_missing(trained, OUTLIER_IMAGES):
        seconds: list[float] = []
        groups = [subject(k).images()[:OUTLIER_IMAGES] for k in identities]
        calls = trained_calls(args, seconds)
        add(trained, OUTLIER_IMAGES, groups, calls, words=lambda concept: concept.trigger)
        rows[-1]["training_seconds"] = median(seconds)
    return rows, figures(rows)


def systems(
    args: argparse.Namespace, protocol: Protocol
) -> Iterator[tuple[str, Sequence[int], Callable[[], tuple[Encode, Draw]]]]:
    """Name of a row, its numbers of images, and what opens the system."""

    def open_base() -> Any:
        pipe = open_quietly(args.base)
        pipe.unet.to(memory_format=torch.channels_last)
        return pipe

    def open_references() -> tuple[Encode, Draw]:
        return product_calls(open_base(), customize.References.from_pretrained(args.references))

    yield "references", protocol.counts, open_references
    for name, pooling in RIVALS.items():
        weights = args.rivals / pooling / "references.safetensors"
        if weights.exists():
            counts = (1,) if name == "one image" else (OUTLIER_IMAGES,)
            yield name, counts, partial(rival_calls, open_base(), pooling, weights)


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """The figures of rows that are there."""
    by_key = {(row["drawn by"], row["images"]): row for row in rows}
    ours = by_key.get(("references", OUTLIER_IMAGES))
    if ours is None:
        return {}
    result = {f"{key}_8": ours[key] for key in ("identity", "leak")}
    result["prompt_rate_8"] = ours["prompt"]
    averaged = by_key.get(("averaged", OUTLIER_IMAGES))
    if averaged is not None and averaged["identity"]:
        result["identity_8_over_averaged"] = ours["identity"] / averaged["identity"]
    lost = [
        by_key[name, OUTLIER_IMAGES]["identity"] - with_outlier["identity"]
        for name in ("references", "averaged")
        if (with_outlier := by_key.get((OUTLIER_ROW.format(name), OUTLIER_IMAGES)))
    ]
    if len(lost) == 2 and lost[1] > 0:
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
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that the file of --json has"
    )
    args = parser.parse_args()
    rows, result = measure(args)
    _common.report("references", args, rows, result)


if __name__ == "__main__":
    main()
