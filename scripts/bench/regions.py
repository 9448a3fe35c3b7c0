"""Two concepts of one class in one image: does each appear in its half?

Pairs of concepts of the storybook that share a class, trained separately with the demo's settings,
are drawn in the two halves of images of 128 x 64, so that each has the size of its training images:
by plain prompts, with each merge; with `regions=`; and with regions in cross-attention only, a
reimplementation of Mix-of-Show (arXiv:2305.18292, section 3.3), with the same concepts, prompts and
seeds. The ceiling is each concept drawn alone in its half. The last rows are of 64 x 64, where the
base draws two small things.

The judge of identity looks for the thing in several crops of the half. Its reliability is measured
first, on drawn pairs after the autoencoder: how often it recognises a concept, and how often it
mistakes another identity of the class for it.

Concepts of `merge_identity.py` are used; missing ones are trained, 40 s each.

    python scripts/bench/regions.py --json scripts/bench/results/regions.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import _common
import numpy as np
import torch
import torch.nn.functional as F
from _merges import AVOIDING
from _scorer import open_quietly
from _workers import folder_name
from _worlds.storybook_concepts import KINDS, concept
from merge_identity import learn
from torch import Tensor

from customize.concepts.tokens.prompt_phrases import regional_prompts
from customize.core.region_weights import blend, box_weights, stack_regions
from customize.demo.experiment import TRAINING
from customize.evaluation.storybook_rates import GUIDANCE, STEPS
from customize.families import family_of
from customize.image_tensors import tensor_to_images
from customize.storybook.bundled_assets import assets_folder
from customize.storybook.caption_grammar import BACKGROUND_PHRASES
from customize.storybook.judges import Judges, judge_inputs, load_judges
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import Identity, compose_scene, random_identity

PAIRS = tuple(
    (a, b) for a in range(len(KINDS)) for b in range(a + 1, len(KINDS)) if KINDS[a] == KINDS[b]
)
HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
WIDE, SQUARE = (64, 128), (64, 64)
MERGES: dict[str, dict[str, Any]] = {
    "fusion": {"merge": "fusion"},
    "sum": {"merge": "sum"},
    "average": {"merge": "sum", "weights": [0.5, 0.5]},
}
# Left edges of the crops of 52 x 52 pixels, relative to the edge of the half.
SHIFTS = (-6, 0, 6, 12, 18)
CROP, TOP = 52, 10
IN_ATTENTION = "regions in cross-attention, fusion"


@dataclass(frozen=True)
class Protocol:
    pairs: tuple[tuple[int, int], ...]
    places: tuple[str, ...]
    seeds: tuple[int, ...]


PLACES = tuple(BACKGROUND_PHRASES.values())
FULL = Protocol(PAIRS, PLACES, (1, 2))
QUICK = Protocol(PAIRS[:2], PLACES[:3], (1,))


# --- the judge --------------------------------------------------------------------------------


def distances(judges: Judges, images: Tensor, signature: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine distances (batch,) of the left and the right thing to a concept.

    Args:
        judges: of the storybook.
        images: (batch, 3, 64, 64 or 128) in [-1, 1].
        signature: prototype (64,) of the concept.
    """
    if images.shape[-1] == SQUARE[1]:
        left, right = (judges.distance(images, signature, side) for side in ("left", "right"))
        return left, right
    results = []
    for half in (0, images.shape[-1] // 2):
        edges = {min(max(half + s, 0), images.shape[-1] - CROP) for s in SHIFTS}
        crops = [images[..., TOP : TOP + CROP, edge : edge + CROP] for edge in sorted(edges)]
        with torch.no_grad():
            seen = [
                judges.identity(F.interpolate(crop, (64, 64), mode="bilinear")) for crop in crops
            ]
        results.append(torch.stack([1 - each @ signature for each in seen]).amin(0))
    return results[0], results[1]


def signature(judges: Judges, index: int) -> Tensor:
    return judges.prototype(judge_inputs(concept(index).images()))


@torch.no_grad()
def trust(pipe: Any, judges: Judges, size: tuple[int, int], count: int) -> dict[str, float]:
    """Shares of drawn pairs in which the concept is recognised, and another is mistaken for it."""
    rng = np.random.default_rng(7)
    hits: list[bool] = []
    false: list[bool] = []
    for index in sorted({i for pair in PAIRS for i in pair}):
        reference = signature(judges, index)
        for _ in range(count):
            other = random_identity(rng, KINDS[index])
            pictures = []
            for pair in ((concept(index).identity, other), (other, concept(index).identity)):
                pictures.append(rendered(rng, pair, size))
            encoded = pipe.vae.encode(torch.stack(pictures)).latent_dist.mean
            left, right = distances(judges, pipe.vae.decode(encoded).sample, reference)
            near = [(d <= judges.threshold).tolist() for d in (left, right)]
            hits += [near[0][0], near[1][1]]
            false += [near[1][0], near[0][1]]
    return {"known": mean(hits), "taken": mean(false)}


def rendered(rng: np.random.Generator, pair: Sequence[Identity], size: tuple[int, int]) -> Tensor:
    """A drawn scene of two things; a wide one is two halves with one thing each, in one place."""
    if size == SQUARE:
        return judge_inputs([draw_scene(compose_scene(rng, tuple(pair)))])[0]
    place = str(rng.choice(list(BACKGROUND_PHRASES)))
    halves = [
        judge_inputs([draw_scene(compose_scene(rng, (one,), background=place))])[0] for one in pair
    ]
    shift = int(rng.integers(-6, 7))
    return torch.cat([half.roll(shift, -1) for half in halves], -1)


# --- drawing ----------------------------------------------------------------------------------


def drawn(pipe: Any, texts: Sequence[str], seed: int, size: tuple[int, int], **call: Any) -> Tensor:
    """Generate images (n, 3, *size) in [-1, 1], with one seed each, without ``together=``."""
    images = pipe(
        list(texts),
        height=size[0],
        width=size[1],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(1000 * seed + k) for k in range(len(texts))],
        output_type="pt",
        **{"together": False} | call,
    ).images
    return images.float() * 2 - 1


