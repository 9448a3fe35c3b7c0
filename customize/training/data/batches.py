"""What is drawn at random at each step, as pure functions of (seed, step, process).

No random stream runs through the run: each step seeds its own. So a resumed run draws what an
uninterrupted one would have, and whatever else draws in between changes nothing.
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
    """Which pictures one process sees at one step.

    Attributes:
        pictures: numbers of pictures, as many as the batch.
        mirrored: for each, whether it is mirrored left to right.
        silent: for each, whether its caption is left empty.
    """

    pictures: list[int]
    mirrored: list[bool]
    silent: list[bool]


@dataclass(frozen=True, eq=False)
class BatchNoise:
    """The random numbers of one batch, on the device.

    Attributes:
        latents: (batch, channels, height, width), the draw from the autoencoder's distribution.
        noise: the same shape, what is mixed in.
        u: (batch,), in (0, 1), the noise levels.
    """

    latents: Tensor
    noise: Tensor
    u: Tensor


def stream_seed(*parts: int | str) -> int:
    """A 32-bit seed for the stream of these names and numbers."""
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
    """The ``turn``-th batch of ``size`` pictures from ``count``.

    Each picture comes once before any comes again; the order of every pass is another. In groups,
    that holds within each, and over ``count`` turns all pictures come equally often.

    Where several share the batches, part (k, n) is what the k-th of n gets: the places of all
    batches, one after another, go round among them, and so do whole batches where there are groups.
    So each gets as many places as any other, or one more; of a batch of two, two get one each.

    Args:
        turn: counts the batches of all processes and accumulations from the start of the run.
        flip: mirror half of the draws.
        dropout: share of captions left empty.
        stream: such as "concept"; streams of other names are independent.
        groups: of each picture, such as its size; a batch is of one group. None: all are of one.
        part: whose places, and among how many; (0, 1) for all.
    """
    mine, among = part
    if groups is None:
        places = range(turn * size, (turn + 1) * size)
        positions = [place // among for place in places if place % among == mine]
        pictures = [_order(seed, at // count, count, stream)[at % count] for at in positions]
    elif turn % among == mine:
        pictures = _of_one_group(seed, turn // among, size, groups, stream)
    else:
        pictures = []
    size = len(pictures)
    if not flip and not dropout:
        nothing = [False] * size
        return BatchChoice(pictures, nothing, nothing)
    generator = Generator().manual_seed(stream_seed(seed, turn, stream))
    draws: list[list[float]] = torch.rand(2, size, generator=generator).tolist()
    return BatchChoice(
        pictures,
        [flip and u < 0.5 for u in draws[0]],
        [u < dropout for u in draws[1]],
    )


def draw_noise(
    generator: Generator, seed: int, shape: Sequence[int], density: str, offset: float
) -> BatchNoise:
    """The random numbers of a batch, drawn on the generator's device.

    Args:
        generator: seeded anew here.
        seed: of this batch, from :func:`stream_seed`.
        shape: of the batch's latents.
        density: a name in :data:`customize.core.objectives.FLOW_DENSITIES`.
        offset: strength of offset noise, 0 for none.
    """
    generator.manual_seed(seed)
    device = generator.device
    u = FLOW_DENSITIES[density](shape[0], generator)
    latents, noise = torch.randn(2, *shape, generator=generator, device=device).unbind()
    if offset:
        noise = add_offset_noise(noise, offset, generator)
    return BatchNoise(latents, noise, u)


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int, stream: str) -> tuple[int, ...]:
    generator = Generator().manual_seed(stream_seed(seed, "order", stream, epoch))
    return tuple(torch.randperm(count, generator=generator).tolist())


def _of_one_group(
    seed: int, turn: int, size: int, groups: Sequence[Hashable], stream: str
) -> list[int]:
    """Every picture gives its group a turn in each pass; a group's batches follow one another
    through its own pictures, in the orders that they have among all."""
    count = len(groups)
    epoch, place = divmod(turn, count)
    turns = _order(seed, epoch, count, f"{stream} groups")
    group = groups[turns[place]]
    own = sum(each == group for each in groups)
    earlier = epoch * own + sum(groups[number] == group for number in turns[:place])
    found: list[int] = []
    for at in range(earlier * size, (earlier + 1) * size):
        order = _order(seed, at // own, count, stream)
        found.append([number for number in order if groups[number] == group][at % own])
    return found


def compose_batch(
    config: TrainConfig,
    texts: Sequence[str],
    concepts: Sequence[range],
    classes: Sequence[range],
    turn: int,
    sizes: Sequence[Hashable] = (),
) -> tuple[list[int], list[bool], list[str]]:
    """Picture numbers, mirroring and captions of a batch: the concepts' half, then the classes'.

    Several concepts share each half as :func:`choose_images` says, and so do their classes.

    Args:
        texts: the caption of each picture.
        concepts: the numbers of each concept's pictures.
        classes: the numbers of the class pictures of each concept; none where there are none.
        sizes: of each picture, where they are in buckets: each half is of one.
    """
    chosen: list[int] = []
    mirrored: list[bool] = []
    silent: list[bool] = []
    for half, shared in (("concept", concepts), ("class", classes)):
        for number, own in enumerate(shared):
            found = choose_images(
                config.seed,
                turn,
                config.batch_size,
                len(own),
                flip=config.flip,
                dropout=config.caption_dropout,
                stream=f"{half} {number}" if number else half,
                groups=sizes[own.start : own.stop] if config.buckets else None,
                part=(number, len(shared)),
            )
            chosen += [own.start + picture for picture in found.pictures]
            mirrored += found.mirrored
            silent += found.silent
    captions = ["" if s else texts[i] for i, s in zip(chosen, silent, strict=True)]
    return chosen, mirrored, captions
