"""Does merging preserve each concept's identity? Our merges and others, with the same seeds.

Thirteen concepts of the storybook are trained separately on five images each, four times: with
slices orthogonal to the directions common to all prompts, with the paper's disjoint slices, all
with the same slice (the paper's worst case), and as ordinary LoRAs; otherwise with the demo's
settings, token embeddings included. They are merged K at a time by each method, at the method's
best single weight, tuned on six other concepts than the six that are scored. The same six are
scored at every K, in merges that start with the first or the second three. Pairs of one class and
of two classes are merged as well, at the weights tuned for K = 3; two of the six pairs of one class
were part of the tuning, which favours methods with a tuned weight. Trained concepts and scores are
stored in `--folder`, so an interrupted run resumes; delete the scores after a change to merging,
drawing or scoring.

Fusion needs no weight: it is shown at weight 1. The average of K updates at weight K equals their
sum at weight 1, so tuning would make the two rows equal: the average is shown at weight 1, as users
get it.

With `--world stickers` the concepts are held-out subjects of the stickers, whose artwork
`make stickers` installs.

    python scripts/bench/merge_identity.py --json scripts/bench/results/merge_identity.json
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import _common
import _workers
import torch
from _merges import (
    AVERAGE,
    AVOIDING,
    METHODS,
    OURS,
    PLAIN,
    SAME,
    SLICED,
    SUMS,
    Learned,
    by_ours,
)
from _scorer import RATES, Scorer, open_quietly
from _workers import folder_name, weights_of
from _worlds.bench_world import WORLDS
from _worlds.storybook_concepts import KINDS

from customize.core.lowrank import norm
from customize.demo.experiment import TRAINING
from customize.families import family_of
from customize.training.config import TrainConfig

Groups = tuple[tuple[int, ...], ...]
SCORED: Groups = ((0, 1, 2), (9, 10, 11))
PAIRS: dict[str, Groups] = {
    "same class": ((0, 2), (1, 5), (3, 10)),
    "mixed classes": ((0, 1), (2, 9), (10, 11)),
}
TUNED_ON: Groups = ((3, 4, 5), (6, 7, 8))
# Weights are tried a factor of 1.6 apart, and on past the ends of a list while the end is best.
STEP = 1.6
WEIGHT_RANGE = (0.05, 4.0)
FOLDERS = {
    "storybook": Path("runs/merge_identity"),
    "stickers": Path("runs/merge_identity_stickers"),
}
LEARNED = (AVOIDING, SLICED, SAME, PLAIN)
TOKENS = "tokens only, no weights"


@dataclass(frozen=True)
class Protocol:
    """The sizes of the benchmark."""

    total: int
    counts: tuple[int, ...]
    weights: tuple[float, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    scenes: int
    scored: Groups
    pairs: tuple[str, ...]


FULL = Protocol(
    len(KINDS), (3, 5, 9, 13), (0.4, 0.64, 1.0), (1, 2, 3), (11,), 6, SCORED, tuple(PAIRS)
)
QUICK = Protocol(3, (3,), (1.0,), (1,), (), 4, SCORED[:1], ())
QUICK_STEPS = 40


# --- learning ---------------------------------------------------------------------------------


def training(args: argparse.Namespace) -> dict[str, Any]:
    """The demo's settings without preservation, as merges are compared."""
    settings = TRAINING | {"steps": args.steps, "checkpoint_every": 0, "preserve": {}}
    return settings | WORLDS[args.world].training


def config_of(args: argparse.Namespace, kind: str, index: int) -> TrainConfig:
    """The settings of a training; the kinds differ in slice, shared directions and method only."""
    concept = WORLDS[args.world].concept(index)
    settings: dict[str, dict[str, Any]] = {
        AVOIDING: {"slice": index},
        SLICED: {"slice": index, "num_shared_directions": 0},
        SAME: {"slice": 0, "num_shared_directions": 0},
        PLAIN: {"method": "lora"},
    }
    return TrainConfig(
        base=str(args.base),
        images=args.folder / "pictures" / concept.name,
        output=args.folder / folder_name(kind) / concept.name,
        name=concept.name,
        class_word=concept.class_word,
        **training(args),
        **settings[kind],
    )


