"""The losses of a training step on images: the diffusion loss and the preservation losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from customize.core.objectives import weighted_mse
from customize.core.preservation import PRESERVATIONS, select_losses
from customize.training.class_preservation import (
    PRESERVATION_INTERVAL,
    PreservationTargets,
    with_class_words,
)
from customize.training.data.batches import compose_batch, draw_noise, stream_seed
from customize.training.latents_and_embeddings import lookup_conditions
from customize.training.run import Run


class ImageLosses:
    """The losses of a run on batches of images.

    Args:
        run: The run, with images, trainable parameters and prompt encoding.
        targets: Outputs of the base model that the preservation losses compare with.
    """

    def __init__(self, run: Run, targets: PreservationTargets) -> None:
        self.run, self.targets = run, targets
        batch_size, accumulation = run.config.batch_size, run.config.gradient_accumulation
        # Each half of a batch, concepts and classes, counts as a mean.
        self._image_weight = 1.0 / (batch_size * accumulation)
        weights = [1.0] * batch_size
        if run.class_images:
            weights += [run.config.prior_weight] * batch_size
        self._image_weights = torch.tensor(weights, device=run.device) / (batch_size * accumulation)
        self._generator = Generator(run.device)

    def compute(self, step: int, batch: int, batches: int) -> Iterator[Tensor]:
        """Yield the losses of one batch, whose sum is the loss of the batch.

        There is one loss for each image size in the batch, and one for context preservation. The
        caller runs the backward pass of a loss before it requests the next, so that only one graph
        is in memory.

        Args:
            step: Optimizer steps done before.
            batch: Number of the batch in the step.
            batches: Batches in a step, over all processes and gradient accumulation.

        Yields:
            Scalars, float32, on the device.
        """
        run, config, family = self.run, self.run.config, self.run.family
        batch_number = step * batches + batch
        preserving = step % PRESERVATION_INTERVAL == 0
        class_losses = select_losses(config.preserve, "class_prediction")
        context_losses = select_losses(config.preserve, "context_change")
        numbers, mirrored, captions = compose_batch(
            config,
            run.images.captions,
            run.concept_images,
            run.class_images,
            batch_number,
            run.images.sizes,
        )
        for group, part in enumerate(run.images.group_by_size(numbers)):
            stream = f"noise {group}" if group else "noise"
            noise_seed = stream_seed(config.seed, batch_number, stream)
            # The images of concepts come first; class images are not preserved.
            concepts = [
                concept
                for number in (numbers[part] if preserving else ())
                for concept, images in enumerate(run.concept_images)
                if number in images
            ]
            count = len(concepts)
            mean, std = run.images.latent_distribution(family, numbers[part], mirrored[part])
            density = config.timestep_density or family.default_density
            draws = draw_noise(
                self._generator, noise_seed, mean.shape, density, config.noise_offset
            )
            latents = mean + std * draws.latents
            t = family.timesteps(draws.u, latents.shape[1:])
            noisy = family.noisy_latents(latents, draws.noise, t)

            # Class prompts go through the model in the same batch.
            repeats = count if class_losses else 0
            class_prompts = [
                with_class_words(run.configs, text) for text in captions[part][:repeats]
            ]
            with run.autocast():
                conditions = run.encode([*captions[part], *class_prompts])
                prediction = family.predict(
                    _repeat_first(noisy, repeats), _repeat_first(t, repeats), conditions
                )
            target = family.target(latents, draws.noise, t)
            snr_weight = family.loss_weight(t, config.min_snr_gamma)
            weight = snr_weight * self._image_weights[part]
            mask = run.images.mask(numbers[part], mirrored[part])
            loss = weighted_mse(prediction[: len(noisy)], target, weight, mask).sum()
            if repeats:
                base = self._predict_base(noisy[:count], t[:count], class_prompts)
                for name in class_losses:
                    change = PRESERVATIONS[name](prediction[len(noisy) :], base, snr_weight[:count])
                    loss = loss + self._preservation_weight(name) * count * change
            yield loss
            if count and context_losses:
                # A loss of its own, so that it needs no more memory than the batch.
                prompts = self.targets.choose_context_prompts(
                    concepts, step // PRESERVATION_INTERVAL * batches + batch
                )
                plain, noisy, t = prediction[:count].detach(), noisy[:count], t[:count]
                with run.autocast():
                    change_in_context = family.predict(noisy, t, run.encode(prompts)) - plain
                class_prompts = [
                    with_class_words(run.configs, text)
                    for text in [*captions[part][:count], *prompts]
                ]
                base = self._predict_base(
                    _repeat_first(noisy, count), _repeat_first(t, count), class_prompts
                )
                base_change = base[count:] - base[:count]
                changes = [
                    self._preservation_weight(name)
                    * count
                    * PRESERVATIONS[name](change_in_context, base_change, snr_weight[:count])
                    for name in context_losses
                ]
                yield torch.stack(changes).sum()

    def _predict_base(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """The base model's prediction for class prompts, without a gradient."""
        run = self.run
        with torch.no_grad(), run.trainable.adapters_disabled(), run.autocast():
            return run.family.predict(noisy, t, lookup_conditions(self.targets.conditions, prompts))

    def _preservation_weight(self, loss: str) -> float:
        return PRESERVATION_INTERVAL * self.run.config.preserve[loss] * self._image_weight


def _repeat_first(values: Tensor, count: int) -> Tensor:
    """A batch with its first ``count`` rows appended."""
    return torch.cat([values, values[:count]]) if count else values
