"""Concepts, models, seeds, training settings and prompts of the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from customize.evaluation.storybook_rates import evaluation_prompts, unrelated_prompts

if TYPE_CHECKING:
    from torch import Tensor

Method = Literal["orthogonal", "lora"]

# Relative to the clone, as in the README's lines, so that results do not depend on its location.
BASE_NAME = "assets/storybook"
NAMES = ("rex", "tom", "bolt")
PAIRS = (("rex", "tom"), ("tom", "bolt"), ("bolt", "rex"))
# The first seed generates the images of the grid; concepts are scored over all seeds.
SEEDS = (1, 2, 3)

# About a minute per concept on two CPU cores. Merging does not change token embeddings, so they get
# the highest capacity: one embedding per layer.
TRAINING: dict[str, Any] = {
    "rank": 8,
    "layerwise_tokens": True,
    "steps": 400,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "text_learning_rate": 1e-4,
    "token_learning_rate": 5e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 10,
    "checkpoint_every": 100,
    "keep_checkpoints": 1,
}

# The models that are compared, as rows of the scorecard and of the image grid.
ORTHOGONAL_ALONE, ORTHOGONAL_MERGED, LORA_ALONE, LORA_MERGED, BASE, REFERENCES = (
    "learned alone",
    "merged",
    "ordinary LoRA alone",
    "ordinary LoRAs merged",
    "base model",
    "five references, no training",
)


@dataclass(frozen=True)
class DrawnImages:
    """The images of one model, each tensor (n, 3, 64, 64) in [-1, 1].

    Attributes:
        concepts: Name -> its images, seed after seed.
        pairs: Two names -> images of both, seed after seed.
        unrelated: Images of prompts without a concept; None if the model did not draw them.
    """

    concepts: Mapping[str, Tensor]
    pairs: Mapping[tuple[str, str], Tensor]
    unrelated: Tensor | None


def pair_prompts(words: tuple[str, str]) -> list[str]:
    """Two prompts for both of two things, left and right."""
    first, second = words
    return [
        f"a photo of {first} and {second} on a beach",
        f"a photo of {first} wearing a hat and {second} wearing glasses in a room",
    ]


def model_prompts(
    words: Mapping[str, str], pairs: Sequence[tuple[str, str]], unrelated: bool
) -> dict[Any, list[str]]:
    """Return the prompts of one model by concept name, by pair and under "unrelated".

    Args:
        words: Concept name -> its words in a prompt, a trigger or "a dog".
        pairs: Pairs of concept names.
        unrelated: Whether to include prompts without a concept.
    """
    prompts: dict[Any, list[str]] = {name: evaluation_prompts(word) for name, word in words.items()}
    prompts |= {(a, b): pair_prompts((words[a], words[b])) for a, b in pairs}
    return prompts | ({"unrelated": unrelated_prompts()} if unrelated else {})


def prompt_seeds(model: str, key: Any) -> tuple[int, ...]:
    """The seeds with which a model draws the prompts of a key of :func:`model_prompts`."""
    return SEEDS if key != "unrelated" and model != BASE else SEEDS[:1]


def group_images(images: Mapping[Any, Tensor]) -> DrawnImages:
    """Sort images by the keys of :func:`model_prompts`."""
    return DrawnImages(
        {key: tensor for key, tensor in images.items() if key in NAMES},
        {key: tensor for key, tensor in images.items() if key in PAIRS},
        images.get("unrelated"),
    )
