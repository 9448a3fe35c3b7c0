"""Does merging keep each concept's identity? Ours against what users would pick, same seeds.

Thirteen concepts of the miniature world are learned apart from five pictures each, three times:
with disjoint slices, all with the same slice (the paper's worst case), and as ordinary LoRAs.
They are then merged K at a time by each method, at each method's best single weight, which is
found on other concepts than those scored. The rates are of the same concepts at every K.

    python scripts/bench/merge_identity.py --json scripts/bench/results/merge_identity.json
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import _common
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict

from customize.concepts import adapter as adapters
from customize.concepts import tokens
from customize.concepts.concept import Concept
from customize.core.lowrank import MERGES, LowRank, norm
from customize.demo import TRAINING, assets
from customize.evaluation import storybook
from customize.families import family_of
from customize.storybook.judges import load_judges, to_tensor
from customize.storybook.references import StoryConcept, story_concept
from customize.training.config import TrainConfig

Products = dict[str, dict[str, LowRank]]

# Two dogs among the three that are scored: the same class blends first.
KINDS = (
    "dog",
    "cat",
    "dog",
    "robot",
    "car",
    "cat",
    "rabbit",
    "bird",
    "fish",
    "cup",
    "robot",
    "car",
    "bird",
)
SCORED = (0, 1, 2)
TUNED_ON = (3, 4, 5)
COUNTS = (1, 3, 5, 9, 13)
WEIGHTS = (0.4, 0.6, 0.8, 1.0)
SLICED, SAME, PLAIN = "disjoint slices", "same slice", "ordinary LoRA"


def concept(index: int) -> StoryConcept:
    return story_concept(f"c{index:02d}", KINDS[index], 100 + index)


# --- learning ---------------------------------------------------------------------------------


def config_of(folder: Path, base: Path, kind: str, index: int, steps: int) -> TrainConfig:
    """The demo's settings; only the slice and the method differ."""
    story = concept(index)
    images = folder / "pictures" / story.name
    if not images.is_dir():
        story.write(images)
    settings = TRAINING | {"steps": steps, "checkpoint_every": 0}
    return TrainConfig(
        base=str(base),
        images=images,
        output=folder / kind.replace(" ", "-") / story.name,
        name=story.name,
        class_word=story.identity.kind,
        method="lora" if kind == PLAIN else "orthogonal",
        slice={SLICED: index, SAME: 0, PLAIN: None}[kind],
        **settings,
    )


def learn_share(folder: Path, base: Path, steps: int, jobs: Sequence[str]) -> None:
    """What one worker process does: learn its share of the concepts on one core."""
    from customize.training.loop import train

    torch.set_num_threads(1)
    for job in jobs:
        kind, index = job.rsplit("/", 1)
        began = time.time()
        train(config_of(folder, base, kind, int(index), steps), progress=False)
        print(f"learned {job} in {time.time() - began:.0f} s", flush=True)


def learn_all(folder: Path, base: Path, steps: int, jobs: Sequence[str], workers: int) -> None:
    """Learn all concepts in worker processes of one core each; finished ones are kept."""
    running = []
    for worker in range(workers):
        share = [
            *("--learn", *jobs[worker::workers]),
            *("--folder", str(folder), "--base", str(base), "--steps", str(steps)),
        ]
        running.append(subprocess.Popen([sys.executable, __file__, *share]))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("a concept could not be learned; see above")


# --- merging ----------------------------------------------------------------------------------


def by_products(method: str) -> Callable[[Any, Sequence[Concept], float], Products]:
    """One of our merges: on the products, with one weight for all."""

    def merge(family: Any, concepts: Sequence[Concept], weight: float) -> Products:
        first = concepts[0].products
        return {
            part: {
                module: MERGES[method](
                    [c.products[part][module] for c in concepts], [weight] * len(concepts)
                )
                for module in first[part]
            }
            for part in first
        }

    return merge


