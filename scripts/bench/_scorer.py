"""The scoring of merged models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _merges import Products
from _worlds.bench_world import WORLDS, BenchWorld
from diffusers import DiffusionPipeline

from customize.api.pipeline_methods import load_custom, unload_custom
from customize.concepts import adapter as adapters
from customize.concepts.types import Concept
from customize.core.lowrank import to_dense
from customize.evaluation import storybook_rates
from customize.families import family_of

RATES = ("identity", "prompt", "leak")


def open_quietly(base: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Scorer:
    """Draws images of concepts with a merged model and scores them."""

    def __init__(self, base: Path, judges: Path, world: BenchWorld = WORLDS["storybook"]) -> None:
        self.world = world
        self.pipe = open_quietly(base)
        # The fastest memory format for convolutions on a CPU.
        self.pipe.unet.to(memory_format=torch.channels_last)
        self.family = family_of(self.pipe.components)
        self.judges = world.load_judges(judges)
        # Some rows measure shared slices on purpose.
        warnings.filterwarnings("ignore", message=r".* share \d+ of \d+ columns")

    def rates(
        self,
        products: Products | None,
        concepts: Sequence[Concept],
        scored: Sequence[int],
        seeds: Sequence[int],
        scenes: int,
    ) -> list[dict[str, float]]:
        """Rates per seed over `scored`, with the updates and all concepts' tokens in the model.

        `products` None leaves the weights unchanged: the effect of the tokens alone.
        """
        with self.carrying(products, concepts):
            results = [[self.rate(index, seed, scenes) for index in scored] for seed in seeds]
        return [{key: mean(getattr(r, key) for r in rates) for key in RATES} for rates in results]

    def each(
        self,
        products: Products | None,
        concepts: Sequence[Concept],
        scored: Sequence[int],
        seeds: Sequence[int],
        scenes: int,
    ) -> dict[int, dict[str, float]]:
        """Rates and mean distance of each of `scored` over the seeds."""
        with self.carrying(products, concepts):
            results = {i: [self.rate(i, seed, scenes) for seed in seeds] for i in scored}
        keys = (*RATES, "distance")
        return {
            i: {k: mean(getattr(r, k) for r in rates) for k in keys} for i, rates in results.items()
        }

    @contextmanager
    def carrying(self, products: Products | None, concepts: Sequence[Concept]) -> Iterator[None]:
        """Apply the updates and all concepts' tokens to the model."""
        # At weight 0 a concept adds its tokens only.
        load_custom(self.pipe, *concepts, weights=[0.0] * len(concepts), fuse=True)
        try:
            with self.changed(products or {}):
                yield
        finally:
            unload_custom(self.pipe)

    def rate(self, index: int, seed: int, scenes: int) -> storybook_rates.Rates:
        return self.world.rate(self.pipe, self.judges, self.world.concept(index), seed, scenes)

    @contextmanager
    def changed(self, products: Products) -> Iterator[None]:
        """Add the updates to the weights, which costs no time while drawing."""
        before = []
        try:
            for part, updates in adapters.match_to_model(products, self.family).items():
                for module, update in updates.items():
                    weight = self.family.components[part].get_submodule(module).weight
                    before.append((weight, weight.detach().clone()))
                    with torch.no_grad():
                        weight += to_dense(update)
            yield
        finally:
            with torch.no_grad():
                for weight, old in before:
                    weight.copy_(old)
