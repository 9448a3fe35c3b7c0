"""Metrics of the storybook: identity, prompt, composition, leak and drift, all in [0, 1].

Each image has its own seed, so that two models with the same prompts and seeds differ by their
weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from customize.errors import PipelineError
from customize.storybook.caption_grammar import (
    ACCESSORY_PHRASES,
    BACKGROUND_PHRASES,
    PromptRequest,
    parse_prompt,
)
from customize.storybook.judges import Judges

Key = TypeVar("Key")

STEPS = 25
GUIDANCE = 2.5

# Background and accessory of each evaluation prompt, combinations that no reference image shows.
SCENES = (
    ("beach", "hat"),
    ("forest", "scarf"),
    ("city", "glasses"),
    ("snow", "scarf"),
    ("room", "hat"),
    ("space", "glasses"),
    ("beach", "glasses"),
    ("snow", "hat"),
)


@dataclass(frozen=True)
class Rates:
    """Scores of one concept over several images; a share of no images is 0.

    Attributes:
        identity: Share of images that show the concept, by the judges' threshold.
        prompt: Share of requested attributes that the images show.
        composition: Share of requested accessories that the concept wears.
        leak: Share of images with an attribute of the training images that was not requested, of
            those in which that is possible.
        distance: Mean cosine distance to the concept's prototype.
    """

    identity: float
    prompt: float
    composition: float
    leak: float
    distance: float


def evaluation_prompts(words: str, scenes: Sequence[tuple[str, str]] = SCENES) -> list[str]:
    """The evaluation prompts for a thing, such as "<rex>" or "a red dog", one for each scene.

    Args:
        words: Words of the thing.
        scenes: Background and accessory of each prompt.
    """
    prompts = []
    for background, accessory in scenes:
        wearing = "" if accessory == "none" else " " + ACCESSORY_PHRASES[accessory]
        prompts.append(f"a photo of {words}{wearing} {BACKGROUND_PHRASES[background]}")
    return prompts


def unrelated_prompts() -> list[str]:
    """Eight prompts without any concept, to measure how far a model drifts on other content."""
    things = ("a red dog", "a blue cat", "a green robot", "a white car")
    return [p for k, words in enumerate(things) for p in evaluation_prompts(words)[k::4]]


def draw_prompts(
    pipe: Any,
    prompts: Sequence[str],
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:
    """Draw n prompts as (n, 3, 64, 64) in [-1, 1]; image k has the seed `1000 * seed + k`."""
    return draw_groups(pipe, {"all": prompts}, seed, steps=steps, guidance=guidance)["all"]


def draw_groups(
    pipe: Any,
    groups: Mapping[Key, Sequence[str]],
    seed: int,
    on_drawn: Callable[[int], object] | None = None,
    steps: int = STEPS,
    batch: int = 16,
    guidance: float = GUIDANCE,
) -> dict[Key, Tensor]:
    """Draw several lists of prompts in common batches.

    Args:
        pipe: Stable Diffusion pipeline of 64 x 64 pixels.
        groups: Key -> prompts; image k of each has the seed `1000 * seed + k`.
        seed: Seed of the first image of each group, in thousands.
        on_drawn: Called with the number of images of each batch.
        steps: Sampling steps.
        batch: Images per batch.
        guidance: Scale of classifier-free guidance.

    Returns:
        Key -> (prompts, 3, 64, 64) in [-1, 1], float32, on the CPU.

    Raises:
        PipelineError: An image is not finite.
    """
    jobs = [
        (text, 1000 * seed + k) for prompts in groups.values() for k, text in enumerate(prompts)
    ]
    batches: list[Tensor] = []
    for first in range(0, len(jobs), batch):
        part = jobs[first : first + batch]
        images = pipe(
            [text for text, _ in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(number) for _, number in part],
            output_type="pt",
        ).images
        batches.append(images.float().cpu() * 2 - 1)
        if not bool(torch.isfinite(batches[-1]).all()):
            raise PipelineError(
                f"the image of {part[0][0]!r} or another prompt is not finite",
                fix="choose usual weights, such as 1",
            )
        if on_drawn is not None:
            on_drawn(len(part))
    sizes = [len(prompts) for prompts in groups.values()]
    return dict(zip(groups, torch.cat(batches).split(sizes), strict=True))


def attribute_hits(
    seen: dict[str, str], request: PromptRequest, kinds: Sequence[str | None]
) -> list[bool]:
    """Whether the image shows each requested attribute.

    Args:
        seen: Predicted labels of an image.
        request: Content that its prompt requests.
        kinds: Class of each thing that the prompt names by a trigger; None for others.
    """
    hits = [seen["count"] == ("one" if len(request.things) == 1 else "two")]
    if request.background:
        hits.append(seen["place"] == request.background)
    for slot, (thing, kind) in enumerate(zip(request.things, kinds, strict=True)):
        requested = {"kind": thing.kind or kind, "colour": thing.colour, "pattern": thing.pattern}
        hits += [seen[f"{name}{slot}"] == word for name, word in requested.items() if word]
        hits.append(seen[f"accessory{slot}"] == thing.accessory)
    return hits


def accessory_hits(seen: dict[str, str], request: PromptRequest) -> list[bool]:
    """Whether each thing that is requested with an accessory wears it."""
    return [
        seen[f"accessory{slot}"] == thing.accessory
        for slot, thing in enumerate(request.things)
        if thing.accessory != "none"
    ]


def leak_hits(
    seen: dict[str, str], request: PromptRequest, training_attributes: set[str]
) -> list[bool]:
    """Whether the image shows each attribute of the training images that is not requested."""
    entries = []
    for word in sorted(training_attributes):
        if word in BACKGROUND_PHRASES and request.background and word != request.background:
            entries.append(seen["place"] == word)
        if word in ACCESSORY_PHRASES and word != request.things[0].accessory:
            entries.append(seen["accessory0"] == word)
    return entries


def _mean(hits: Sequence[bool] | Sequence[float]) -> float:
    return sum(hits) / len(hits) if hits else 0.0


def rate_concept(
    judges: Judges,
    images: Tensor,
    prompts: Sequence[str],
    prototype: Tensor,
    kind: str,
    training_attributes: set[str],
) -> Rates:
    """Score images of one concept.

    Args:
        judges: Judges of the storybook.
        images: (n, 3, 64, 64) in [-1, 1].
        prompts: One prompt per image.
        prototype: (64,), from :meth:`Judges.prototype` on reference images.
        kind: Class of the concept.
        training_attributes: Backgrounds and accessories of the training images.
    """
    distance = judges.distance(images, prototype)
    hits: list[bool] = []
    wearing: list[bool] = []
    leaks: list[bool] = []
    for seen, prompt in zip(judges.predict_attributes(images), prompts, strict=True):
        request = parse_prompt(prompt)
        hits += attribute_hits(seen, request, [kind])
        wearing += accessory_hits(seen, request)
        possible = leak_hits(seen, request, training_attributes)
        leaks += [any(possible)] if possible else []
    return Rates(
        identity=_mean((distance <= judges.threshold).tolist()),
        prompt=_mean(hits),
        composition=_mean(wearing),
        leak=_mean(leaks),
        distance=distance.mean().item(),
    )


def rate_pair(
    judges: Judges, images: Tensor, prototypes: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Score images of two concepts, one in each half.

    Args:
        judges: Judges of the storybook.
        images: (n, 3, 64, 64) in [-1, 1].
        prototypes: (64,) each, of the left and of the right concept.

    Returns:
        "left", "right", "both" -> share of images with the concept in its half.
    """
    left = judges.distance(images, prototypes[0], "left") <= judges.threshold
    right = judges.distance(images, prototypes[1], "right") <= judges.threshold
    return {
        "left": left.float().mean().item(),
        "right": right.float().mean().item(),
        "both": (left & right).float().mean().item(),
    }


