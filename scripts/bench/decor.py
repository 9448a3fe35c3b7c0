"""How much content of training images leaks, and how well does `avoid=` prevent it?

Concepts of the storybook are trained on a few images, all in one place and with one accessory that
the captions do not name, so both leak into images that do not request them. Styles are borders
around the image, trained on images of one class in one place, where the class leaks as well; styles
of many are trained on images of several classes, which the captions name. All are drawn in other
places, with other accessories and as other things, and concepts also in a style of many. Scores:

- identity: share of images that show the concept; for a style, that are in the style (a linear
  discriminant on small images, fitted on drawn scenes after the autoencoder); for a mix, both.
- prompt: share of requested attributes shown; leak: share of images with content of the training
  images that was not requested.

All ways use the same prompts and seeds. "Avoiding" is `avoid=` with the words that a user would
name, at several strengths, and with words that did not leak as a control. "Captions that name it"
are concepts trained on captions that name the other content. Concepts and styles are trained
without preservation unless "contexts preserved", the trainer's default, is stated. Styles of many
and mixes are trained with it and merged by fusion unless stated otherwise; without it few concepts
are recognised in a style. Options of `customize.Decor` were tuned on six concepts, its defaults on
thirty, and the factor of keys on styles. The figures are of twelve other concepts, on which nothing
was tuned, and of styles. Rows of the task "options" whose option is not listed here were measured
while it was a setting; the best value is a constant in customize/stages/decor. Trained concepts and
scores are stored in `--folder`, so an interrupted run resumes; delete the scores after a change to
drawing or scoring.

    python scripts/bench/decor.py --json scripts/bench/results/decor.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import _common
import _leaky
import _workers
import torch
from _leaky import SUBJECTS, TUNED, Subject, references
from _leaky_learned import KEPT, NAMED, SETTINGS, config_of, learn, ways_to_learn
from _scorer import open_quietly
from _workers import folder_name, weights_of
from torch import Tensor

import customize
from customize.evaluation.storybook_rates import GUIDANCE, attribute_hits
from customize.storybook.caption_grammar import parse_prompt
from customize.storybook.judges import Judges, load_judges

Rate = dict[str, float]
STEPS = 12  # sampling steps, enough for the judges
NOTHING, CLASS_WORD, NEGATIVE = "nothing", "the class word alone", "negative prompt"
SINGLE = (NOTHING, NEGATIVE)
OF_CONCEPT = "concept's weight"
STYLE_FIRST = "the style named first"
MERGES = ("merged by sum", "merged by ties")
WEIGHED = ("weight", OF_CONCEPT)
DEFAULT = "avoiding, by default"
AUTO = f'avoiding "auto", {NAMED}'

STRENGTHS = {f"avoiding, at {s}": {"strength": s} for s in (0.5, 1.0, 2.0)}
UNNAMED = "avoiding, not in the negative prompt"
ON_PROMPT = {"target": "prompt", "strength": 1.0}
OPTIONS: dict[str, dict[str, Any]] = STRENGTHS | {
    UNNAMED: {"negative": "keep"},
    "avoiding, in the negative prompt as well": {"negative": "clean"},
    "avoiding, keys left alone": {"keys": 0.0},
    "avoiding, keys at 0.5": {"keys": 0.5},
    "avoiding, keys alike": {"keys": 1.0},
    "avoiding, on the prompt": ON_PROMPT,
    "avoiding, on the prompt, auto": {"target": "prompt"},
    "avoiding, both": {"target": "both"},
}
AT_WEIGHT = f"{DEFAULT}, weight 0.9"


@dataclass(frozen=True)
class Protocol:
    """The number of subjects of each task, seeds and training steps."""

    subjects: Mapping[str, int]
    seeds: Mapping[str, tuple[int, ...]]
    steps: int
    weights: tuple[float, ...]


SEEDS = dict.fromkeys(SUBJECTS, (1, 2)) | dict.fromkeys(("options", "personalization"), (1,))
WEIGHTS = (0.9, 0.8, 0.7)
FULL = Protocol({task: len(mask) for task, mask in SUBJECTS.items()}, SEEDS, 400, WEIGHTS)
QUICK = Protocol({"personalization": 1}, {"personalization": (1,)}, 60, (0.6,))


# --- what is asked, and how it is judged ------------------------------------------------------


class Scorer:
    """Draws images and scores them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pipe = open_quietly(args.base)
        self.pipe.unet.to(memory_format=torch.channels_last)
        self.judges: Judges = load_judges(args.judges)
        self.styles = _leaky.style_judges(self.pipe)
        warnings.filterwarnings("ignore", message=".*so this is not avoided")

    def score(self, subject: Subject, way: str, seed: int) -> Rate:
        """Rates of one way to draw."""
        weights, call, settings, words = way_of(subject, way)
        mixed = len(subject.parts) > 1
        how = next((each for each in (NAMED, KEPT) if each in way), KEPT if mixed else "")
        merge = way.split()[-1] if way in MERGES else None
        folders = [config_of(self.args, part, how).output for part in subject.parts]
        self.pipe.load_custom(*folders, weights=weights, merge=merge)
        if settings is not None:
            self.pipe.load_custom(settings)
        try:
            prompts = subject.prompts(words, style_first=way == STYLE_FIRST)
            images = self.draw(prompts, seed, call)
        finally:
            self.pipe.unload_custom()
        _leaky.save(images, drawn_file(self.args, f"{subject.name}/{way}/{seed}"))
        return self.rate(subject, images, prompts)

    def draw(self, prompts: Sequence[str], seed: int, call: Mapping[str, Any]) -> Tensor:
        results = []
        for first in range(0, len(prompts), 16):
            part = list(prompts[first : first + 16])
            part_call, start = dict(call), 1000 * seed + first
            if "negative_prompt" in part_call:
                part_call["negative_prompt"] = [part_call["negative_prompt"]] * len(part)
            results.append(
                self.pipe(
                    part,
                    num_inference_steps=STEPS,
                    guidance_scale=GUIDANCE,
                    generator=[torch.Generator().manual_seed(start + k) for k in range(len(part))],
                    output_type="pt",
                    **part_call,
                ).images.float()
            )
        return torch.cat(results) * 2 - 1

    def rate(self, subject: Subject, images: Tensor, prompts: Sequence[str]) -> Rate:
        mask = [True] * len(images)
        if subject.style is not None:
            mask = self.styles[subject.style.name].has(images)
        kind = None
        if subject.concept is not None:
            kind = subject.concept.kind
            signature = self.judges.prototype(references(subject.concept))
            near = self.judges.distance(images, signature) <= self.judges.threshold
            mask = [a and b for a, b in zip(mask, near.tolist(), strict=True)]
        hits: list[bool] = []
        leaked: list[bool] = []
        unasked: list[bool] = []
        for seen, prompt in zip(self.judges.predict_attributes(images), prompts, strict=True):
            request = parse_prompt(prompt)
            hits += attribute_hits(seen, request, [kind])
            leaked.append(_leaky.leaks(subject, seen, request))
            if request.background is None:
                unasked.append(any(seen["place"] == part.place for part in subject.parts))
        return {
            "identity": mean(mask),
            "prompt": mean(hits),
            "leak": mean(leaked),
            "place_where_none_asked": mean(unasked) if unasked else 0.0,
        }