@contextmanager
def inside_attention(pipe: Any, prompts: Sequence[str], phrases: Sequence[str]) -> Iterator[None]:
    """Mix-of-Show's regions: each cross-attention attends to each region's prompt."""
    family = family_of(pipe.components)
    # By region, then by picture.
    texts = [
        text
        for each in zip(*(regional_prompts(p, phrases) for p in prompts), strict=True)
        for text in each
    ]
    with torch.no_grad():
        conditions = family.encode_prompts(texts)["prompt_embeds"].split(len(prompts))
    busy = False

    def compose(module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        nonlocal busy
        if busy:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        empty, asked = output.chunk(2)
        rows = round((hidden.shape[1] / 2) ** 0.5)
        weights = stack_regions([box_weights(box, rows, 2 * rows) for box in HALVES])
        busy = True
        try:
            answers = [
                module(hidden[len(empty) :], encoder_hidden_states=condition)
                for condition in conditions
            ]
        finally:
            busy = False
        asked = blend(answers, [weight.reshape(1, -1, 1) for weight in weights])
        return torch.cat([empty, asked])

    layers = [pipe.unet.get_submodule(name) for name in family.cross_attention_layers()]
    handles = [layer.register_forward_hook(compose, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_attention(pipe: Any, texts: Sequence[str], seed: int, phrases: Sequence[str]) -> Tensor:
    with inside_attention(pipe, texts, phrases):
        return drawn(pipe, texts, seed, WIDE)


# --- the whole --------------------------------------------------------------------------------


def learned(args: argparse.Namespace, index: int) -> Path:
    """The folder of a concept of `merge_identity.py`, or of one trained here."""
    name = concept(index).name
    known = sorted(args.folder.glob(f"*/{folder_name(AVOIDING)}/{name}/concept.json"))
    if known:
        return known[-1].parent
    own = argparse.Namespace(**vars(args) | {"folder": args.folder / "regions"})
    concept(index).write(own.folder / "pictures" / name)
    learn(own, f"{AVOIDING}/{index}")
    return own.folder / folder_name(AVOIDING) / name


class Tally:
    """Counts of recognised concepts per way of drawing."""

    def __init__(self, judges: Judges) -> None:
        self.judges = judges
        self.right: dict[str, list[tuple[bool, bool]]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.kept: dict[str, list[Tensor]] = {}

    def add(self, way: str, pair: Sequence[int], draw: Callable[[], Tensor]) -> None:
        """Draw and score images of a pair."""
        started = time.perf_counter()
        images = draw()
        taken = (time.perf_counter() - started) / len(images)
        left, _ = distances(self.judges, images, signature(self.judges, pair[0]))
        _, right = distances(self.judges, images, signature(self.judges, pair[1]))
        limit = self.judges.threshold
        results = zip((left <= limit).tolist(), (right <= limit).tolist(), strict=True)
        self.right.setdefault(way, []).extend(results)
        self.seconds.setdefault(way, []).append(taken)
        self.kept.setdefault(way, []).append(images)

    def row(self, way: str) -> dict[str, Any]:
        results = self.right[way]
        return {
            "drawn": way,
            "left": mean(a for a, _ in results),
            "right": mean(b for _, b in results),
            "both": mean(a and b for a, b in results),
            "pictures": len(results),
            "seconds": mean(self.seconds[way]),
        }


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    torch.set_num_threads(1)
    protocol = QUICK if args.quick else FULL
    pipe = open_quietly(args.base)
    pipe.unet.to(memory_format=torch.channels_last)
    judges = load_judges(assets_folder() / "judges")
    count = 4 if args.quick else 16
    figures: dict[str, float] = {}
    for name, size in (("wide", WIDE), ("square", SQUARE)):
        for rate, share in trust(pipe, judges, size, count).items():
            figures[f"judge_{rate}_{name}"] = share
    tally = Tally(judges)
    for pair in protocol.pairs:
        draw_pair(pipe, tally, [learned(args, index) for index in pair], pair, protocol)
        print(pair, {way: round(tally.row(way)["both"], 2) for way in tally.right}, flush=True)
    if args.pictures is not None:
        save(tally.kept, len(protocol.pairs), args.pictures)
    rows = [tally.row(way) for way in tally.right]
    return rows, figures | figures_of({row["drawn"]: row for row in rows})


def draw_pair(
    pipe: Any, tally: Tally, folders: Sequence[Path], pair: Sequence[int], protocol: Protocol
) -> None:
    """Draw one pair in all ways."""
    names = [concept(index).trigger for index in pair]
    regions = dict(zip(names, HALVES, strict=True))
    both = [f"a photo of {names[0]} and {names[1]} {place}" for place in protocol.places]
    calls: dict[str, dict[str, Any]] = {"plain": {}, "regions": {"regions": regions}}
    for seed in protocol.seeds:
        for merge, how in MERGES.items():
            pipe.load_custom(*folders, **how)
            for kind, call in calls.items():
                if (kind, merge) == ("regions", "average"):
                    continue  # each concept alone, at half its strength
                tally.add(f"{kind}, {merge}", pair, partial(drawn, pipe, both, seed, WIDE, **call))
            if merge == "fusion":
                for kind, call in calls.items():
                    way = f"{kind}, fusion, 64 x 64"
                    tally.add(way, pair, partial(drawn, pipe, both, seed, SQUARE, **call))
                tally.add(IN_ATTENTION, pair, partial(in_attention, pipe, both, seed, names))
            pipe.unload_custom()
        tally.add("each alone", pair, partial(alone, pipe, folders, names, protocol, seed))


def alone(
    pipe: Any, folders: Sequence[Path], names: Sequence[str], protocol: Protocol, seed: int
) -> Tensor:
    """The left half of images of the first concept alone, beside the right half of the second's."""
    halves = []
    for folder, name, box in zip(folders, names, HALVES, strict=True):
        pipe.load_custom(folder)
        texts = [f"a photo of {name} {place}" for place in protocol.places]
        halves.append(drawn(pipe, texts, seed, WIDE, regions={name: box}))
        pipe.unload_custom()
    middle = WIDE[1] // 2
    return torch.cat([halves[0][..., :middle], halves[1][..., middle:]], -1)


def figures_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    results = {f"plain_both_right_{merge}": rows[f"plain, {merge}"]["both"] for merge in MERGES}
    results["region_both_right_sum"] = rows["regions, sum"]["both"]
    results["region_both_right"] = rows["regions, fusion"]["both"]
    results["plain_both_right"] = max(results[f"plain_both_right_{merge}"] for merge in MERGES)
    results["attention_both_right"] = rows[IN_ATTENTION]["both"]
    results["alone_both_right"] = rows["each alone"]["both"]
    for kind in ("plain", "regions"):
        results[f"{kind}_both_right_64"] = rows[f"{kind}, fusion, 64 x 64"]["both"]
    results["seconds_over_plain"] = (
        rows["regions, fusion"]["seconds"] / rows["plain, fusion"]["seconds"]
    )
    return results


def save(kept: Mapping[str, Sequence[Tensor]], pairs: int, path: Path) -> None:
    """Save a line per way with fusion, with one image per pair, each in another place."""
    from PIL import Image

    lines = []
    for way in ("plain, fusion", IN_ATTENTION, "regions, fusion"):
        groups = kept[way][:: len(kept[way]) // pairs]  # the first seed of each pair
        chosen = [images[k % len(images)] for k, images in enumerate(groups)]
        lines.append(torch.cat([F.pad(each, (1, 1, 1, 1), value=1.0) for each in chosen], -1))
    (image,) = tensor_to_images(torch.cat(lines, -2)[None])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--base", type=Path, default=assets_folder() / "storybook")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/merge_identity"),
        help="folder of merge_identity.py",
    )
    parser.add_argument(
        "--steps", type=int, default=TRAINING["steps"], help="training steps per concept"
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="FILE", help="write one image per pair to this .png"
    )
    args = parser.parse_args()
    _common.report("regions", args, *run(args))


if __name__ == "__main__":
    main()
