"""Reference training as a task of the training loop: trained parts and losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from customize.core.objectives import weighted_mse
from customize.references.encoder_inputs import GroupRequest, unconditional_request
from customize.training.data.batches import draw_noise, pass_order, stream_seed
from customize.training.distributed import max_over_processes
from customize.training.finite_checks import suggest_base_fix
from customize.training.references.config import ReferenceTrainConfig
from customize.training.references.group_dataset import GroupSample
from customize.training.references.reference_run import ReferenceRun
from customize.training.references.trained_parts import TrainedParts
from customize.training.training_task import TrainingTask

#: What a sample loses, so that the model also learns to draw without it.
Drop = Literal["nothing", "images", "text", "both"]


def choose_drop(config: ReferenceTrainConfig, rng: Random) -> Drop:
    """Choose what a sample loses, by the probabilities of the settings."""
    u = rng.random()
    for name, probability in (
        ("images", config.drop_images),
        ("text", config.drop_text),
        ("both", config.drop_both),
    ):
        if u < probability:
            return name  # type: ignore[return-value]
        u -= probability
    return "nothing"


def trained_parameters(
    config: ReferenceTrainConfig, parts: TrainedParts
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return the trained parameters of the encoder and of the adapter, by name.

    The projector, the final layer with its norm and reference tokens, and the adapter's keys and
    values are trained in all stages; the MLLM and the adapter's LoRA in those that say so.
    """
    all_parts = config.rules.trains_mllm
    frozen = () if all_parts else ("mllm.",)
    encoder = {
        f"encoder.{name}": parameter
        for name, parameter in parts.encoder.named_parameters()
        if not name.startswith(frozen)
    }
    adapter = {
        f"adapter.{name}": parameter
        for name, parameter in parts.adapter.named_parameters()
        if all_parts or not name.endswith((".lora_A.weight", ".lora_B.weight"))
    }
    return encoder, adapter


class ReferenceTask(TrainingTask):
    """An encoder of reference images and an adapter of the denoiser.

    Args:
        run: The run, with everything attached and encoded.
    """

    def __init__(self, run: ReferenceRun) -> None:
        self.run = run
        self._encoder, self._adapter = trained_parameters(run.config, run.parts)
        trained = {*self._encoder.values(), *self._adapter.values()}
        for parameter in run.parts.parameters():
            parameter.requires_grad_(parameter in trained)
        self._generator = Generator(run.device)
        black: Any = unconditional_request().images
        self._black = run.model.processor.cut_images(black)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names in the saved file."""
        return self._encoder | self._adapter

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return a group for the encoder and one for the adapter."""
        config = self.run.config
        rate = config.peak_learning_rate
        rates = {
            "learning_rate": (self._encoder, rate),
            "adapter_learning_rate": (self._adapter, config.adapter_learning_rate or rate),
        }
        return [
            {
                "name": name,
                "params": list(parameters.values()),
                "peak": peak,
                "weight_decay": config.weight_decay,
            }
            for name, (parameters, peak) in rates.items()
        ]

    def losses(self, step: int, batch: int, batches: int) -> Iterator[Tensor]:
        """Yield a diffusion loss for each size of targets in the batch."""
        config = self.run.config
        number = step * batches + batch
        samples = [
            self._draw_sample(number * config.batch_size + row) for row in range(config.batch_size)
        ]
        by_shape: dict[torch.Size, list[GroupSample]] = {}
        for sample in samples:
            by_shape.setdefault(sample.latents[0].shape, []).append(sample)
        missing = 0
        if self.run.is_sharded:  # all processes must run as many passes
            missing = max_over_processes(self.run.accelerator, len(by_shape)) - len(by_shape)
        for group, part in enumerate(by_shape.values()):
            stream = f"noise {group}" if group else "noise"
            yield self._loss(part, stream_seed(config.seed, number, stream))
        for _ in range(missing):
            yield 0.0 * self._loss(samples[:1], 0)

    def suggest_fix(self) -> str:
        """Return what to do about a base with values that are not finite."""
        return suggest_base_fix(self.run.family, self.run.config.mixed_precision == "fp16")

    def _draw_sample(self, position: int) -> GroupSample:
        """Return the sample of a position in all passes over the data, after dropping.

        It depends on nothing but the seed and the position.
        """
        seed, dataset = self.run.config.seed, self.run.dataset
        turn, place = divmod(position, len(dataset))
        index = pass_order(seed, turn, len(dataset), "references")[place]
        rng = Random(stream_seed(seed, "sample", position))
        sample = dataset.sample(index, rng)
        drop = choose_drop(self.run.config, rng)
        if drop == "nothing":
            return sample
        keeps_images = drop == "text"
        return GroupSample(
            sample.latents,
            sample.caption if drop == "images" else "",
            sample.references if keeps_images else self._black,
            sample.attributes if keeps_images else (),
        )

    def _loss(self, samples: Sequence[GroupSample], seed: int) -> Tensor:
        """Return the summed loss of samples of one size over the batch size and accumulation."""
        run, config, family = self.run, self.run.config, self.run.family
        mean, std = (
            torch.stack([sample.latents[part] for sample in samples]).to(run.device, torch.float32)
            for part in (0, 1)
        )
        density = config.timestep_density or family.default_density
        draws = draw_noise(self._generator, seed, mean.shape, density, 0.0)
        latents = mean + std * draws.latents
        t = family.timesteps(draws.u, latents.shape[1:])
        noisy = family.noisy_latents(latents, draws.noise, t)
        requests = [
            GroupRequest(sample.references, sample.attributes, sample.caption) for sample in samples
        ]

        def predict() -> Tensor:
            with run.autocast():
                tokens = run.read_references(requests)
                conditions = run.encode([sample.caption for sample in samples])
                with run.attachment.condition(tokens):
                    return family.predict(noisy, t, conditions)

        prediction = run.parts(predict)
        target = family.target(latents, draws.noise, t)
        weight = family.loss_weight(t, config.min_snr_gamma)
        weight = weight / (config.batch_size * config.gradient_accumulation)
        return weighted_mse(prediction.float(), target, weight, None).sum()
