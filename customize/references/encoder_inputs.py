"""The inputs of a reference encoder: one chat turn of images and an instruction for each group."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from customize.decode_image import format_size
from customize.errors import ConfigError, DataError
from customize.references.config import ReferencesConfig

_SYSTEM = "You are a helpful assistant."
_BLACK_SIDE = 512  # pixels
#: The largest ratio of an image's sides that Qwen2-VL's image processor takes.
MAX_ASPECT = 200
_VISION = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True, eq=False)
class EncoderInputs:
    """A padded batch of groups.

    Attributes:
        input_ids: (batch, length), int64, padded on the right.
        lengths: (batch,), int64: tokens of each row.
        image_index: (batch, length), int64: which image of its group a token belongs to; -1 for
            text and padding.
        position_ids: (3, batch, length), int64: rotary positions in time, height and width.
        next_position: (batch,), int64: position of the first reference token.
        pixel_values: (patches, channels * temporal patch * patch^2), of all images in order.
        image_grid_thw: (images, 3), int64: patches in time, height and width of each image.
    """

    input_ids: Tensor
    lengths: Tensor
    image_index: Tensor
    position_ids: Tensor
    next_position: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor

    def to(self, device: torch.device | str) -> EncoderInputs:
        """Return the inputs on a device."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return EncoderInputs(**{name: tensor.to(device) for name, tensor in fields.items()})


@dataclass(frozen=True, eq=False)
class ImagePatches:
    """An image as the vision tower reads it.

    Attributes:
        values: (patches, channels * temporal patch * patch^2), float32.
        grid: (3,), int64: patches in time, height and width.
    """

    values: Tensor
    grid: Tensor


@dataclass(frozen=True, eq=False)
class GroupRequest:
    """What the encoder reads of one group.

    Attributes:
        images: RGB images or their patches, at least one.
        attributes: For each image the attribute to take from it, such as "colour"; "" for all.
        prompt: The prompt, for encoders that read it.
    """

    images: Sequence[Image.Image | ImagePatches]
    attributes: Sequence[str] = ()
    prompt: str = ""


def unconditional_request() -> GroupRequest:
    """Return what stands for no references: a black image without a prompt, as in EasyRef."""
    return GroupRequest([Image.new("RGB", (_BLACK_SIDE, _BLACK_SIDE))])