def learn(args: argparse.Namespace, job: str) -> None:
    """Train the concept of a job, "kind/number"; skip finished ones."""
    from customize.training.recipe import train

    kind, index = job.rsplit("/", 1)
    started = time.time()
    train(config_of(args, kind, int(index)), progress=False)
    print(f"learned {job} in {time.time() - started:.0f} s", flush=True)


# --- scoring ----------------------------------------------------------------------------------


def members(count: int, scored: Sequence[int], total: int) -> list[int]:
    """`count` concepts including the scored ones: these and the following, cyclically."""
    return [(scored[0] + k) % total for k in range(count)]


def score(args: argparse.Namespace, scorer: Scorer, job: str) -> None:
    """Score the cell of `job`, "method/K", into a file of its own; a finished one is kept."""
    path = cell_file(args, job)
    if path.exists():
        return
    method, setting = job.rsplit("/", 1)
    protocol = QUICK if args.quick else FULL
    if setting in PAIRS:
        rows = paired(args, scorer, method, setting, protocol)
    elif setting == "1":
        rows = alone(args, scorer, method, protocol)
    else:
        rows = merged(args, scorer, method, int(setting), protocol)
    _workers.keep(path, rows)
    for row in rows:
        rates = f"identity {row['identity']:.3f} prompt {row['prompt']:.3f}"
        print(f"{row['method']:42} {setting:>13} w={row['weight']:.2g} {rates}", flush=True)


def cell_file(args: argparse.Namespace, job: str) -> Path:
    """The file for a job's rows, in a folder named by a digest of the settings of the scores."""
    depends = hashlib.sha256(repr(astuple(QUICK if args.quick else FULL)).encode())
    sources = WORLDS[args.world].sources
    for path in [*sources, *weights_of(args.base), *weights_of(args.judges)]:
        depends.update(path.read_bytes())
    return args.folder / f"scores-{depends.hexdigest()[:8]}" / f"{folder_name(job)}.json"


def row_of(
    method: str,
    count: int,
    weight: float,
    results: Sequence[Mapping[str, float]],
    classes: str = "mixed classes",
) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method, "k": count, "classes": classes, "weight": weight}
    return row | spread_of(results)


