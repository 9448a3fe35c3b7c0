"""Sample images of a concept during training, the base's image of its class, and a fixed loss.

All samples start from the same noise. Neither the samples nor the fixed-noise loss use a random
stream of the training, so a run gives the same concept with and without them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor

from customize.concepts.caption_template import DEFAULT_CAPTION
from customize.core.objectives import weighted_mse
from customize.decode_image import decode_image
from customize.errors import storage_error
from customize.families import Family
from customize.families.sampling import sample
from customize.training.class_preservation import with_class_words
from customize.training.config import TrainConfig
from customize.training.data.batches import stream_seed
from customize.training.data.captions import replace_trigger
from customize.training.run import Run
from customize.training.validation_images import decode_images, guidance_scale, write_png

SAMPLES_FOLDER = "samples"
_BASE = "base.png"
_FRACTIONS = (0, 0.25, 0.5, 0.75, 1)  # of the training steps
_MAX_STEPS, _MIN_STEPS = 20, 5
_STRIP_SIDE = 256  # pixels, of an image in the model card
_MEASURED_IMAGES = 4
_LEVELS = (0.125, 0.375, 0.625, 0.875)  # noise levels, in (0, 1)


def sample_prompts(config: TrainConfig) -> list[str]:
    """Return the prompts of the concept and of the base; empty if samples are off."""
    if not config.samples:
        return []
    prompt = (config.caption or DEFAULT_CAPTION).replace("{}", config.trigger)
    return [prompt, replace_trigger(prompt, config.trigger, config.class_word)]


class SampleImages:
    """Generates samples of one concept of a run.

    After a failure, such as too little memory, it warns and generates no more samples.

    Attributes:
        steps: Steps after which a sample is generated; empty if samples are off.
        folder: Folder of the samples.
    """

    def __init__(self, config: TrainConfig, run: Run) -> None:
        self.config, self.run = config, run
        self.folder = config.output / SAMPLES_FOLDER
        self.steps = sorted({round(fraction * config.steps) for fraction in _FRACTIONS})
        if not config.samples or not run.accelerator.is_main_process:
            self.steps = []

    def begin(self, restart: bool) -> None:
        """Generate the base's sample, and the concept's before the first step.

        Args:
            restart: Whether the run starts without a checkpoint; samples of an earlier run are
                deleted.
        """
        if not self.steps:
            return
        if restart:
            self._clear()
        base = self.folder / _BASE
        if not base.is_file():
            with self.run.trainable.adapters_disabled():
                self._draw(sample_prompts(self.config)[1], base)
        if restart:
            self.draw_if_due(0)

    def draw_if_due(self, step: int) -> None:
        """Generate a sample if it is due after a step and was not before an interruption."""
        path = self._path(step)
        if step in self.steps and not path.is_file():
            self._draw(sample_prompts(self.config)[0], path)

    def drawn(self) -> list[tuple[int | None, Path]]:
        """Return the step and the file of each existing sample; the base's has the step None."""
        paths = [(None, self.folder / _BASE), *((s, self._path(s)) for s in self.steps)]
        return [(step, path) for step, path in paths if path.is_file()] if self.steps else []

    def strip(self) -> list[Image.Image]:
        """Return one image of all samples side by side; empty without samples.

        Each sample is at most 256 pixels wide and high.
        """
        pictures: list[Image.Image] = []
        for _, path in self.drawn():
            picture = decode_image(path, "RGB")
            picture.thumbnail((_STRIP_SIDE, _STRIP_SIDE))
            pictures.append(picture)
        if not pictures:
            return []
        width, height = pictures[0].size
        row = Image.new("RGB", (width * len(pictures), height))
        for number, picture in enumerate(pictures):
            row.paste(picture, (number * width, 0))
        return [row]

    def facts(self) -> dict[str, Any]:
        """Return the entry of the samples in ``concept.json``."""
        prompt, base = sample_prompts(self.config)
        steps = [step for step, _ in self.drawn() if step is not None]
        return {"prompt": prompt, "base_prompt": base, "steps": steps}

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.png"

    def _clear(self) -> None:
        try:
            for path in [*self.folder.glob("step-*.png"), *self.folder.glob(_BASE)]:
                path.unlink()
        except OSError as error:
            raise storage_error(error, self.folder) from error

    @torch.no_grad()
    def _draw(self, prompt: str, path: Path) -> None:
        family, config = self.run.family, self.config
        try:
            with self.run.autocast():
                conditions = self.run.encode([prompt])
                empty = family.unconditional(self.run.encode([""]))
            with without_compilation(config):
                seed = stream_seed(config.seed, "sample")
                latents = sample(
                    family,
                    conditions,
                    empty,
                    self.run.images.shape,
                    steps=choose_sampling_steps(config, family),
                    guidance=guidance_scale(config, family),
                    seeds=[seed],
                    sampler_seed=stream_seed("sampler", seed),
                    autocast=self.run.autocast,
                )
            picture = _decode_image(family, latents)
        except RuntimeError as error:  # such as too little memory, or an unsupported operation
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(
                f"samples of {config.name} are not drawn any more: {str(error).splitlines()[0]}",
                stacklevel=2,
            )
            self.steps = []
            return
        write_png(picture, path, "samples")


