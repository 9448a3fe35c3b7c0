"""Does a concept change the rest of its class, and which preservation loss prevents it?

Concepts of the storybook are trained on five images without hat, glasses or scarf, with the demo's
settings except for one embedding per token, a constant learning rate and a batch of two, as in
ClassDiffusion's code; once per preservation loss. Each concept and loss has one run, but three for
no preservation and for the default, to estimate their spread. Steps 200 and 500 are scored with one
seed, step 1500 with three.

Identity: share of images that show the concept. Prompt: share of requested attributes shown.
Composition: share of images in which the requested accessory is worn; "of base" is its ratio to the
base's own share for the class word, with the same prompts and seeds, over all concepts. Class
drift: change of images of the class word against the base; drift: change of images of other things.
By default `context_output` compares phrases that name the requested accessories; "of places alone"
names none, as for content that nobody anticipated.

The cost of a step is the CPU time of its one thread over that of a step without preservation, by
medians over runs in turns, which other load affects little; for losses on texts, which only every
sixth step has, also over the other steps of the same runs. Memory is the peak of a run's tensors
over that without preservation.

Trained concepts and scores are stored in `--folder`; an interrupted run resumes.

    python scripts/bench/class_preservation.py --json scripts/bench/results/class_preservation.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import _common
import _saves
import _workers
import torch
from _class_scorer import RATES, STEPS, Scorer
from _workers import folder_name, weights_of
from _worlds.storybook_concepts import concept

from customize.core import preservation
from customize.demo.experiment import TRAINING
from customize.evaluation import pareto_front, storybook_rates
from customize.storybook.caption_grammar import BACKGROUND_PHRASES
from customize.training import class_preservation, losses
from customize.training.config import TrainConfig

NOTHING = "nothing"
PRIOR = {"prior_weight": 1.0, "prior_count": 24, "validation_guidance": storybook_rates.GUIDANCE}
METHODS: dict[str, dict[str, Any]] = {
    NOTHING: {"preserve": {}},
    "class_text, paper": {"preserve": {"class_text": 1.0}},
    "class_text, published code": {
        "preserve": {"class_text": 1.0},
        "preserve_pooling": "published",
    },
    "context_text": {"preserve": {"context_text": 1.0}},
    "output": {"preserve": {"output": 1.0}},
    "prior": {"preserve": {}} | PRIOR,
    "context_output": {"preserve": {"context_output": 1.0}},
    "context_output, half the weight": {"preserve": {"context_output": 0.5}},
    "context_output, of places alone": {
        "preserve": {"context_output": 1.0},
        "preserve_phrases": tuple(
            f"a photo of {{}} {place}" for place in BACKGROUND_PHRASES.values()
        ),
    },
    "context_output and output": {"preserve": {"context_output": 1.0, "output": 1.0}},
}
TEXT = tuple(name for name in METHODS if "_text" in name)


@dataclass(frozen=True)
class Protocol:
    """The sizes of the benchmark.

    Attributes:
        concepts: numbers of :func:`_scorer.concept`.
        saves: the steps that are scored; the last ends the run.
        every: steps between checkpoints, a divisor of all saves.
        seeds: of the images; saves before the last use the first seed only.
        scenes: images of the concept per seed.
        again: further training seeds for no preservation and the default, which differ least; each
            run counts like another concept.
        cost_steps: steps of a run whose cost is measured.
        cost_runs: such runs of each way.
    """

    concepts: tuple[int, ...]
    saves: tuple[int, ...]
    every: int
    seeds: tuple[int, ...]
    scenes: int
    again: tuple[int, ...]
    cost_steps: int
    cost_runs: int


FULL = Protocol((0, 1, 3, 4, 6, 7), (200, 500, 1500), 100, (1, 2, 3), 6, (1, 2), 42, 3)
QUICK = Protocol((0,), (10, 20), 10, (1,), 3, (), 12, 1)


def protocol_of(args: argparse.Namespace) -> Protocol:
    return QUICK if args.quick else FULL


def default() -> str:
    """The way that is the default of training."""
    fields = TrainConfig.model_fields
    settings = {key: fields[key].default for key in ("preserve", "prior_weight")}
    ways = {name: {"prior_weight": 0.0} | how for name, how in METHODS.items()}
    return next(
        name for name, how in ways.items() if {key: how[key] for key in settings} == settings
    )


# --- learning and scoring -----------------------------------------------------------------------


def training(protocol: Protocol) -> dict[str, Any]:
    return TRAINING | {
        "layerwise_tokens": False,
        "batch_size": 2,
        "lr_schedule": "constant",
        "steps": protocol.saves[-1],
        "checkpoint_every": protocol.every,
        "keep_checkpoints": protocol.saves[-1] // protocol.every,
        "record_inputs": False,
    }


def config_of(args: argparse.Namespace, method: str, index: int, seed: int) -> TrainConfig:
    """The settings of a run; ways differ in `preserve` only."""
    story = concept(index)
    return TrainConfig(
        base=str(args.base),
        images=args.folder / "pictures" / story.name,
        # In one folder, where the directions shared by a base are recorded once.
        output=args.folder / f"{run_name(method)}-{story.name}-{seed}",
        name=story.name,
        class_word=story.identity.kind,
        slice=index,
        seed=seed,
        **(training(protocol_of(args)) | METHODS[method]),
    )


def run_name(method: str) -> str:
    """A folder name that depends on the settings, so that ways can be added to earlier runs."""
    text = hashlib.sha256(json.dumps(METHODS.get(method), sort_keys=True).encode())
    return f"{folder_name(method)}-{text.hexdigest()[:4]}"


def do(args: argparse.Namespace, scorer: Scorer, job: str) -> None:
    """Train and score the job "way/concept/seed", or the base; skip finished ones."""
    from customize.training.recipe import train

    path = cell_file(args, job)
    if path.exists():
        return
    method, index, seed = job.rsplit("/", 2)
    protocol, rows = protocol_of(args), []
    if method == "base":
        rows = [{"step": 0, "rates": scorer.rates(int(index), None, protocol.seeds)}]
    else:
        started = time.time()
        config = config_of(args, method, int(index), int(seed))
        finished = train(config, progress=False)
        print(f"learned {job} in {time.time() - started:.0f} s", flush=True)
        for step in protocol.saves:
            seeds = protocol.seeds if step == protocol.saves[-1] else protocol.seeds[:1]
            saved = _saves.concept_at(finished, config.output, step, scorer.family)
            rows.append({"step": step, "rates": scorer.rates(int(index), saved, seeds)})
    _workers.keep(path, rows)
    for row in rows:
        text = " ".join(f"{key} {mean(r[key] for r in row['rates']):.3f}" for key in RATES)
        print(f"{job:36} {row['step']:5} {text}", flush=True)


def cell_file(args: argparse.Namespace, job: str) -> Path:
    """The file for a job's rows, in a folder named by a digest of the settings of the scores."""
    depends = hashlib.sha256(repr((astuple(protocol_of(args)), STEPS)).encode())
    for path in [Path(storybook_rates.__file__), *weights_of(args.judges)]:
        depends.update(path.read_bytes())
    method, index, seed = job.rsplit("/", 2)
    name = f"{run_name(method)}-{index}-{seed}.json"
    return args.folder / f"scores-{depends.hexdigest()[:8]}" / name


