"""Pictures of the concept while it is learned, beside the base's own picture of its class.

All are drawn from the same noise. Neither they nor the measured loss touch a random stream of the
training, so that a run gives the same concept with and without them.
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

from customize.core.objectives import weighted_mse
from customize.errors import storage_error
from customize.families import Family
from customize.families.sampling import sample
from customize.training.class_preservation import with_class_words
from customize.training.config import TrainConfig
from customize.training.data.batches import stream_seed
from customize.training.data.captions import replace_trigger
from customize.training.data.decode_image import decode_image
from customize.training.run import Run
from customize.training.validation_images import decode_images, guidance_scale, write_png

SAMPLES_FOLDER = "samples"
_BASE = "base.png"
_SHARES = (0, 0.25, 0.5, 0.75, 1)
_MOST_STEPS, _FEWEST_STEPS = 20, 5
_STRIP_SIDE = 256  # pixels, of each picture in the card
_MEASURED = 4  # pictures
_LEVELS = (0.125, 0.375, 0.625, 0.875)  # shares of the noise levels


def sample_prompts(config: TrainConfig) -> list[str]:
    """The concept's prompt, and the base's; none where samples are off."""
    if not config.samples:
        return []
    prompt = (config.caption or "a photo of {}").replace("{}", config.trigger)
    return [prompt, replace_trigger(prompt, config.trigger, config.class_word)]


class SampleImages:
    """Draws samples of one concept of a run.

    A sample that cannot be drawn, as where memory does not suffice, ends them with a warning.

    Attributes:
        steps: after which a sample is drawn; none where samples are off.
        folder: where they are, each as it was drawn.
    """

    def __init__(self, config: TrainConfig, run: Run) -> None:
        self.config, self.run = config, run
        self.folder = config.output / SAMPLES_FOLDER
        self.steps = sorted({round(share * config.steps) for share in _SHARES})
        if not config.samples or not run.accelerator.is_main_process:
            self.steps = []

    def begin(self, anew: bool) -> None:
        """Draw the base's picture, and the concept's before the first step.

        Args:
            anew: the run does not go on from a checkpoint; samples of an earlier one are deleted.
        """
        if not self.steps:
            return
        if anew:
            self._clear()
        base = self.folder / _BASE
        if not base.is_file():
            with self.run.trainable.adapters_disabled():
                self._draw(sample_prompts(self.config)[1], base)
        if anew:
            self.draw_if_due(0)

    def draw_if_due(self, step: int) -> None:
        """Draw the concept after a step, unless that was done before the run was cut off."""
        path = self._path(step)
        if step in self.steps and not path.is_file():
            self._draw(sample_prompts(self.config)[0], path)

    def drawn(self) -> list[tuple[int | None, Path]]:
        """The step of each sample that is there, and its file; None for the base's."""
        found = [(None, self.folder / _BASE), *((s, self._path(s)) for s in self.steps)]
        return [(step, path) for step, path in found if path.is_file()] if self.steps else []

    def strip(self) -> list[Image.Image]:
        """One picture of all samples in a row, each at most 256 pixels wide and high; empty where
        there are none."""
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
        """What ``concept.json`` says of the samples."""
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
                asked = self.run.encode([prompt])
                empty = family.unconditional(self.run.encode([""]))
            with without_compilation(config):
                seed = stream_seed(config.seed, "sample")
                latents = sample(
                    family,
                    asked,
                    empty,
                    self.run.images.shape,
                    steps=choose_sampling_steps(config, family),
                    guidance=guidance_scale(config, family),
                    seeds=[seed],
                    sampler_seed=stream_seed("sampler", seed),
                    autocast=self.run.autocast,
                )
            picture = _decoded(family, latents)
        except RuntimeError as error:  # memory does not suffice, or a kernel lacks something
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(
                f"samples of {config.name} are not drawn any more: {str(error).splitlines()[0]}",
                stacklevel=2,
            )
            self.steps = []
            return
        write_png(picture, path, "samples")


def _decoded(family: Family, latents: Tensor) -> Image.Image:
    """The picture; decoded on the CPU where the device, which holds the denoiser too, is too small.

    The autoencoder of SDXL takes more memory for a picture of 1024 x 1024 than its denoiser."""
    try:
        return decode_images(family, latents)[0]
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return decode_images(family, latents.cpu())[0]


def choose_sampling_steps(config: TrainConfig, family: Family) -> int:
    """Sampling steps of a sample: 20, and fewer in short runs, of which samples would else take
    more than about a fifth of the time."""
    seen = config.steps * config.batch_size * config.gradient_accumulation
    steps = min(_MOST_STEPS, max(_FEWEST_STEPS, seen // 20))
    most = family.scheduler.config.get("num_train_timesteps")
    return min(steps, most) if most else steps


def without_compilation(config: TrainConfig) -> Any:
    """Within it compiled blocks run as they are: samples have other shapes than batches, and
    compiling for these would take longer than they do."""
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()


def fixed_noise_captions(
    config: TrainConfig, configs: Sequence[TrainConfig], captions: Sequence[str]
) -> list[str]:
    """Class captions for :func:`measure_fixed_noise_loss`; none where samples are off."""
    return [with_class_words(configs, text) for text in captions] if config.samples else []


@torch.no_grad()
def measure_fixed_noise_loss(run: Run, concept: int) -> dict[str, float]:
    """The loss on some of a concept's pictures, with the same noise at the same levels.

    Training losses are of random levels, by which they differ far more than by what is learned.

    Args:
        run: the run, with everything attached.
        concept: number of the concept in the run.

    Returns:
        "base": the base's, by captions with the class word, as before the first step; "learned":
        by the concept's own captions. Both are means over up to 4 pictures and 4 levels.
    """
    config, numbers = run.configs[concept], run.concept_images[concept]
    family, images, device = run.family, run.images, run.device
    stride = -(-len(numbers) // _MEASURED)
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