def by_peft(combination: str) -> Callable[[Any, Sequence[Concept], float], Products]:
    """peft's `add_weighted_adapter`, run as users run it; its result is read back as products."""

    def merge(family: Any, concepts: Sequence[Concept], weight: float) -> Products:
        merged: Products = {}
        for part in concepts[0].products:
            fitted = [adapters.fit({part: c.products[part]}, family)[part] for c in concepts]
            names = [f"a{k}" for k in range(len(concepts))]
            rank = fitted[0][next(iter(fitted[0]))].rank
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(fitted[0]))
            model = get_peft_model(family.components[part], config, adapter_name=names[0])
            try:
                for name, updates in zip(names, fitted, strict=True):
                    if name != names[0]:
                        model.add_adapter(name, config)
                    state = {}
                    for module, update in updates.items():
                        state[f"base_model.model.{module}.lora_A.weight"] = update.down
                        state[f"base_model.model.{module}.lora_B.weight"] = update.up * update.scale
                    set_peft_model_state_dict(model, state, adapter_name=name)
                extra = {} if combination == "linear" else {"density": 0.5}
                torch.manual_seed(0)
                model.add_weighted_adapter(
                    names, [weight] * len(names), "merged", combination_type=combination, **extra
                )
                layers = dict(model.base_model.model.named_modules())
                merged[part] = {
                    module: LowRank(
                        layers[module].lora_B["merged"].weight.detach().clone(),
                        layers[module].lora_A["merged"].weight.detach().clone(),
                        layers[module].scaling["merged"],
                    )
                    for module in fitted[0]
                }
            finally:
                model.unload()
        return merged

    return merge


METHODS: dict[str, tuple[str, Callable[[Any, Sequence[Concept], float], Products]]] = {
    "Orthogonal Adaptation, sum": (SLICED, by_products("sum")),
    "same slice for all, sum": (SAME, by_products("sum")),
    "ordinary LoRA, sum": (PLAIN, by_products("sum")),
    "ordinary LoRA, average": (PLAIN, by_products("average")),
    "peft linear": (PLAIN, by_peft("linear")),
    "peft ties": (PLAIN, by_peft("ties")),
    "peft dare_linear": (PLAIN, by_peft("dare_linear")),
}
OURS = "Orthogonal Adaptation, sum"


# --- scoring ----------------------------------------------------------------------------------


class Scorer:
    """Draws and judges concepts of a merged model."""

    def __init__(self, base: Path, judges: Path, scenes: int) -> None:
        self.pipe = DiffusionPipeline.from_pretrained(base)
        self.pipe.set_progress_bar_config(disable=True)
        self.family = family_of(self.pipe.components)
        self.judges = load_judges(judges)
        self.scenes = storybook.SCENES[:scenes]

    def rates(
        self,
        products: Products | None,
        concepts: Sequence[Concept],
        scored: Sequence[int],
        seeds: Sequence[int],
    ) -> list[dict[str, float]]:
        """Attach updates and all tokens; identity, prompt and leak rates a seed, over `scored`.

        `products` None leaves the weights as they are: what the tokens do alone.
        """
        dictionaries = self.family.token_dictionaries()
        added, adapter, rows = [], None, []
        try:
            for c in concepts:
                names = tokens.entries(c.info.trigger, c.info.num_tokens)
                for dictionary in dictionaries:
                    tokens.add_tokens(dictionary, names, c.embeddings[dictionary.key])
                added.append(names)
            if products is not None:
                adapter = adapters.attach_products(self.family, products, name="merged")
            for seed in seeds:
                found = []
                for index in scored:
                    story = concept(index)
                    prompts = storybook.prompts_for(story.trigger, self.scenes)
                    images = storybook.draw(self.pipe, prompts, seed)
                    signature = self.judges.signature(to_tensor(story.pictures()))
                    kind = story.identity.kind
                    found.append(
                        storybook.rate_concept(
                            self.judges, images, prompts, signature, kind, story.shown
                        )
                    )
                rows.append(
                    {k: mean(getattr(r, k) for r in found) for k in ("identity", "prompt", "leak")}
                )
        finally:
            if adapter is not None:
                adapter.remove()
            for names in reversed(added):
                for dictionary in dictionaries:
                    tokens.remove_tokens(dictionary, names)
        return rows


