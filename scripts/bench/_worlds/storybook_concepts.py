"""Concepts of the storybook, and scores of drawn ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from customize.evaluation import storybook_rates
from customize.storybook.example_concepts import ExampleConcept, make_concept
from customize.storybook.judges import Judges, judge_inputs

# Two dogs among the first three, which are merged at every K, as equal classes blend first.
KINDS = (
    *("dog", "cat", "dog", "robot", "car", "cat", "rabbit"),
    *("bird", "fish", "cup", "robot", "car", "bird"),
)
RATES_FILE = Path(storybook_rates.__file__)


def concept(index: int) -> ExampleConcept:
    """One of the thirteen concepts."""
    return make_concept(f"c{index:02d}", KINDS[index], 100 + index)


def rate(
    pipe: Any, judges: Judges, concept: ExampleConcept, seed: int, scenes: int
) -> storybook_rates.Rates:
    """Draw a concept by its trigger in the first scenes, and score the images.

    Args:
        pipe: With the concept attached.
        judges: Of the storybook.
        concept: The concept.
        seed: Of the images.
        scenes: Their number.
    """
    prompts = storybook_rates.evaluation_prompts(concept.trigger, storybook_rates.SCENES[:scenes])
    images = storybook_rates.draw_prompts(pipe, prompts, seed)
    signature = judges.prototype(judge_inputs(concept.images()))
    return storybook_rates.rate_concept(
        judges, images, prompts, signature, concept.identity.kind, concept.backgrounds
    )
