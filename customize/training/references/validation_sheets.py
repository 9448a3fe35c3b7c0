"""Validation sheets: fixed groups, each a row with its references and what is drawn from them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from random import Random
from typing import Any

import torch
from PIL import Image

from customize.errors import PipelineError
from customize.families.sampling import sample
from customize.image_tensors import tensor_to_images
from customize.references.encoder_inputs import (
    GroupRequest,
    ImagePatches,
    unconditional_request,
)
from customize.training.data.batches import stream_seed
from customize.training.references.group_dataset import GroupDataset, GroupSample
from customize.training.references.reference_run import ReferenceRun
from customize.training.validation_images import decode_images, log_images, write_png

_SHOWN_REFERENCES = 4
_SIDE = 256  # largest side of an image of a sheet, in pixels


class ValidationSheets:
    """Draws the sheets of a run, each image from the same noise every time.

    Args:
        run: The run, with everything attached and encoded.
        dataset: The groups, of which the first are shown.
    """

    def __init__(self, run: ReferenceRun, dataset: GroupDataset) -> None:
        self.run = run
        count = min(run.config.validation_groups, len(dataset))
        stride = max(1, len(dataset) // max(count, 1))
        seed = run.config.seed
        self._samples = [
            dataset.sample(row * stride, Random(stream_seed(seed, "validation", row)))
            for row in range(count)
        ]

    def draw_if_due(self, step: int) -> None:
        """Draw a sheet if it is due after a step."""
        config = self.run.config
        due = step == config.steps or (
            config.validation_every and not step % config.validation_every
        )
        # Processes that have a part of the weights each draw together.
        draws = self.run.sharding == "fsdp2" or self.run.accelerator.is_main_process
        if due and self._samples and draws:
            self.draw(step)

    @torch.no_grad()
    def draw(self, step: int) -> None:
        """Draw the sheet, save it, and log its images to the trackers.

        Raises:
            StorageError: The file cannot be written.
        """
        run, rows, prompts, drawn = self.run, [], [], []
        try:
            for row, group in enumerate(self._samples):
                for prompt in run.config.validation_prompts or (group.caption,):
                    prompts.append(f"{row} {prompt}")
                    draw_image = partial(self._draw_image, group, prompt, row)
                    drawn.append(run.parts(draw_image))
        except PipelineError as error:  # only a training loss that is not finite stops the run
            warnings.warn(f"no validation sheet at step {step}: {error}", stacklevel=2)
            return
        if not run.accelerator.is_main_process:
            return
        each = len(drawn) // len(self._samples)
        for row, group in enumerate(self._samples):
            shown = [self._show(image) for image in group.references[:_SHOWN_REFERENCES]]
            rows.append((shown, drawn[row * each : (row + 1) * each]))
        path = run.config.output / "validation" / f"step-{step}.png"
        write_png(compose_sheet(rows), path, "validation sheets")
        log_images(run.accelerator.trackers, drawn, prompts, step)

    def _draw_image(self, group: GroupSample, prompt: str, row: int) -> Image.Image:
        run, config, family = self.run, self.run.config, self.run.family
        guidance = config.validation_guidance
        guidance = family.default_guidance if guidance is None else guidance
        requests = [GroupRequest(group.references, group.attributes, prompt)]
        if family.is_guided(guidance):
            requests.insert(0, unconditional_request())
        with run.autocast():
            tokens = run.read_references(requests)
            conditions = run.encode([prompt])
            empty = family.unconditional(run.encode([""]))
        seed = stream_seed(config.seed, "validation noise", row)
        with run.attachment.condition(tokens):
            latents = sample(
                family,
                conditions,
                empty,
                group.latents[0].shape,
                steps=config.validation_steps,
                guidance=guidance,
                seeds=[seed],
                sampler_seed=stream_seed("sampler", seed),
                autocast=run.autocast,
            )
        return decode_images(family, latents)[0]

    def _show(self, image: Image.Image | ImagePatches) -> Image.Image:
        if isinstance(image, Image.Image):
            return image
        return restore_image(image, self.run.model.processor.image_processor)


def restore_image(patches: ImagePatches, image_processor: Any) -> Image.Image:
    """Return the image that was cut to patches, in the size that the vision tower reads."""
    size, merge = image_processor.patch_size, image_processor.merge_size
    _, rows, columns = patches.grid.tolist()
    values = patches.values.reshape(
        -1,
        rows // merge,
        columns // merge,
        merge,
        merge,
        3,
        image_processor.temporal_patch_size,
        size,
        size,
    )[0, ..., 0, :, :]  # (rows, columns, row, column, 3, height, width)
    pixels = values.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * size, columns * size)
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (image_processor.image_mean, image_processor.image_std)
    )
    return tensor_to_images(((pixels * std + mean) * 2 - 1)[None].clamp(-1, 1))[0]


def compose_sheet(
    rows: Sequence[tuple[Sequence[Image.Image], Sequence[Image.Image]]],
) -> Image.Image:
    """Return a sheet with a row for each group: its references, a gap, the drawn images."""
    side = min(_SIDE, max(image.height for _, drawn in rows for image in drawn))
    references = max(len(shown) for shown, _ in rows)
    gap = side // 8
    width = references * side + gap + max(len(drawn) for _, drawn in rows) * side
    sheet = Image.new("RGB", (width, side * len(rows)), "white")
    for row, (shown, drawn) in enumerate(rows):
        for column, image in enumerate(shown):
            sheet.paste(_fit(image, side), (column * side, row * side))
        for column, image in enumerate(drawn):
            left = references * side + gap + column * side
            sheet.paste(_fit(image, side), (left, row * side))
    return sheet


def _fit(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