def drift(before: Tensor, after: Tensor) -> float:
    """Mean absolute change of images of the same prompts and seeds, (n, 3, h, w), 0 to 1."""
    return (before - after).abs().mean().item() / 2


def attribute_accuracy(judges: Judges, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Share of requested attributes that images show, for prompts without concepts.

    Returns:
        "all", "class", "colour", "pattern", "accessory", "place" -> share.
    """
    hits: dict[str, list[bool]] = {}
    for seen, prompt in zip(judges.predict_attributes(images), prompts, strict=True):
        request = parse_prompt(prompt)
        for slot, thing in enumerate(request.things):
            requested = {
                "class": thing.kind,
                "colour": thing.colour,
                "pattern": thing.pattern or "plain",
            }
            keys = {"class": "kind", "colour": "colour", "pattern": "pattern"}
            for attribute, word in requested.items():
                if word:
                    label = seen[f"{keys[attribute]}{slot}"]
                    hits.setdefault(attribute, []).append(label == word)
            hits.setdefault("accessory", []).append(seen[f"accessory{slot}"] == thing.accessory)
        if request.background:
            hits.setdefault("place", []).append(seen["place"] == request.background)
    rates = {attribute: _mean(values) for attribute, values in hits.items()}
    return {"all": _mean([hit for values in hits.values() for hit in values])} | rates
