"""The losses of a training step: on the pictures of a batch, and on what is to be preserved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from customize.core.objectives import weighted_mse
from customize.core.preservation import PRESERVATIONS
from customize.families import Family
from customize.training.class_preservation import (
    PRESERVATION_INTERVAL,
    PreservationTargets,
    is_preservation_step,
)
from customize.training.config import TrainConfig
from customize.training.data.batches import compose_batch, draw_noise, stream_seed
from customize.training.distributed import Autocast
from customize.training.latents_and_embeddings import CachedImages, Encode
from customize.training.trainable import Trainable


@dataclass(frozen=True, eq=False)
class TrainingLosses:
    """What a run goes down on.

    Attributes:
        concepts: the numbers of each concept's pictures, which come before all others.
        classes: those of the class pictures of each concept; empty where there are none.
        encode: captions to conditions.
    """

    config: TrainConfig
    family: Family
    trainable: Trainable
    pictures: CachedImages
    concepts: Sequence[range]
    classes: Sequence[range]
    encode: Encode
    preserved: PreservationTargets
    autocast: Autocast
    device: torch.device

    def batch_losses(self, step: int, place: int, places: int) -> Iterator[Tensor]:
        """The loss of each piece of a batch, a scalar, in float32; their sum is the batch's.

        There is more than one piece where class pictures are of another size than the concepts'.
        The caller goes backward from one before it asks for the next.

        Args:
            step: from 0.
            place: of the batch, among the ``places`` of all processes and accumulations in a step.
        """
        config, pictures = self.config, self.pictures
        turn = step * places + place
        # Counts the batches that preserve.
        held = step // PRESERVATION_INTERVAL * places + place
        chosen, mirrored, captions = compose_batch(
            config, pictures.captions, self.concepts, self.classes, turn, pictures.sizes
        )
        for piece, part in enumerate(pictures.group_by_size(chosen)):
            stream = f"noise {piece}" if piece else "noise"
            seed = stream_seed(config.seed, turn, stream)
            # The concepts' are first.
            owners = self._owners(chosen[part]) if is_preservation_step(step) else []
            yield from self._of_piece(
                chosen[part], mirrored[part], captions[part], part, seed, owners, held
            )

    def text_encoder_loss(self, step: int) -> Tensor | None:
        """The losses on text encoders at a step, a scalar; None where there is none."""
        with self.autocast():
            return self.preserved.text_loss(step)

    def _of_piece(
        self,
        pictures: list[int],
        mirrored: list[bool],
        captions: list[str],
        part: slice,
        seed: int,
        owners: list[int],
        held: int,
    ) -> Iterator[Tensor]:
        config, family, own = self.config, self.family, len(owners)
        mean, std = self.pictures.latent_distribution(family, pictures, mirrored)
        density = config.timestep_density or family.default_density
        drawn = draw_noise(self._generator, seed, mean.shape, density, config.noise_offset)

        latents = mean + std * drawn.latents
        t = family.timesteps(drawn.u, latents.shape[1:])
        noisy = family.noisy_latents(latents, drawn.noise, t)
        # Class prompts go through the model together with all.
        again = own if "output" in config.preserve else 0
        told = self.preserved.class_captions(captions[:again])
        with self.autocast():
            conditions = self.encode([*captions, *told])
            prediction = family.predict(_with(noisy, again), _with(t, again), conditions)
        target = family.target(latents, drawn.noise, t)
        snr_weight = family.loss_weight(t, config.min_snr_gamma)
        weight = snr_weight * self._shares[part]
        mask = self.pictures.mask(pictures, mirrored)
        loss = weighted_mse(prediction[: len(noisy)], target, weight, mask).sum()
        if again:
            base = self._of_base(noisy[:own], t[:own], told)
            change = PRESERVATIONS["output"](prediction[len(noisy) :], base, snr_weight[:own])
            loss = (
                loss
                + PRESERVATION_INTERVAL * config.preserve["output"] * self._share * own * change
            )
        yield loss
        if own and "context_output" in config.preserve:
            # Its own piece, so that it needs no more memory than the batch.
            there = self.preserved.choose_context_prompts(owners, held)
            plain, noisy, t = prediction[:own].detach(), noisy[:own], t[:own]
            with self.autocast():
                ours = family.predict(noisy, t, self.encode(there)) - plain
            told = self.preserved.class_captions([*captions[:own], *there])
            base = self._of_base(_with(noisy, own), _with(t, own), told)
            change = PRESERVATIONS["context_output"](
                ours, base[own:] - base[:own], snr_weight[:own]
            )
            yield (
                PRESERVATION_INTERVAL
                * config.preserve["context_output"]
                * self._share
                * own
                * change
            )

    def _of_base(self, noisy: Tensor, t: Tensor, captions: Sequence[str]) -> Tensor:
        """The untouched model's answer to captions with class words."""
        with torch.no_grad(), self.trainable.adapters_disabled(), self.autocast():
            return self.family.predict(noisy, t, self.preserved.base_conditions(captions))

    def _owners(self, pictures: Sequence[int]) -> list[int]:
        """The number of each picture's concept; class pictures have none."""
        known = self.concepts
        return [k for picture in pictures for k, own in enumerate(known) if picture in own]

    @property
    def _share(self) -> float:
        """Of one picture in a step: each half of a batch counts as a mean."""
        return 1.0 / (self.config.batch_size * self.config.gradient_accumulation)

    @cached_property
    def _shares(self) -> Tensor:
        """Of each picture in a step; the class's counts times its weight."""
        batch = self.config.batch_size
        shares = [1.0] * batch + ([self.config.prior_weight] * batch if self.classes else [])
        accumulate = self.config.gradient_accumulation
        return torch.tensor(shares, device=self.device) / (batch * accumulate)

    @cached_property
    def _generator(self) -> Generator:
        return Generator(self.device)


def _with(values: Tensor, again: int) -> Tensor:
    """A batch, with its first so many once more behind it."""
    return torch.cat([values, values[:again]]) if again else values
