"""`avoid=` with reference images: does what they share and a user names go, and only that?

Five images of an identity that no training has seen share its colour and its pattern. Each is
avoided in turn, by its word, and then a colour that the images do not show. Rivals: `avoid=` on the
prompt alone, the word as negative prompt, and no references. Prompts name a class, a place and an
accessory that the images do not show.

- left: share of pictures that show what is avoided; kept: share of those that show the images'
  other attribute, the pattern for the colour and the colour otherwise.
- identity, prompt: see customize.evaluation.storybook_rates. The identity that the judges know has
  its colour.
- Standard errors are over identities. The settings were chosen on other identities, whose seeds are
  below 5000.

    python scripts/bench/reference_avoid.py --json scripts/bench/results/reference_avoid.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import _common
import numpy as np
import torch
from _scorer import open_quietly
from torch import Tensor

import customize
from customize.evaluation.storybook_rates import (
    GUIDANCE,
    SCENES,
    attribute_hits,
    evaluation_prompts,
)
from customize.image_tensors import images_to_tensor, tensor_to_images
from customize.storybook.bundled_assets import assets_folder
from customize.storybook.caption_grammar import parse_prompt
from customize.storybook.judges import Judges, judge_inputs, load_judges
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    Identity,
    compose_scene,
    random_identity,
)

STEPS = 12  # sampling steps, enough for the judges
FIRST_SEED = 5200  # of the identities
IMAGES = 5  # of a group
BATCH = 24
COLUMNS = 6  # of the picture
OTHER = "another colour"
#: What is avoided -> the attribute of the references that should stay.
AVOIDED = {"colour": "pattern", "pattern": "colour", OTHER: "colour"}
RATES = ("left", "kept", "identity", "prompt")


@dataclass(frozen=True, eq=False)
class Subject:
    """An identity whose references share a colour and a pattern.

    Attributes:
        seed: Of everything random.
        index: Number, which chooses class, colour and pattern.
    """

    seed: int
    index: int

    @cached_property
    def identity(self) -> Identity:
        kind = CLASSES[(self.index + self.index // len(CLASSES)) % len(CLASSES)]
        pattern = ("striped", "spotted")[self.index // len(COLOURS) % 2]
        return random_identity(self._generator(), kind, self.words["colour"], pattern)

    @cached_property
    def words(self) -> dict[str, str]:
        """Key of AVOIDED -> word."""
        colour = self.index % len(COLOURS)
        return {
            "colour": COLOURS[colour],
            "pattern": ("striped", "spotted")[self.index // len(COLOURS) % 2],
            OTHER: COLOURS[(colour + 2) % len(COLOURS)],
        }

    @cached_property
    def images(self) -> list[Any]:
        rng = self._generator()
        places = rng.permutation(BACKGROUNDS)[:IMAGES]
        scenes = [compose_scene(rng, (self.identity,), ("none",), str(p)) for p in places]
        return [draw_scene(scene) for scene in scenes]

    def prompt(self, seed: int) -> str:
        scene = SCENES[(self.index + seed) % len(SCENES)]
        return evaluation_prompts(f"a {self.identity.kind}", [scene])[0]

    def _generator(self) -> np.random.Generator:
        return np.random.default_rng((self.seed, 5))


class Bench:
    """Subjects, their references, and the judges."""

    def __init__(self, args: argparse.Namespace, first_seed: int, count: int, seeds: int) -> None:
        self.judges: Judges = load_judges(args.judges)
        self.pipe = open_quietly(args.base)
        self.pipe.unet.to(memory_format=torch.channels_last)
        references = customize.References.from_pretrained(args.references)
        self.pipe.load_custom(references)
        self.subjects = [Subject(first_seed + k, k) for k in range(count)]
        self.groups = {s: references.encode(s.images) for s in self.subjects}
        self.prototypes = {
            s: self.judges.prototype(images_to_tensor(s.images)) for s in self.subjects
        }
        self.jobs = [(s, seed) for seed in range(1, seeds + 1) for s in self.subjects]

    def draw(self, avoided: str, **calls: Callable[..., Any]) -> list[Tensor]:
        """Draw each job; jobs of the same word are one batch.

        Args:
            avoided: Key of AVOIDED, or empty.
            calls: Argument of the pipeline -> its value for (word, subjects).
        """
        images: dict[tuple[Subject, int], Tensor] = {}
        words = {subject: subject.words.get(avoided, "") for subject in self.subjects}
        for shared in dict.fromkeys(words.values()):
            jobs = [job for job in self.jobs if words[job[0]] == shared]
            for first in range(0, len(jobs), BATCH):
                part = jobs[first : first + BATCH]
                subjects = [subject for subject, _ in part]
                numbers = [1000 * seed + subject.index for subject, seed in part]
                drawn = self.pipe(
                    [subject.prompt(seed) for subject, seed in part],
                    num_inference_steps=STEPS,
                    guidance_scale=GUIDANCE,
                    generator=[torch.Generator().manual_seed(number) for number in numbers],
                    output_type="pt",
                    **{name: value(shared, subjects) for name, value in calls.items()},
                ).images
                images |= dict(zip(part, drawn.float() * 2 - 1, strict=True))
        return [images[job] for job in self.jobs]

    def score(self, images: Sequence[Tensor], avoided: str) -> dict[str, float]:
        """Rates with standard errors over subjects."""
        seen = self.judges.predict_attributes(torch.stack(list(images)))
        by_subject: dict[Subject, list[tuple[float, ...]]] = {}
        for (subject, seed), image, labels in zip(self.jobs, images, seen, strict=True):
            distance = self.judges.distance(image[None], self.prototypes[subject])
            request = parse_prompt(subject.prompt(seed))
            attribute = "colour" if avoided == OTHER else avoided
            kept = AVOIDED[avoided]
            scores = (
                labels[f"{attribute}0"] == subject.words[avoided],
                labels[f"{kept}0"] == subject.words[kept],
                float(distance) <= self.judges.threshold,
                mean(attribute_hits(labels, request, [subject.identity.kind])),
            )
            by_subject.setdefault(subject, []).append(tuple(map(float, scores)))
        means = [
            [mean(column) for column in zip(*rows, strict=True)] for rows in by_subject.values()
        ]
        rates: dict[str, float] = {}
        for name, values in zip(RATES, zip(*means, strict=True), strict=True):
            rates |= {name: mean(values), f"{name}_se": stdev(values) / len(values) ** 0.5}
        return rates

    def references(self, _: str, subjects: Sequence[Subject]) -> list[Any]:
        """The value of `reference_images=`."""
        return [self.groups[subject] for subject in subjects]


def measure(bench: Bench) -> tuple[list[dict[str, Any]], list[Sequence[Tensor]]]:
    """All rows, and the images of some: of nothing avoided, each `avoid=`, and no references."""
    rows: list[dict[str, Any]] = []

    def add(name: str, images: Sequence[Tensor], avoided: str) -> None:
        rows.append({"drawn by": name, "avoided": avoided} | bench.score(images, avoided))
        print(rows[-1], flush=True)

    plain = bench.draw("", reference_images=bench.references)
    without = bench.draw("")
    pictures: list[Sequence[Tensor]] = [plain]
    for avoided in AVOIDED:
        draw = partial(bench.draw, avoided, reference_images=bench.references)
        add("nothing avoided", plain, avoided)
        bench.pipe.load_custom(customize.Decor(target="prompt"))
        add("`avoid=` on the prompt alone", draw(avoid=lambda word, _: word), avoided)
        bench.pipe.load_custom(customize.Decor())
        negative = draw(negative_prompt=lambda word, subjects: [word] * len(subjects))
        add("negative prompt", negative, avoided)
        pictures.append(draw(avoid=lambda word, _: word))
        add("`avoid=`", pictures[-1], avoided)
        add("no references", without, avoided)
    return rows, [*pictures, without]


def save_pictures(bench: Bench, lines: Sequence[Sequence[Tensor]], file: Path) -> None:
    """Write a column for each of the first subjects: a reference, and its images."""
    references = judge_inputs([subject.images[0] for subject in bench.subjects[:COLUMNS]])
    stacked = [references, *(torch.stack(list(line[:COLUMNS])) for line in lines)]
    sheet = torch.cat([torch.cat(list(line), dim=2) for line in stacked], dim=1)
    image = tensor_to_images(sheet[None])[0]
    image.resize((2 * image.width, 2 * image.height)).save(file)


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Rates of nothing avoided, of the rivals and of ours."""
    names = {
        "nothing avoided": "plain",
        "`avoid=` on the prompt alone": "prompt_alone",
        "negative prompt": "negative_prompt",
        "`avoid=`": "avoid",
    }
    return {
        f"{rate}_{names[row['drawn by']]}_{row['avoided'].replace(' ', '_')}": row[rate]
        for row in rows
        if row["drawn by"] in names
        for rate in RATES
    }


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--references", type=Path, default=assets_folder() / "references")
    parser.add_argument("--base", type=Path, default=assets_folder() / "storybook")
    parser.add_argument("--judges", type=Path, default=assets_folder() / "judges")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="write six lines of images to this .png"
    )
    args = parser.parse_args()
    count, seeds = (6, 1) if args.quick else (24, 2)
    bench = Bench(args, FIRST_SEED, count, seeds)
    rows, lines = measure(bench)
    if args.picture is not None:
        save_pictures(bench, lines, args.picture)
    _common.report("reference_avoid", args, rows, figures(rows))


if __name__ == "__main__":
    main()