def members(count: int, scored: Sequence[int], total: int) -> list[int]:
    """`count` concepts that hold the scored ones: they and those that follow, around the circle."""
    first = scored[0]
    return [(first + k) % total for k in range(count)]


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    counts = (1, 3) if args.quick else COUNTS
    weights = (1.0,) if args.quick else WEIGHTS
    seeds = (1,) if args.quick else (1, 2, 3)
    total = 3 if args.quick else len(KINDS)
    steps = 60 if args.quick else args.steps
    digest = hashlib.sha256(
        (args.base / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    ).hexdigest()
    folder = args.folder / f"{digest[:8]}-{steps}"
    kinds = (SLICED, SAME, PLAIN)
    learn_all(
        folder, args.base, steps, [f"{k}/{i}" for i in range(total) for k in kinds], args.workers
    )
    learned = {
        k: [Concept.load(config_of(folder, args.base, k, i, steps).output) for i in range(total)]
        for k in kinds
    }
    scorer = Scorer(args.base, args.judges, 4 if args.quick else 8)

    rows: list[dict[str, Any]] = []

    def add(
        method: str, count: int, weight: float, found: list[dict[str, float]], seconds: float
    ) -> None:
        row: dict[str, Any] = {"method": method, "k": count, "weight": weight}
        for key in ("identity", "prompt", "leak"):
            values = [r[key] for r in found]
            row[key] = mean(values)
            row[f"{key}_sd"] = stdev(values) if len(values) > 1 else 0.0
        rows.append(row | {"merge_seconds": seconds})
        rates = f"identity {row['identity']:.3f} prompt {row['prompt']:.3f}"
        print(f"{method:28} K={count:2} w={weight:.1f} {rates}", flush=True)

    def each_alone(kind: str, with_weights: bool = True) -> list[dict[str, float]]:
        found = []
        for index in SCORED[:total]:
            one = learned[kind][index]
            products = by_products("sum")(scorer.family, [one], 1.0) if with_weights else None
            found.append(scorer.rates(products, [one], [index], seeds))
        return [{k: mean(f[s][k] for f in found) for k in found[0][s]} for s in range(len(seeds))]

    for kind in kinds:
        add(f"alone, {kind}", 1, 1.0, each_alone(kind), 0.0)
    add("tokens only, no weights", 1, 0.0, each_alone(SLICED, with_weights=False), 0.0)
    tuned_on = SCORED if args.quick else TUNED_ON
    for name, (kind, merge) in METHODS.items():
        for count in [k for k in counts if k > 1]:
            best, best_score = weights[0], -1.0
            for weight in weights if len(weights) > 1 else ():
                chosen = [learned[kind][i] for i in members(count, tuned_on, total)]
                found = scorer.rates(merge(scorer.family, chosen, weight), chosen, tuned_on, (11,))
                if (value := found[0]["identity"] + found[0]["prompt"]) > best_score:
                    best, best_score = weight, value
            chosen = [learned[kind][i] for i in members(count, SCORED, total)]
            began = time.perf_counter()
            products = merge(scorer.family, chosen, best)
            seconds = time.perf_counter() - began
            add(name, count, best, scorer.rates(products, chosen, SCORED[:total], seeds), seconds)
            if count == max(counts):
                add(
                    f"{name}, at full weight",
                    count,
                    1.0,
                    scorer.rates(merge(scorer.family, chosen, 1.0), chosen, SCORED, seeds),
                    seconds,
                )
    return rows, figures(rows, learned)


def figures(
    rows: Sequence[Mapping[str, Any]], learned: Mapping[str, Sequence[Concept]]
) -> dict[str, float]:
    found = {(r["method"], r["k"]): r["identity"] for r in rows}
    alone = found[f"alone, {SLICED}", 1]
    result = {"identity_alone": alone, "identity_tokens_only": found["tokens only, no weights", 1]}
    for count in sorted({k for _, k in found if k > 1}):
        result[f"identity_retention_k{count}"] = found[OURS, count] / alone if alone else 0.0
        peers = [found[name, count] for name in METHODS if name != OURS]
        result[f"margin_over_best_peer_k{count}"] = found[OURS, count] - max(peers)
    for kind, concepts in learned.items():
        sizes = [
            norm(p) ** 2 for c in concepts for part in c.products.values() for p in part.values()
        ]
        result[f"update_norm_{kind.replace(' ', '_')}"] = (sum(sizes) / len(concepts)) ** 0.5
    return result


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--base", type=Path, default=assets() / "storybook")
    parser.add_argument("--judges", type=Path, default=assets() / "judges")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/merge_identity"),
        help="keeps the learned concepts",
    )
    parser.add_argument(
        "--steps", type=int, default=TRAINING["steps"], help="training steps a concept"
    )
    parser.add_argument("--workers", type=int, default=2, help="training processes, one core each")
    parser.add_argument("--learn", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.learn is not None:
        learn_share(args.folder, args.base, args.steps, args.learn)
        return
    _common.report("merge_identity", args, *run(args))


if __name__ == "__main__":
    main()