def _decode_image(family: Family, latents: Tensor) -> Image.Image:
    """Decode an image; on the CPU if the device has too little memory beside the denoiser.

    SDXL's autoencoder needs more memory than its denoiser for an image of 1024 x 1024 pixels.
    """
    try:
        return decode_images(family, latents)[0]
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return decode_images(family, latents.cpu())[0]


def choose_sampling_steps(config: TrainConfig, family: Family) -> int:
    """Return the sampling steps of a sample: 20, or fewer in short runs.

    Samples take at most about a fifth of a short run's time, but have at least 5 steps.
    """
    seen_images = config.steps * config.batch_size * config.gradient_accumulation
    steps = min(_MAX_STEPS, max(_MIN_STEPS, seen_images // 20))
    limit = family.scheduler.config.get("num_train_timesteps")
    return min(steps, limit) if limit else steps


def without_compilation(config: TrainConfig) -> Any:
    """Return a context in which compiled blocks run without compilation.

    Samples have other shapes than batches, and compilation for these would take longer than the
    samples themselves.
    """
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()


def fixed_noise_captions(
    config: TrainConfig, configs: Sequence[TrainConfig], captions: Sequence[str]
) -> list[str]:
    """Return captions with class words for :func:`measure_fixed_noise_loss`.

    Args:
        config: Settings of the run.
        configs: Settings of all concepts of the run.
        captions: Captions with triggers.

    Returns:
        As many captions; none if samples are off.
    """
    return [with_class_words(configs, text) for text in captions] if config.samples else []


@torch.no_grad()
def measure_fixed_noise_loss(run: Run, concept: int) -> dict[str, float]:
    """Measure the loss on some of a concept's images with fixed noise at fixed noise levels.

    The noise levels of training losses are random, and change the loss far more than the training
    does.

    Args:
        run: The run, with adapters and tokens attached.
        concept: Index of the concept in the run.

    Returns:
        "base": The base's loss with class words in the captions; "learned": the trained model's
        with the triggers. Both are means over up to 4 images and 4 noise levels.
    """
    config, numbers = run.configs[concept], run.concept_images[concept]
    family, images, device = run.family, run.images, run.device
    stride = -(-len(numbers) // _MEASURED_IMAGES)
    totals = {"base": 0.0, "learned": 0.0}
    chosen = list(numbers)[::stride]
    for picture in chosen:
        mean, _ = images.latent_distribution(family, [picture], [False])
        mask, caption = images.mask([picture], [False]), images.captions[picture]
        for level, share in enumerate(_LEVELS):
            seed = stream_seed(config.seed, "measure", picture - numbers.start, level)
            noise = torch.randn(mean.shape, generator=Generator().manual_seed(seed)).to(device)
            t = family.timesteps(torch.tensor([share], device=device), mean.shape[1:])
            noisy, target = family.noisy_latents(mean, noise, t), family.target(mean, noise, t)
            for name, text, context in (
                ("base", with_class_words(run.configs, caption), run.trainable.adapters_disabled()),
                ("learned", caption, nullcontext()),
            ):
                with context, run.autocast(), without_compilation(config):
                    prediction = family.predict(noisy, t, run.encode([text]))
                loss = weighted_mse(prediction.float(), target, None, mask)
                totals[name] += float(loss) / (len(chosen) * len(_LEVELS))
    return totals
