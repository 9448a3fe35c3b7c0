"""Exact scores in the miniature world: whose dog it is, what was asked, what it wears, what leaked,
what drifted.

All rates are shares in [0, 1]. Pictures are drawn one seed a picture, so that two models given the
same prompts and seeds differ by their weights alone.
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
    PLACE_PHRASES,
    PromptRequest,
    parse_prompt,
)
from customize.storybook.judges import Judges

Key = TypeVar("Key")

STEPS = 25
GUIDANCE = 2.5

# Asked of each concept: every place and accessory, in combinations that the references don't show.
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
    """Scores of one concept over some pictures; `distance` is the mean one to its references.

    `identity`, `composition` and `leak` are shares of pictures: of all; of those that ask for an
    accessory, whether it is worn; of those in which something could leak, whether it did. `prompt`
    is a share of asked attributes. A share of nothing is 0.
    """

    identity: float
    prompt: float
    composition: float
    leak: float
    distance: float


def evaluation_prompts(words: str, scenes: Sequence[tuple[str, str]] = SCENES) -> list[str]:
    """The evaluation prompts for a thing named `words`, such as "<rex>" or "a red dog"."""
    prompts = []
    for place, accessory in scenes:
        wearing = "" if accessory == "none" else " " + ACCESSORY_PHRASES[accessory]
        prompts.append(f"a photo of {words}{wearing} {PLACE_PHRASES[place]}")
    return prompts


def draw_prompts(pipe: Any, prompts: Sequence[str], seed: int, steps: int = STEPS) -> Tensor:
    """Pictures (len(prompts), 3, 64, 64) in [-1, 1]; picture k takes seed `1000 * seed + k`."""
    return draw_groups(pipe, {"all": prompts}, seed, steps=steps)["all"]


def draw_groups(
    pipe: Any,
    groups: Mapping[Key, Sequence[str]],
    seed: int,
    on_pictures: Callable[[int], object] | None = None,
    steps: int = STEPS,
    batch: int = 16,
) -> dict[Key, Tensor]:
    """Draw several lists of prompts in full batches; within each, seeds count as in `draw`.

    Raises:
        PipelineError: a picture is not finite.
    """
    jobs = [
        (text, 1000 * seed + k) for prompts in groups.values() for k, text in enumerate(prompts)
    ]
    pictures = []
    for first in range(0, len(jobs), batch):
        part = jobs[first : first + batch]
        images = pipe(
            [text for text, _ in part],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(number) for _, number in part],
            output_type="pt",
        ).images
        pictures.append(images.float().cpu() * 2 - 1)
        if not bool(torch.isfinite(pictures[-1]).all()):
            raise PipelineError(
                f"a picture of {part[0][0]!r} or another prompt is not finite",
                fix="choose weights of an ordinary size, such as 1",
            )
        if on_pictures is not None:
            on_pictures(len(part))
    sizes = [len(prompts) for prompts in groups.values()]
    return dict(zip(groups, torch.cat(pictures).split(sizes), strict=True))


def attribute_hits(
    seen: dict[str, str], request: PromptRequest, kinds: Sequence[str | None]
) -> list[bool]:
    """One entry an asked attribute: is it in the picture?

    `kinds` gives the class of each thing that goes by a name.
    """
    hits = [seen["count"] == ("one" if len(request.things) == 1 else "two")]
    if request.place:
        hits.append(seen["place"] == request.place)
    for slot, (asked, kind) in enumerate(zip(request.things, kinds, strict=True)):
        wanted = {"kind": asked.kind or kind, "colour": asked.colour, "pattern": asked.pattern}
        hits += [seen[f"{what}{slot}"] == word for what, word in wanted.items() if word]
        hits.append(seen[f"accessory{slot}"] == asked.accessory)
    return hits


def accessory_hits(seen: dict[str, str], request: PromptRequest) -> list[bool]:
    """One entry a thing that is asked for with an accessory: is it worn?"""
    return [
        seen[f"accessory{slot}"] == asked.accessory
        for slot, asked in enumerate(request.things)
        if asked.accessory != "none"
    ]


def leak_hits(
    seen: dict[str, str], request: PromptRequest, training_attributes: set[str]
) -> list[bool]:
    """One entry an attribute of the training pictures that is not asked for: did it come along?"""
    entries = []
    for word in sorted(training_attributes):
        if word in PLACE_PHRASES and request.place and word != request.place:
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
    signature: Tensor,
    kind: str,
    shown: set[str],
) -> Rates:
    """Score pictures of one concept alone in the picture.

    Args:
        images: (n, 3, 64, 64) in [-1, 1], one a prompt.
        signature: (64,) from `Judges.signature` on the concept's references.
        kind: the concept's class word.
        shown: places and accessories in the training pictures, which must not leak.
    """
    distance = judges.distance(images, signature)
    hits: list[bool] = []
    wearing: list[bool] = []
    leaks: list[bool] = []
    for seen, prompt in zip(judges.predict_attributes(images), prompts, strict=True):
        request = parse_prompt(prompt)
        hits += attribute_hits(seen, request, [kind])
        wearing += accessory_hits(seen, request)
        found = leak_hits(seen, request, shown)
        leaks += [any(found)] if found else []
    return Rates(
        identity=_mean((distance <= judges.threshold).tolist()),
        prompt=_mean(hits),
        composition=_mean(wearing),
        leak=_mean(leaks),
        distance=distance.mean().item(),
    )


def rate_pair(
    judges: Judges, images: Tensor, signatures: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Share of pictures in which the left, the right, and both concepts stand in their halves."""
    left = judges.distance(images, signatures[0], "left") <= judges.threshold
    right = judges.distance(images, signatures[1], "right") <= judges.threshold
    return {
        "left": left.float().mean().item(),
        "right": right.float().mean().item(),
        "both": (left & right).float().mean().item(),
    }


def drift(before: Tensor, after: Tensor) -> float:
    """Mean absolute change of pictures of the same prompts and seeds, 0 to 1 (the full range)."""
    return (before - after).abs().mean().item() / 2


def attribute_accuracy(judges: Judges, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Share of asked attributes shown, in all and by kind, for prompts without concepts."""
    found: dict[str, list[bool]] = {}
    for seen, prompt in zip(judges.predict_attributes(images), prompts, strict=True):
        request = parse_prompt(prompt)
        for slot, asked in enumerate(request.things):
            wanted = {
                "class": asked.kind,
                "colour": asked.colour,
                "pattern": asked.pattern or "plain",
            }
            keys = {"class": "kind", "colour": "colour", "pattern": "pattern"}
            for what, word in wanted.items():
                if word:
                    found.setdefault(what, []).append(seen[f"{keys[what]}{slot}"] == word)
            found.setdefault("accessory", []).append(seen[f"accessory{slot}"] == asked.accessory)
        if request.place:
            found.setdefault("place", []).append(seen["place"] == request.place)
    every = [hit for hits in found.values() for hit in hits]
    return {"all": _mean(every)} | {what: _mean(hits) for what, hits in found.items()}
