"""Hooks that rivals are made of: masks on each LoRA, and what attention layers compute.

A pipeline's attached concepts are one adapter whose ranks are apart, so that the output of each
LoRA can be multiplied by a mask of its own, as if it were a separate adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from _together.cast import Size
from customize.concepts.tokens.prompt_phrases import find_phrase
from customize.core.routing import grid_of_tokens, resize_masks
from customize.families import family_of
from customize.pipeline.rank_channels import RankChannels, rank_channels
from customize.pipeline.state import get_state
from customize.stages.concept_words import token_positions

# (name of the layer, its mid-activation) -> masks (batch or 1, positions or 1, LoRAs).
Masks = Callable[[str, Tensor], Tensor | None]


class LoraGates:
    """Masks on the LoRAs of a pipeline's denoiser.

    Attributes:
        family: The models of the pipeline.
        owners: Trigger -> index of its LoRA.
        masks: What multiplies the LoRAs' outputs now; None: nothing.
    """

    def __init__(self, pipe: Any) -> None:
        state = get_state(pipe)
        assert state is not None, "attach concepts first"
        self.family = family_of(pipe.components)
        self.owners = {
            attached.concept.info.trigger_words: index
            for index, attached in enumerate(state.attached.values())
        }
        self.masks: Masks | None = None
        self._channels = [
            channel
            for channel in rank_channels(self.family, state)
            if channel.component == self.family.denoiser_key
        ]

    @contextmanager
    def attach(self) -> Iterator[LoraGates]:
        with ExitStack() as stack:
            for channel in self._channels:
                stack.callback(channel.mask(partial(self._masks_of, channel)).remove)
            yield self

    def open_only(self, *indices: int, strength: float = 1.0) -> None:
        """Let these LoRAs act everywhere, and no other."""
        weights = torch.zeros(1, 1, len(self.owners))
        weights[..., list(indices)] = strength
        self.masks = lambda name, output: weights

    def _masks_of(self, channel: RankChannels, output: Tensor) -> Tensor | None:
        masks = None if self.masks is None else self.masks(channel.module, output)
        return None if masks is None else masks[..., list(channel.owners)].to(output)


def positions_of(family: Any, things: Sequence[str], prompt: str) -> list[tuple[int, ...]]:
    """The tokens of each thing in a prompt, without its article."""
    words = [thing.removeprefix("a ") for thing in things]
    return [token_positions(family, prompt, find_phrase(word, prompt)) for word in words]


def latent_grid(family: Any, size: Size) -> Size:
    """(rows, columns) of the latents of an image."""
    factor = 2 ** (len(family.components["vae"].config.block_out_channels) - 1)
    return size[0] // factor, size[1] // factor


def layer_masks(masks: Tensor, positions: int, latents: Size) -> Tensor:
    """Resize masks (..., rows, columns) to a layer's positions: (..., positions)."""
    grid = grid_of_tokens(positions, *latents)
    assert grid is not None, positions
    return resize_masks(masks, *grid).flatten(-2)


class BlockProbe:
    """What a transformer block computed last.

    Attributes:
        query: (batch, positions, width), of its cross-attention.
        key: (batch, tokens, width), of its cross-attention.
        context: (batch, positions, width), the output of its self-attention before the last
            projection.
        attention: The cross-attention module.
    """

    query: Tensor
    key: Tensor
    context: Tensor

    def __init__(self, denoiser: Any, block: str) -> None:
        self._block = denoiser.get_submodule(block)
        self.attention = self._block.attn2

    @contextmanager
    def attach(self) -> Iterator[BlockProbe]:
        def keep(name: str, module: Any, args: Any, output: Tensor) -> None:
            setattr(self, name, output.detach())

        def keep_input(module: Any, args: tuple[Tensor, ...]) -> None:
            self.context = args[0].detach()

        handles = [
            self.attention.to_q.register_forward_hook(partial(keep, "query")),
            self.attention.to_k.register_forward_hook(partial(keep, "key")),
            self._block.attn1.to_out[0].register_forward_pre_hook(keep_input),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


class _Enough(Exception):
    """A first pass has what it needs."""


@contextmanager
def stop_after(denoiser: Any, calls: int) -> Iterator[None]:
    """End what runs inside after this many calls of the denoiser."""
    count = 0

    def stop(module: Any, args: Any, output: Any) -> None:
        nonlocal count
        count += 1
        if count == calls:
            raise _Enough

    handle = denoiser.register_forward_hook(stop)
    try:
        yield
    except _Enough:
        pass
    finally:
        handle.remove()
