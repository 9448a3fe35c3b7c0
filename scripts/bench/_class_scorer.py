"""Scores of one concept, and of the images that it changes besides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from _scorer import open_quietly
from _worlds.storybook_concepts import concept

from customize.api.pipeline_methods import load_custom, unload_custom
from customize.concepts.types import Concept
from customize.evaluation import storybook_rates
from customize.families import family_of
from customize.storybook.judges import judge_inputs, load_judges

STEPS = 12  # sampling steps, enough for the judges
RATES = ("identity", "prompt", "composition", "class_drift", "drift")


class Scorer:
    """Draws images with one concept at a time and scores them."""

    def __init__(self, base: Path, judges: Path, scenes: int) -> None:
        self.pipe = open_quietly(base)
        # The fastest memory format for convolutions on a CPU.
        self.pipe.unet.to(memory_format=torch.channels_last)
        self.family = family_of(self.pipe.components)
        self.judges, self.scenes = load_judges(judges), scenes
        self.before: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

    def rates(
        self, index: int, saved: Concept | None, seeds: Sequence[int]
    ) -> list[dict[str, float]]:
        """Rates per seed; of the base with the class word if `saved` is None."""
        story = concept(index)
        kind = story.identity.kind
        signature = self.judges.prototype(judge_inputs(story.images()))
        other = "cat" if kind == "dog" else "dog"
        words = f"a {kind}" if saved is None else story.trigger
        prompts = {
            "concept": storybook_rates.evaluation_prompts(
                words, storybook_rates.SCENES[: self.scenes]
            ),
            "class": storybook_rates.evaluation_prompts(f"a {kind}")[::4],
            "other": storybook_rates.evaluation_prompts(f"a red {other}")[1::4],
        }
        plain = {key: prompts[key] for key in ("class", "other")}
        for seed in seeds:
            if (kind, seed) not in self.before:
                self.before[kind, seed] = storybook_rates.draw_groups(
                    self.pipe, plain, seed, steps=STEPS
                )
        rows = []
        if saved is not None:
            load_custom(self.pipe, saved, fuse=True, merge="sum")
        try:
            for seed in seeds:
                images = storybook_rates.draw_groups(self.pipe, prompts, seed, steps=STEPS)
                rated = storybook_rates.rate_concept(
                    self.judges,
                    images["concept"],
                    prompts["concept"],
                    signature,
                    kind,
                    story.backgrounds,
                )
                before = self.before[kind, seed]
                rows.append(
                    {
                        "identity": rated.identity,
                        "prompt": rated.prompt,
                        "composition": rated.composition,
                        "class_drift": storybook_rates.drift(before["class"], images["class"]),
                        "drift": storybook_rates.drift(before["other"], images["other"]),
                    }
                )
        finally:
            if saved is not None:
                unload_custom(self.pipe)
        return rows
