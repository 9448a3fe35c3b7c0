"""Drawing rewritten prompts and judging their pictures and texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from customize.evaluation.rewards.reward import Reward
from customize.evaluation.storybook_rates import GUIDANCE, attribute_hits
from customize.image_tensors import images_to_tensor, tensor_to_images
from customize.rewriting.required_terms import find_problems, required_terms
from customize.storybook.judges import Judges
from customize.storybook.user_prompts import KINDS, SYNONYMS, UserPrompt
from customize.training.rewriting.picture_renderer import short_hash

STEPS = 12  # sampling steps, enough for the judges
BATCH = 16


@dataclass(frozen=True)
class Look:
    """What is seen in a picture.

    Attributes:
        labels: Head of the judges -> label.
        is_concept: Whether it shows the concept.
        image: The picture, (3, 64, 64) in [-1, 1].
    """

    labels: dict[str, str]
    is_concept: bool
    image: Tensor


class Pictures:
    """Pictures of texts, each drawn once.

    Args:
        pipe: Pipeline with the concept of the prompts' trigger.
        judges: Judges of the storybook.
        prototype: (64,) of the concept.
        reward: The reward that rewriters were taught with.
        folder: Keeps pictures between runs with the same pipeline.
    """

    def __init__(
        self, pipe: Any, judges: Judges, prototype: Tensor, reward: Reward | None, folder: Path
    ) -> None:
        self.pipe, self.judges, self.prototype, self.reward = pipe, judges, prototype, reward
        self.folder = folder
        self.looks: dict[tuple[str, int], Look] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def draw(self, jobs: Sequence[tuple[str, int]]) -> None:
        """Draw texts with their seeds, and look at the pictures."""
        new = [job for job in dict.fromkeys(jobs) if job not in self.looks]
        for first in range(0, len(new), BATCH):
            part = new[first : first + BATCH]
            self._draw([job for job in part if not self._file(job).is_file()])
            images = images_to_tensor([Image.open(self._file(job)) for job in part])
            near = self.judges.distance(images, self.prototype) <= self.judges.threshold
            labels = self.judges.predict_attributes(images)
            for job, seen, is_concept, image in zip(
                part, labels, near.tolist(), images, strict=True
            ):
                self.looks[job] = Look(seen, is_concept, image)

    def _draw(self, jobs: Sequence[tuple[str, int]]) -> None:
        if not jobs:
            return
        drawn = self.pipe(
            [text for text, _ in jobs],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for _, seed in jobs],
        ).images
        for job, image in zip(jobs, drawn, strict=True):
            image.save(self._file(job))

    def _file(self, job: tuple[str, int]) -> Path:
        return self.folder / f"{short_hash(*job)}.png"

    def rewards(self, jobs: Sequence[tuple[str, int]], prompts: Sequence[str]) -> list[float]:
        """The reward of drawn pictures for the users' prompts."""
        assert self.reward is not None
        images = tensor_to_images(torch.stack([self.looks[job].image for job in jobs]))
        scores: list[float] = self.reward(images, prompts).tolist()
        return scores


def hits(prompt: UserPrompt, look: Look) -> list[bool]:
    """Whether a picture shows each thing that a prompt asks for, and nothing that it excludes."""
    found = attribute_hits(look.labels, prompt.request, [None] * len(prompt.request.things))
    found += [look.is_concept] if prompt.trigger else []
    return found + [look.labels[f"{name}0"] != word for name, word in prompt.excluded.items()]


def rate_pictures(
    pictures: Pictures, prompts: Sequence[UserPrompt], texts: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Rates of the pictures of texts.

    Args:
        pictures: Draws them.
        prompts: The users' prompts.
        texts: For each seed from 0, the drawn text of each prompt.

    Returns:
        "shown" with its standard error over prompts, "whole" (share of pictures that show all),
        "reward", and "shown" of each kind of prompt.
    """
    jobs = [(text, 1000 * seed + k) for seed, row in enumerate(texts) for k, text in enumerate(row)]
    pictures.draw(jobs)
    repeated = list(prompts) * len(texts)
    found = [hits(prompt, pictures.looks[job]) for prompt, job in zip(repeated, jobs, strict=True)]
    shares = [mean(values) for values in found]
    count = len(prompts)
    by_prompt = [mean(shares[k::count]) for k in range(count)]
    rates = {
        "shown": mean(by_prompt),
        "shown_se": stdev(by_prompt) / count**0.5,
        "whole": mean(float(all(values)) for values in found),
    }
    if pictures.reward is not None:
        rates["reward"] = mean(pictures.rewards(jobs, [prompt.text for prompt in repeated]))
    kinds = {
        kind: mean(v for v, p in zip(by_prompt, prompts, strict=True) if p.kind == kind)
        for kind in KINDS
    }
    return rates | kinds


def rate_texts(prompts: Sequence[UserPrompt], texts: Sequence[Sequence[str]]) -> dict[str, float]:
    """Rates of texts, as :func:`rate_pictures` takes them.

    Returns:
        "kept": share of texts without a lost term, of prompts with a trigger or an exclusion.
        "added": number of things a text that the prompt does not ask for. "words": mean length.
    """
    pairs = [(p, text) for row in texts for p, text in zip(prompts, row, strict=True)]
    kept = [float(keeps(p, text)) for p, text in pairs if p.kind == KINDS[-1]]
    return {
        "kept": mean(kept),
        "added": mean(len(added_things(p, text)) for p, text in pairs),
        "words": mean(len(text.split()) for _, text in pairs),
    }


def keeps(prompt: UserPrompt, text: str) -> bool:
    """Whether a text keeps the terms of a prompt."""
    return not find_problems(required_terms(prompt.text), text)


def added_things(prompt: UserPrompt, text: str) -> set[str]:
    """Things, looks and places that a text names and a prompt does not ask for."""
    request = prompt.request
    asked = {request.background, *prompt.excluded.values(), "plain"}
    for thing in request.things:
        asked |= {thing.kind, thing.colour, thing.pattern, thing.accessory}
    negated = " ".join(word for words in required_terms(text).excluded for word in words)
    return mentioned(text) - mentioned(negated) - asked


def mentioned(text: str) -> set[str]:
    """The words of the base's captions that a text mentions, itself or by a synonym."""
    return {_meaning()[match.lower()] for match in _pattern().findall(text)}


@cache
def _meaning() -> dict[str, str]:
    pairs = [(synonym, word) for word, synonyms in SYNONYMS.items() for synonym in synonyms]
    return dict(pairs) | {word: word for word in SYNONYMS}


@cache
def _pattern() -> re.Pattern[str]:
    words = sorted(_meaning(), key=len, reverse=True)
    return re.compile(rf"(?<![\w<])(?:{'|'.join(map(re.escape, words))})(?![\w>])", re.IGNORECASE)