# --- cost ---------------------------------------------------------------------------------------


def costs(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The cost of a step of each way over one without preservation, in runs in turns."""
    protocol = protocol_of(args)
    times: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for turn in range(protocol.cost_runs):
        for method in list(METHODS)[:: 1 if turn % 2 else -1]:
            times[method].append(_common.apart(lambda method=method: step_times(args, method)))
    memory = {method: _common.apart(lambda method=method: peak(args, method)) for method in METHODS}

    def seconds(method: str) -> float:
        return mean(statistics.median(kind) for kind in by_kind(times[method]))

    results = {}
    for method in METHODS:
        first, *others = (statistics.median(kind) for kind in by_kind(times[method]))
        results[method] = {
            "step_cost": seconds(method) / seconds(NOTHING),
            # Against other steps of the same runs, which is more exact.
            "text_cost": (first / mean(others) - 1.0) / class_preservation.PRESERVATION_INTERVAL
            if method in TEXT
            else 0.0,
            "memory_cost": memory[method] / memory[NOTHING],
        }
    return results


def by_kind(runs: Sequence[Sequence[float]]) -> list[list[float]]:
    """The times of all steps with phrases, and of all one, two and three steps later."""
    every = class_preservation.PRESERVATION_INTERVAL
    return [[time for run in runs for time in run[kind::every]] for kind in range(every)]


def step_times(args: argparse.Namespace, method: str) -> list[float]:
    """The CPU time of each step of a run except the first few."""
    times: list[float] = []
    short_run(args, method, lambda *_: times.append(time.process_time()))
    # The callback comes after a step, so the first difference is the second step's.
    return [b - a for a, b in pairwise(times)][class_preservation.PRESERVATION_INTERVAL - 1 :]


def peak(args: argparse.Namespace, method: str) -> int:
    return _common.tensors_peak(lambda: short_run(args, method), torch.device("cpu"))


def short_run(args: argparse.Namespace, method: str, on_step: Any = None) -> None:
    """A few steps in a temporary folder, without preparation and results."""
    from customize.training.recipe import train

    torch.set_num_threads(1)
    steps = protocol_of(args).cost_steps if on_step else 2
    cheap = {"num_shared_directions": 0, "steps": steps, "warmup_steps": 0, "checkpoint_every": 0}
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(args, method, protocol_of(args).concepts[0], 0)
        values = config.model_dump() | cheap | {"output": Path(folder) / "out"}
        if values["prior_weight"]:
            values |= {"prior_count": 2, "validation_steps": 1}
        train(TrainConfig(**values), progress=False, on_step=on_step)


# --- the whole ----------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    protocol = protocol_of(args)
    depends = hashlib.sha256(json.dumps(training(protocol), sort_keys=True).encode())
    sources = [Path(module.__file__) for module in (preservation, class_preservation, losses)]
    for path in [*sources, *weights_of(args.base)]:
        depends.update(path.read_bytes())
    args.folder = args.folder / f"{depends.hexdigest()[:8]}-{protocol.saves[-1]}"
    for index in protocol.concepts:
        concept(index).write(args.folder / "pictures" / concept(index).name)

    cost = costs(args)
    jobs = [f"{method}/{i}/0" for i in protocol.concepts for method in ("base", *METHODS)]
    jobs += [
        f"{method}/{i}/{seed}"
        for seed in protocol.again
        for i in protocol.concepts
        for method in (NOTHING, default())
    ]
    # The first run records the shared directions, which two runs would do twice.
    _workers.share_out(args, "do", jobs[1:2])
    _workers.share_out(args, "do", jobs)
    rows = table(args, jobs, cost)
    return rows, figures(rows, cost) | loss_error(args, jobs)


def table(
    args: argparse.Namespace, jobs: Sequence[str], cost: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """A row per way and number of steps: rates over concepts, with their spread over seeds."""
    results: dict[tuple[str, int], list[list[dict[str, float]]]] = {}
    for job in jobs:
        for row in json.loads(cell_file(args, job).read_text()):
            results.setdefault((job.rsplit("/", 2)[0], row["step"]), []).append(row["rates"])
    base = mean(rates["composition"] for seeds in results["base", 0] for rates in seeds)
    rows = []
    for method, step in results:
        # A mean over concepts for each seed.
        runs = [
            {key: mean(rates[key] for rates in seed) for key in RATES}
            for seed in zip(*results[method, step], strict=True)
        ]
        row: dict[str, Any] = {"preserved": method, "steps": step}
        for key in RATES:
            values = [each[key] for each in runs]
            row[key] = mean(values)
            if key in ("identity", "composition") and len(values) > 1:
                row[f"{key}_sd"] = stdev(values)
        row["of_base"] = row["composition"] / base if base else 0.0
        rows.append(row | dict(cost.get(method, {})))
    return sorted(rows, key=lambda row: (row["steps"], ("base", *METHODS).index(row["preserved"])))


def figures(
    rows: Sequence[Mapping[str, Any]], cost: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    last = max(row["steps"] for row in rows)
    results = {row["preserved"]: row for row in rows if row["steps"] == last}
    default_row, none = results[default()], results[NOTHING]
    return {
        "default_identity_loss": none["identity"] - default_row["identity"],
        "default_composition_of_base": default_row["of_base"],
        "none_composition_of_base": none["of_base"],
        "text_loss_step_cost": max(cost[method]["text_cost"] for method in TEXT),
    }


def loss_error(args: argparse.Namespace, jobs: Sequence[str]) -> dict[str, float]:
    """The standard error of the default's identity loss, over pairs of runs."""
    ways = [
        [
            mean(rates["identity"] for rates in json.loads(path.read_text())[-1]["rates"])
            for path in (cell_file(args, job) for job in jobs if job.startswith(f"{way}/"))
        ]
        for way in (NOTHING, default())
    ]
    lost = [none - own for none, own in zip(*ways, strict=True)]
    return {"default_identity_loss_se": stdev(lost) / len(lost) ** 0.5} if lost[1:] else {}


def plot(rows: Sequence[Mapping[str, Any]], seeds: int, path: Path) -> None:
    """Plot identity against composition after the last step, with one standard error over seeds."""
    last = max(row["steps"] for row in rows)
    points = []
    for row in rows:
        if row["steps"] == last:
            spread = [row.get(f"{key}_sd") for key in ("composition", "identity")]
            errors = [None if sd is None else sd / seeds**0.5 for sd in spread]
            point = pareto_front.Point(
                row["preserved"], row["composition"], row["identity"], *errors
            )
            points.append(point)
    pareto_front.save_plot(points, "composition", "identity", path)


def main() -> None:
    parser = _common.parser(__doc__)
    _workers.add_arguments(parser, "runs/class_preservation", "do")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the last rows to a .png")
    args = parser.parse_args()
    if args.do is None:
        rows, results = run(args)
        _common.report("class_preservation", args, rows, results)
        if args.plot is not None:
            plot(rows, len(protocol_of(args).seeds), args.plot)
        return
    torch.set_num_threads(1)
    scorer = Scorer(args.base, args.judges, protocol_of(args).scenes) if args.do else None
    for job in args.do:
        assert scorer is not None
        do(args, scorer, job)


if __name__ == "__main__":
    main()