class ReferenceProcessor:
    """Tokenizer and image processor of an MLLM.

    Args:
        tokenizer: Tokenizer with the special tokens of Qwen2-VL's chat format.
        image_processor: A ``Qwen2VLImageProcessorPil``.
    """

    def __init__(self, tokenizer: Any, image_processor: Any) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.image_token_id: int = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ConfigError(
                "the tokenizer has no token <|image_pad|>",
                where="tokenizer",
                fix="give the tokenizer of a Qwen2-VL model",
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ReferenceProcessor:
        """Load the tokenizer and the image processor of a local folder."""
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        return cls(
            AutoTokenizer.from_pretrained(folder, local_files_only=True),
            Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both to a folder."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def cut_images(self, images: Sequence[Image.Image]) -> list[ImagePatches]:
        """Resize RGB images and cut them to patches.

        Raises:
            DataError: An image is too narrow, see :func:`check_aspect`.
        """
        for number, image in enumerate(images, 1):
            check_aspect(image.size, f"image {number}")
        pixels = self.image_processor(images=list(images), return_tensors="pt")
        grids = pixels["image_grid_thw"]
        parts = pixels["pixel_values"].split(grids.prod(1).tolist())
        return [ImagePatches(part, grid) for part, grid in zip(parts, grids, strict=True)]

    def make_inputs(
        self, groups: Sequence[GroupRequest], config: ReferencesConfig
    ) -> EncoderInputs:
        """Tokenize groups and cut their images to patches.

        Args:
            groups: One request for each row of the batch.
            config: Instruction and positions.
        """
        patches = [
            image if isinstance(image, ImagePatches) else self.cut_images([image])[0]
            for group in groups
            for image in group.images
        ]
        grids = torch.stack([image.grid for image in patches])
        values = torch.cat([image.values for image in patches])
        return self.assemble(groups, values, grids, config)

    def assemble(
        self,
        groups: Sequence[GroupRequest],
        pixel_values: Tensor,
        grids: Tensor,
        config: ReferencesConfig,
    ) -> EncoderInputs:
        """Tokenize groups whose images are cut to patches already.

        Args:
            groups: One request for each row of the batch; only the number of images is read.
            pixel_values: (patches, values), of all images in order.
            grids: (images, 3): patches in time, height and width of each image.
            config: Instruction and positions.
        """
        merge = self.image_processor.merge_size
        rows: list[tuple[list[int], list[int], Tensor]] = []
        first = 0
        for group in groups:
            group_grids = grids[first : first + len(group.images)]
            first += len(group.images)
            ids, index = self._tokenize(group, group_grids, merge, config)
            positions = rotary_positions(
                index, group_grids // torch.tensor([1, merge, merge]), config
            )
            rows.append((ids, index, positions))
        length = max(len(ids) for ids, _, _ in rows)
        pad = self.tokenizer.pad_token_id
        input_ids = torch.full((len(rows), length), 0 if pad is None else pad)
        image_index = torch.full((len(rows), length), -1)
        position_ids = torch.zeros(3, len(rows), length, dtype=torch.int64)
        for row, (ids, index, positions) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            image_index[row, : len(ids)] = torch.tensor(index)
            position_ids[:, row, : len(ids)] = positions
        return EncoderInputs(
            input_ids=input_ids,
            lengths=torch.tensor([len(ids) for ids, _, _ in rows]),
            image_index=image_index,
            position_ids=position_ids,
            next_position=torch.stack([positions.max() + 1 for _, _, positions in rows]),
            pixel_values=pixel_values,
            image_grid_thw=grids,
        )

    def _tokenize(
        self, group: GroupRequest, grids: Tensor, merge: int, config: ReferencesConfig
    ) -> tuple[list[int], list[int]]:
        """Return the tokens of a group and, for each, the number of its image or -1."""
        attributes = list(group.attributes) or [""] * len(group.images)
        turn = "".join(f"{attribute}{_VISION}" for attribute in attributes) + config.instruction
        if config.includes_prompt:
            turn += f"\n{group.prompt}"
        text = (
            f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n{turn}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        ids: list[int] = []
        index: list[int] = []
        counts = (grids.prod(1) // merge**2).tolist()
        number = 0
        for token in self.tokenizer(text, add_special_tokens=False).input_ids:
            if token == self.image_token_id and number < len(counts):
                ids += [token] * counts[number]
                index += [number] * counts[number]
                number += 1
            else:
                ids.append(token)
                index.append(-1)
        return ids, index


def check_aspect(size: tuple[int, int], where: object) -> None:
    """Refuse images that are too narrow for the image processor.

    Args:
        size: Width and height in pixels.
        where: The image, for messages.

    Raises:
        DataError: The longer side has more than 200 times the pixels of the shorter one.
    """
    if max(size) > MAX_ASPECT * min(size):
        raise DataError(
            f"the image is {format_size(size)} pixels, and reference models read sides of at most "
            f"{MAX_ASPECT}:1",
            where=where,
            fix="crop it",
        )


def rotary_positions(index: Sequence[int], grids: Tensor, config: ReferencesConfig) -> Tensor:
    """Return the rotary positions (3, length) of one row.

    Args:
        index: For each token the number of its image, or -1.
        grids: (images, 3): merged patches in time, height and width.
        config: The kind of positions.
    """
    if config.positions == "running":
        return torch.arange(len(index)).expand(3, -1)
    parts: list[Tensor] = []
    position, start = 0, 0
    while start < len(index):
        if index[start] < 0:
            parts.append(torch.full((3, 1), position))
            position, start = position + 1, start + 1
            continue
        time, height, width = grids[index[start]].tolist()
        grid = torch.stack(
            torch.meshgrid(
                torch.arange(time), torch.arange(height), torch.arange(width), indexing="ij"
            )
        )
        parts.append(grid.flatten(1) + position)
        position += max(time, height, width)
        start += time * height * width
    return torch.cat(parts, dim=1)