def ways(protocol: Protocol, task: str) -> list[str]:
    """All ways that are compared, the baselines first."""
    if task == "options":
        others = [NOTHING, NEGATIVE, "weight 0.9", f"{NEGATIVE}, weight 0.9"]
        return [*others, DEFAULT, AT_WEIGHT, *OPTIONS]
    weights = [f"weight {weight}" for weight in protocol.weights]
    both = [f"{NEGATIVE}, {weight}" for weight in weights[:2]]
    alone = [] if task.startswith("style") else [CLASS_WORD]
    baselines = [NOTHING, NEGATIVE, *alone, *weights, *both, NAMED]
    control = f"{DEFAULT}, words that did not leak"
    ours = [DEFAULT, *STRENGTHS, UNNAMED, AT_WEIGHT, AUTO, control]
    if task == "mixing":
        parts = [f"{OF_CONCEPT} 0.9", f"{NEGATIVE}, {OF_CONCEPT} 0.9", *MERGES, STYLE_FIRST]
        return [*baselines, *parts, *ours]
    if task == "style_of_many":
        return [*baselines, *ours]
    return [*baselines, *ours, *(f"{way}, {KEPT}" for way in (NOTHING, NEGATIVE, DEFAULT, UNNAMED))]


def way_of(subject: Subject, way: str) -> tuple[list[float], dict[str, Any], Any, str | None]:
    """Weights, arguments of the call, settings, and words in place of the trigger."""
    weight = float(way.split()[-1]) if "weight " in way else 1.0
    weights = [weight, 1.0] if OF_CONCEPT in way else [weight] * len(subject.parts)
    call = {"negative_prompt": subject.shown} if NEGATIVE in way else {}
    if way == CLASS_WORD:
        return weights, {}, None, f"a {subject.concept.kind}" if subject.concept else None
    option = OPTIONS.get(way.removesuffix(f", {KEPT}"))
    if option is not None:
        return weights, {"avoid": subject.shown}, customize.Decor(**option), None
    if way == AUTO:
        call["avoid"] = "auto"
    elif way.startswith(DEFAULT):
        call["avoid"] = subject.control if "not" in way else subject.shown
    return weights, call, None, None


# --- the whole --------------------------------------------------------------------------------


def cell_file(args: argparse.Namespace, job: str) -> Path:
    return args.folder / "scores" / f"{folder_name(job)}.json"


def drawn_file(args: argparse.Namespace, job: str) -> Path:
    return args.folder / "drawn" / f"{folder_name(job)}.png"


def score(args: argparse.Namespace, scorer: Scorer, job: str) -> None:
    """Score the cell of `job`, "subject/way/seed", into a file of its own; a finished one is
    kept."""
    name, way, seed = job.split("/")
    (subject,) = (e for group in SUBJECTS.values() for e in group if e.name == name)
    path = cell_file(args, job)
    if path.exists():
        return
    rates = scorer.score(subject, way, int(seed))
    _workers.keep(path, rates)
    print(f"{job:45}", {key: round(value, 2) for key, value in rates.items()}, flush=True)


