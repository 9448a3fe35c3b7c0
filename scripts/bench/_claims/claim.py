"""What a claim consists of, and the models that all claims are measured with."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _scorer import open_quietly
from _workers import weights_of
from _worlds.bench_world import WORLDS
from _worlds.sticker_concepts import GUIDANCE
from _worlds.subjects import trained_prototypes
from torch import Tensor

from customize.api.pipeline_methods import load_custom, unload_custom
from customize.evaluation.storybook_rates import STEPS
from customize.stickers.artwork import Artwork
from customize.stickers.judges import Box, StickerJudges
from customize.stickers.prototypes import Prototypes
from customize.stickers.subjects import Split
from customize.training.config import TrainConfig

QUICK_STEPS = 40
_BATCH = 16

Rates = dict[str, float]


@dataclass(frozen=True)
class Training:
    """A concept to train.

    Attributes:
        config: The settings.
        write: Writes its pictures to a folder, `config.images`.
    """

    config: TrainConfig
    write: Callable[[Path], object]


class Bench:
    """The base of stickers, its judges, and where results are stored.

    Args:
        args: Of `sticker_claims.py`.
        artwork: The pictures of the subjects.
        split: Which of them the base was trained on.
    """

    def __init__(self, args: argparse.Namespace, artwork: Artwork, split: Split) -> None:
        self.args, self.artwork, self.split = args, artwork, split
        self.quick: bool = args.quick
        self.base: Path = args.base

    @cached_property
    def pipe(self) -> Any:
        pipe = open_quietly(self.base)
        pipe.unet.to(memory_format=torch.channels_last)
        return pipe

    @cached_property
    def judges(self) -> StickerJudges:
        judges: StickerJudges = WORLDS["stickers"].load_judges(self.args.judges)
        return judges

    @cached_property
    def trained_subjects(self) -> Prototypes:
        """The judges' prototypes of the subjects that the base was trained on."""
        return trained_prototypes(self.judges, self.split)

    def subject_id(self, name: str) -> str:
        """The id of a subject of training."""
        (subject,) = (each for each in self.split.training if each.name == name)
        return subject.id

    def config(self, name: str, class_word: str, **settings: Any) -> TrainConfig:
        """Settings of a training, in a folder that is named by them and by the base."""
        if self.quick:
            settings |= {"steps": QUICK_STEPS, "checkpoint_every": 0}
        digest = hashlib.sha256(repr(sorted(settings.items())).encode())
        for path in weights_of(self.base):
            digest.update(path.read_bytes())
        folder = self.args.folder / digest.hexdigest()[:8]
        return TrainConfig(
            base=str(self.base),
            images=folder / "pictures" / name,
            output=folder / name,
            name=name,
            class_word=class_word,
            **settings,
        )

    @contextmanager
    def attached(self, *folders: Path, **how: Any) -> Iterator[None]:
        """The pipeline with these concepts."""
        load_custom(self.pipe, *folders, **how)
        try:
            yield
        finally:
            unload_custom(self.pipe)

    def draw(self, prompts: Sequence[str], seed: int, **call: Any) -> Tensor:
        """Draw n prompts: (n, 3, 64, 64) in [-1, 1]; image k has the seed `1000 * seed + k`.

        Args:
            prompts: The prompts.
            seed: Of the images.
            **call: Further arguments of the call, the same for all prompts.
        """
        batches = []
        for first in range(0, len(prompts), _BATCH):
            part = list(prompts[first : first + _BATCH])
            start = 1000 * seed + first
            more = dict(call)
            if "negative_prompt" in more:
                more["negative_prompt"] = [more["negative_prompt"]] * len(part)
            images = self.pipe(
                part,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=[torch.Generator().manual_seed(start + k) for k in range(len(part))],
                output_type="pt",
                **more,
            ).images
            batches.append(images.float() * 2 - 1)
        return torch.cat(batches)

    def see(self, images: Tensor) -> list[tuple[list[Box], Tensor]]:
        """The stickers of each image and their embeddings (stickers, 64)."""
        found = self.judges.find_stickers(images)
        vectors = self.judges.embed(images, found).split([len(boxes) for boxes in found])
        return list(zip(found, vectors, strict=True))


@dataclass(frozen=True)
class Claim:
    """Something that a user is promised.

    Attributes:
        trainings: The concepts that the ways need.
        ways: What is compared, as titles of rows.
        score: (bench, way) -> shares of images. It also returns sample images, (n, 3, 64, 64).
        figures: Way -> shares, to the figures of the claim.
    """

    trainings: Callable[[Bench], Sequence[Training]]
    ways: tuple[str, ...]
    score: Callable[[Bench, str], tuple[Rates, Tensor]]
    figures: Callable[[Mapping[str, Rates]], dict[str, float]]


def share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)
