"""Random numbers of each training step, as pure functions of (seed, step, process).

Each step seeds its own generators, so that a resumed run draws the same numbers as an uninterrupted
one, and other random draws have no effect.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Generator, Tensor

from customize.core.objectives import FLOW_DENSITIES, add_offset_noise
from customize.training.config import TrainConfig


@dataclass(frozen=True)
class BatchChoice:
    """The images of one process at one step.

    Attributes:
        indices: Indices of the images in the batch.
        mirrored: Whether each image is mirrored horizontally.
        dropped: Whether each caption is dropped.
    """

    indices: list[int]
    mirrored: list[bool]
    dropped: list[bool]


@dataclass(frozen=True, eq=False)
class BatchNoise:
    """The random numbers of one batch, on the device, in float32.

    Attributes:
        latents: (batch, channels, height, width), Gaussian, for sampling from the autoencoder's
            distribution.
        noise: The same shape, the noise added to the latents.
        u: (batch,), in (0, 1), the noise levels.
    """

    latents: Tensor
    noise: Tensor
    u: Tensor


def stream_seed(*parts: int | str) -> int:
    """Return a 32-bit seed for a random stream identified by names and numbers."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def choose_images(
    seed: int,
    turn: int,
    size: int,
    count: int,
    *,
    flip: bool,
    dropout: float,
    stream: str,
    groups: Sequence[Hashable] | None = None,
    part: tuple[int, int] = (0, 1),
) -> BatchChoice:
    """Choose the ``turn``-th batch of ``size`` images from ``count``.

    Each pass over the images has its own random order. With groups, each group has its own passes,
    and over ``count`` turns all images are chosen equally often.

    If several concepts share the batches, the slots of consecutive batches are assigned to them in
    turn; with groups, whole batches are. The numbers of slots differ by at most one.

    Args:
        seed: Seed of the run.
        turn: Index of the batch over all processes and accumulations of the run.
        size: Batch size.
        count: Number of images.
        flip: Mirror each image with probability 0.5.
        dropout: Probability of an empty caption.
        stream: Name of the random stream, such as "concept"; streams are independent.
        groups: Group of each image, such as its size; a batch has one group. None: no groups.
        part: Index of the concept, and number of concepts that share the batches.
    """
    concept, concepts = part
    if groups is None:
        slots = range(turn * size, (turn + 1) * size)
        positions = [slot // concepts for slot in slots if slot % concepts == concept]
        indices = [pass_order(seed, i // count, count, stream)[i % count] for i in positions]
    elif turn % concepts == concept:
        indices = _choose_from_group(seed, turn // concepts, size, groups, stream)
    else:
        indices = []
    size = len(indices)
    if not flip and not dropout:
        disabled = [False] * size
        return BatchChoice(indices, disabled, disabled)
    generator = Generator().manual_seed(stream_seed(seed, turn, stream))
    draws: list[list[float]] = torch.rand(2, size, generator=generator).tolist()
    return BatchChoice(
        indices,
        [flip and u < 0.5 for u in draws[0]],
        [u < dropout for u in draws[1]],
    )


def draw_noise(
    generator: Generator, seed: int, shape: Sequence[int], density: str, offset: float
) -> BatchNoise:
    """Draw the random numbers of a batch on the generator's device.

    Args:
        generator: A generator, which is seeded by this function.
        seed: Seed of the batch, from :func:`stream_seed`.
        shape: Shape of the batch's latents, (batch, channels, height, width).
        density: A name in :data:`customize.core.objectives.FLOW_DENSITIES`.
        offset: Strength of offset noise, from 0 (off).
    """
    generator.manual_seed(seed)
    device = generator.device
    u = FLOW_DENSITIES[density](shape[0], generator)
    latents, noise = torch.randn(2, *shape, generator=generator, device=device).unbind()
    if offset:
        noise = add_offset_noise(noise, offset, generator)
    return BatchNoise(latents, noise, u)


@lru_cache(maxsize=8)
def pass_order(seed: int, epoch: int, count: int, stream: str) -> tuple[int, ...]:
    """Return the random order of ``count`` items in a pass over them."""
    generator = Generator().manual_seed(stream_seed(seed, "order", stream, epoch))
    return tuple(torch.randperm(count, generator=generator).tolist())


def _choose_from_group(
    seed: int, turn: int, size: int, groups: Sequence[Hashable], stream: str
) -> list[int]:
    """Choose a batch of one group.

    In each pass every image gives its group one batch. The batches of a group run through its
    images in the order that they have among all images.
    """
    count = len(groups)
    epoch, position = divmod(turn, count)
    turns = pass_order(seed, epoch, count, f"{stream} groups")
    group = groups[turns[position]]
    group_size = sum(other == group for other in groups)
    earlier = epoch * group_size + sum(groups[index] == group for index in turns[:position])
    chosen: list[int] = []
    for i in range(earlier * size, (earlier + 1) * size):
        order = pass_order(seed, i // group_size, count, stream)
        chosen.append([index for index in order if groups[index] == group][i % group_size])
    return chosen


def compose_batch(
    config: TrainConfig,
    texts: Sequence[str],
    concepts: Sequence[range],
    classes: Sequence[range],
    turn: int,
    sizes: Sequence[Hashable] = (),
) -> tuple[list[int], list[bool], list[str]]:
    """Compose a batch of concept images, followed by as many class images.

    Several concepts share each half of the batch; see :func:`choose_images`.

    Args:
        config: Settings of the run.
        texts: Caption of each image.
        concepts: Range of image indices of each concept.
        classes: Range of class image indices of each concept; empty without class images.
        turn: Index of the batch.
        sizes: Bucket of each image, if buckets are used; each half of a batch has one bucket.

    Returns:
        Image indices, whether each image is mirrored, and captions.
    """
    chosen: list[int] = []
    mirrored: list[bool] = []
    dropped: list[bool] = []
    for half, shared in (("concept", concepts), ("class", classes)):
        for position, numbers in enumerate(shared):
            choice = choose_images(
                config.seed,
                turn,
                config.batch_size,
                len(numbers),
                flip=config.flip,
                dropout=config.caption_dropout,
                stream=f"{half} {position}" if position else half,
                groups=sizes[numbers.start : numbers.stop] if config.buckets else None,
                part=(position, len(shared)),
            )
            chosen += [numbers.start + index for index in choice.indices]
            mirrored += choice.mirrored
            dropped += choice.dropped
    captions = [
        "" if is_dropped else texts[i] for i, is_dropped in zip(chosen, dropped, strict=True)
    ]
    return chosen, mirrored, captions