def spread_of(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean and standard deviation of each rate over seeds."""
    row = {}
    for key in RATES:
        values = [r[key] for r in results]
        row[key] = mean(values)
        row[f"{key}_sd"] = stdev(values) if len(values) > 1 else 0.0
    return row


def load(args: argparse.Namespace, kind: str, indices: Sequence[int]) -> list[Learned]:
    return [Learned.load(config_of(args, kind, index).output) for index in indices]


def alone(
    args: argparse.Namespace, scorer: Scorer, method: str, protocol: Protocol
) -> list[dict[str, Any]]:
    """Each concept alone at full weight, or its tokens without weights."""
    kind = AVOIDING if method == TOKENS else method.removeprefix("alone, ")
    results = []
    for index in (i for group in protocol.scored for i in group):
        (one,) = load(args, kind, [index])
        products = None if method == TOKENS else by_ours("sum")(scorer.family, [one], 1.0)
        results.append(
            scorer.rates(products, [one.concept], [index], protocol.seeds, protocol.scenes)
        )
    return [row_of(method, 1, 0.0 if method == TOKENS else 1.0, over(results))]


def paired(
    args: argparse.Namespace, scorer: Scorer, method: str, classes: str, protocol: Protocol
) -> list[dict[str, Any]]:
    """One method on pairs, both of which are scored, at its weight of K = 3."""
    kind, merge = METHODS[method]
    weight = json.loads(cell_file(args, f"{method}/3").read_text())[0]["weight"]
    results = []
    for pair in PAIRS[classes]:
        learned = load(args, kind, pair)
        products = merge(scorer.family, learned, weight)
        concepts = [entry.concept for entry in learned]
        results.append(scorer.rates(products, concepts, pair, protocol.seeds, protocol.scenes))
    return [row_of(method, 2, weight, over(results), classes)]


def over(results: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """The mean over concepts or groups per seed; `results` has a list of seeds for each."""
    return [
        {key: mean(r[key] for r in seed) for key in RATES} for seed in zip(*results, strict=True)
    ]


def merged(
    args: argparse.Namespace, scorer: Scorer, method: str, count: int, protocol: Protocol
) -> list[dict[str, Any]]:
    """One method at one K, at its best weight; sums of slices at full weight as well."""
    kind, merge = METHODS[method]
    weight = 1.0
    tried: dict[float, float] = {}

    def rates(weight: float, groups: Groups, seeds: Sequence[int]) -> list[dict[str, float]]:
        results = []
        for group in groups:
            chosen = load(args, kind, members(count, group, protocol.total))
            products = merge(scorer.family, chosen, weight)
            concepts = [entry.concept for entry in chosen]
            results.append(scorer.rates(products, concepts, group, seeds, protocol.scenes))
        return over(results)

    def quality(weight: float) -> float:
        results = rates(weight, TUNED_ON, protocol.tuning_seeds)
        value = mean(r["identity"] + r["prompt"] for r in results)
        print(f"{method} K={count} w={weight:.3g}: {value:.3f}", flush=True)
        return value

    if len(protocol.weights) > 1 and method != AVERAGE and not method.endswith("fusion"):
        weight, tried = best_weight(quality, protocol.weights)
    rows = []
    for used in dict.fromkeys((weight, 1.0) if method in SUMS else (weight,)):
        results = rates(used, protocol.scored, protocol.seeds)
        name = method if used == weight else f"{method}, at full weight"
        text = ", ".join(f"{w:.3g}: {tried[w]:.2f}" for w in sorted(tried))
        rows.append(row_of(name, count, used, results) | {"identity + prompt tuned": text})
    return rows


def costs(args: argparse.Namespace, protocol: Protocol) -> dict[tuple[str, int], dict[str, float]]:
    """The cost of each merge: seconds, the median of three, and peak memory in MiB."""
    family = family_of(open_quietly(args.base).components)
    results = {}
    for method, (kind, merge) in METHODS.items():
        for count in protocol.counts:
            chosen = load(args, kind, members(count, protocol.scored[0], protocol.total))
            call = functools.partial(merge, family, chosen, 1.0)
            seconds = []
            for _ in range(3):
                started = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - started)
            peak = _common.tensors_peak(call, torch.device("cpu")) / 2**20
            results[method, count] = {"merge_seconds": median(seconds), "merge_mib": peak}
    return results


def best_weight(
    quality: Callable[[float], float], weights: Sequence[float]
) -> tuple[float, dict[float, float]]:
    """The weight of the highest quality, and all that were tried, extending `weights` at its ends.

    The largest of equals is returned.
    """
    tried = {weight: quality(weight) for weight in weights}
    while True:
        best = max(tried, key=lambda w: (tried[w], w))
        further = [best / STEP] if best == min(tried) else []
        further += [best * STEP] if best == max(tried) else []
        further = [w for w in further if WEIGHT_RANGE[0] <= w <= WEIGHT_RANGE[1]]
        if not further:
            return best, tried
        tried |= {weight: quality(weight) for weight in further}


# --- the whole --------------------------------------------------------------------------------


def concepts_folder(args: argparse.Namespace) -> Path:
    """The folder of the concepts that these settings and this base lead to."""
    depends = hashlib.sha256(json.dumps(training(args), sort_keys=True).encode())
    for path in weights_of(args.base):
        depends.update(path.read_bytes())
    folder: Path = args.folder / f"{depends.hexdigest()[:8]}-{args.steps}"
    return folder


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    protocol = QUICK if args.quick else FULL
    args.steps = QUICK_STEPS if args.quick else args.steps
    args.folder = concepts_folder(args)
    for concept in map(WORLDS[args.world].concept, range(protocol.total)):
        concept.write(args.folder / "pictures" / concept.name)

    steps = ("--steps", str(args.steps), "--world", args.world)
    learned = [f"{kind}/{index}" for kind in LEARNED for index in range(protocol.total)]
    _workers.share_out(args, "learn", learned, *steps)
    cells = [f"alone, {kind}/1" for kind in LEARNED] + [f"{TOKENS}/1"]
    cells += [f"{method}/{k}" for k in protocol.counts for method in METHODS]
    _workers.share_out(args, "score", cells, *steps)
    pairs = [f"{method}/{classes}" for classes in protocol.pairs for method in METHODS]
    _workers.share_out(args, "score", pairs, *steps)
    known = costs(args, protocol)
    rows = [
        row | known.get((row["method"], row["k"]), {})
        for cell in (*cells, *pairs)
        for row in json.loads(cell_file(args, cell).read_text())
    ]
    return rows, figures(args, rows, protocol)


def figures(
    args: argparse.Namespace, rows: Sequence[Mapping[str, Any]], protocol: Protocol
) -> dict[str, float]:
    results = {(r["method"], r["k"]): r["identity"] for r in rows if r["k"] != 2}
    single = results[f"alone, {AVOIDING}", 1]
    result = {"identity_alone": single, "identity_tokens_only": results[TOKENS, 1]}
    for count in protocol.counts:
        result[f"identity_retention_k{count}"] = results[OURS, count] / single if single else 0.0
        peers = [results[name, count] for name in METHODS if name != OURS]
        result[f"margin_over_best_peer_k{count}"] = results[OURS, count] - max(peers)
        # At full weight, with nothing but the slices to keep concepts apart.
        retained = [
            results.get((f"{name}, at full weight", count), results[name, count])
            / max(results[f"alone, {kind}", 1], 1e-9)
            for name, kind in zip(SUMS, (AVOIDING, SLICED), strict=True)
        ]
        result[f"shared_direction_gain_k{count}"] = retained[0] - retained[1]
        won = [results[f"{PLAIN}, {how}", count] for how in ("fusion", "sum")]
        result[f"lora_fusion_minus_sum_k{count}"] = won[0] - won[1]
    for classes in protocol.pairs:
        pairs = {r["method"]: r["identity"] for r in rows if (r["k"], r["classes"]) == (2, classes)}
        key = classes.replace(" ", "_")
        result[f"identity_pairs_{key}"] = pairs[OURS]
        result[f"margin_over_best_peer_pairs_{key}"] = pairs[OURS] - max(
            value for name, value in pairs.items() if name != OURS
        )
    for kind in LEARNED:
        sizes = [
            norm(update) ** 2
            for one in load(args, kind, range(protocol.total))
            for updates in one.concept.updates.values()
            for update in updates.values()
        ]
        name = f"update_norm_{folder_name(kind).replace('-', '_')}"
        result[name] = (sum(sizes) / protocol.total) ** 0.5
    return result


def main() -> None:
    parser = _common.parser(__doc__)
    _workers.add_arguments(parser, "runs/merge_identity", "learn", "score")
    parser.set_defaults(base=None, judges=None, folder=None)  # those of the world
    parser.add_argument(
        "--world", choices=list(WORLDS), default="storybook", help="whose concepts are merged"
    )
    parser.add_argument(
        "--steps", type=int, default=TRAINING["steps"], help="training steps per concept"
    )
    args = parser.parse_args()
    world = WORLDS[args.world]
    args.base, args.judges = args.base or world.base, args.judges or world.judges
    args.folder = args.folder or FOLDERS[args.world]
    if args.learn is None and args.score is None:
        rows, measured = run(args)
        if args.world == "stickers":
            measured = {f"stickers_{name}": value for name, value in measured.items()}
        _common.report("merge_identity", args, rows, measured)
        return
    torch.set_num_threads(1)
    for job in args.learn or ():
        learn(args, job)
    scorer = Scorer(args.base, args.judges, world) if args.score else None
    for job in args.score or ():
        assert scorer is not None
        score(args, scorer, job)


if __name__ == "__main__":
    main()