def cost(scorer: Scorer, repeats: int) -> float:
    """The time that `avoid=` adds to an image of 25 steps, as a share, measured alternately."""
    concept = _leaky.JUDGED[0]
    scorer.pipe.load_custom(config_of(scorer.args, concept).output)
    seconds: dict[str, list[float]] = {"": [], concept.shown: []}

    def once(avoid: str) -> float:
        started = time.process_time()
        call = {"avoid": avoid} if avoid else {}
        scorer.pipe(
            f"a photo of <{concept.name}> in a city",
            num_inference_steps=25,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
            **call,
        )
        return time.process_time() - started

    for avoid in seconds:
        once(avoid)
    for _ in range(repeats):
        for avoid, taken in seconds.items():
            taken.append(once(avoid))
    return median(b / a for a, b in zip(*seconds.values(), strict=True)) - 1


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    protocol = QUICK if args.quick else FULL
    args.steps = protocol.steps
    digest_input = repr((protocol.steps, STEPS, SETTINGS)).encode()
    for path in weights_of(args.base):
        digest_input += path.read_bytes()
    args.folder = args.folder / hashlib.sha256(digest_input).hexdigest()[:8]
    known = {task: SUBJECTS[task][:count] for task, count in protocol.subjects.items()}
    parts = {part for group in known.values() for each in group for part in each.parts}
    learned = sorted(part.name for part in parts)
    learned += sorted(
        f"{part.name}/{how}" for part in parts.difference(TUNED) for how in ways_to_learn(part)
    )
    steps = ("--steps", str(args.steps))
    _workers.share_out(args, "learn", learned[:1], *steps)
    _workers.share_out(args, "learn", learned[1:], *steps)
    jobs = {
        (task, way): [f"{e.name}/{way}/{seed}" for e in group for seed in protocol.seeds[task]]
        for task, group in known.items()
        for way in ways(protocol, task)
    }
    _workers.share_out(args, "score", [job for group in jobs.values() for job in group], *steps)

    tables: dict[str, dict[str, Rate]] = {}
    for (task, way), group in jobs.items():
        results = [json.loads(cell_file(args, job).read_text()) for job in group]
        tables.setdefault(task, {})[way] = over(results)
    rows = [
        {"task": task, "drawn": way} | rates
        for task, table in tables.items()
        for way, rates in table.items()
    ]
    figures: dict[str, float] = {}
    for task, table in tables.items():
        if task != "options":
            figures |= figures_of(task, table)
    scorer = Scorer(args)
    figures |= {f"style_judge_{name}": judge.accuracy for name, judge in scorer.styles.items()}
    figures["stage_cost"] = cost(scorer, 3 if args.quick else 21)
    if args.picture is not None:
        ways_shown = (NOTHING, NEGATIVE, DEFAULT, NAMED)
        lines = [[f"{name}/{way}/1" for name in _leaky.SHOWN] for way in ways_shown]
        _leaky.stack([[drawn_file(args, job) for job in line] for line in lines], args.picture)
    return rows, figures


def over(results: Sequence[Rate]) -> Rate:
    return {key: mean(rates[key] for rates in results) for key in results[0]}


def figures_of(task: str, table: Mapping[str, Rate]) -> dict[str, float]:
    """Compare our default with the best baseline at its identity, and with better captions."""
    ours = table[DEFAULT]
    known = {way: rates for way, rates in table.items() if KEPT not in way}
    baselines = [r for way, r in known.items() if not way.startswith(("avoid", NAMED))]
    results = {
        f"identity_nothing_{task}": table[NOTHING]["identity"],
        f"identity_{task}": ours["identity"],
        f"leak_nothing_{task}": table[NOTHING]["leak"],
        f"leak_negative_prompt_{task}": table[NEGATIVE]["leak"],
        f"identity_named_{task}": table[NAMED]["identity"],
        f"leak_named_{task}": table[NAMED]["leak"],
        f"leak_{task}": ours["leak"],
    }
    single = [r for way, r in known.items() if way in SINGLE or way.startswith(WEIGHED)]
    for kind, rivals in (("", baselines), ("_single", single)):
        best = _leaky.least_leak(rivals, ours["identity"])
        # Without a recognised image there is nothing to compare.
        if best is not None and ours["identity"]:
            results[f"leak_best_baseline{kind}_{task}"] = best
            if best:
                results[f"leak_ratio{kind}_{task}"] = ours["leak"] / best
    return results


def main() -> None:
    parser = _common.parser(__doc__)
    _workers.add_arguments(parser, "runs/decor", "learn", "score")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="write four lines of images to this .png"
    )
    # Jobs of worker processes.
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.learn is None and args.score is None:
        _common.report("decor", args, *run(args))
        return
    for name in args.learn or ():
        learn(args, name)
    scorer = Scorer(args) if args.score else None
    for job in args.score or ():
        assert scorer is not None
        score(args, scorer, job)


if __name__ == "__main__":
    main()
