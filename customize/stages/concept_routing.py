"""Denoising with each concept confined to its own words and its own part of the picture.

Each concept's ranks (:mod:`customize.core.routing`) act on its own tokens in the projections to
keys and values of cross-attention, and inside its mask in all other layers. Masks are found while
the picture is drawn: at high noise levels, where the layout is decided, the maps of what positions
attend to each concept's tokens are averaged over the cross-attention layers and over the steps.
Rows of other prompts, such as the negative one, are predicted as without routing.

Hooks change the text inputs of cross-attention and the mid-activations of the adapters; so each
step takes one call of the denoiser, as without routing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from customize.core.routing import (
    attention_to_tokens,
    competing_masks,
    grid_of_tokens,
    rank_mask,
    resize_masks,
)
from customize.errors import PipelineError
from customize.families import Family
from customize.families.pipeline_components import uncompiled
from customize.pipeline.call_scope import capture_call_scope
from customize.pipeline.rank_channels import RankChannels
from customize.stages.concept_words import RoutedPrompt
from customize.stages.prompt_rows import PromptRows

#: Above this noise level, where 1 is pure noise, the layout is decided, and masks are found. Below
#: it they act, and values are those of each concept alone.
LAYOUT_ABOVE = 0.8

#: See :func:`customize.core.routing.competing_masks`.
TEMPERATURE = 0.1

#: A concept is found where its mask is above this share; if it is nowhere, no mask acts.
FOUND = 0.5

#: The shorter side of the grid of masks is at most twice this number of cells.
_GRID = 16

# The text argument of UNets.
_TEXT = "encoder_hidden_states"

# (rows, columns) -> masks (concepts of the prompt, rows, columns), in [0, 1].
GivenMasks = Callable[[int, int], Tensor]


@dataclass(eq=False)
class _Picture:
    """What is known of one picture of the call.

    Attributes:
        routed: Its prompt.
        maps: (concepts of the prompt, rows, columns), the sum over steps; None before the first.
        steps: The number of steps in the sum.
        masks: Of the same shape; None before they act, and where they are not found.
        masked: The number of steps that the masks are made of.
    """

    routed: RoutedPrompt
    maps: Tensor | None = None
    steps: int = 0
    masks: Tensor | None = None
    masked: int = 0


@dataclass(eq=False)
class _DenoiserCall:
    """One call of the denoiser.

    Attributes:
        pictures: Row of the batch -> its picture, without rows of other prompts.
        batch: Number of rows.
        grid: (rows, columns) of the latents.
        finds: Whether maps are collected.
        queries: Of each cross-attention layer that is running.
        keys: The same.
        maps: Row -> the maps of the layers so far.
        masks: What is computed once for all layers of a kind.
    """

    pictures: dict[int, _Picture]
    batch: int
    grid: tuple[int, int]
    finds: bool
    queries: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[int, list[Tensor]] = field(default_factory=dict)
    masks: dict[Any, Tensor] = field(default_factory=dict)


class ConceptRouter:
    """The hooks of a denoiser during one call of a pipeline.

    Args:
        family: The models of the pipeline.
        channels: The ranks of the adapted layers.
        concepts: The number of attached concepts.
        prompts: One for each prompt of the call, in their order.
        given: Masks of each prompt's concepts; None to find them.
    """

    def __init__(
        self,
        family: Family,
        channels: Sequence[RankChannels],
        concepts: int,
        prompts: Sequence[RoutedPrompt],
        given: Sequence[GivenMasks] | None = None,
    ) -> None:
        self.family, self.prompts, self.given = family, prompts, given
        self.channels = [c for c in channels if c.component == family.denoiser_key]
        self.concepts = concepts
        self.has_matched = False
        self.pictures: dict[int, _Picture] = {}
        self._prompt_rows = PromptRows([prompt.encoded for prompt in prompts])
        self._in_this_call = capture_call_scope()
        self._running: list[_DenoiserCall | None] = []
        # The latest text argument of the denoiser, the rows with values of their own, and the
        # inputs of keys and values in its place.
        self._texts: Tensor | None = None
        self._own_values: tuple[bool, ...] = ()
        self._keys, self._values = torch.empty(0), torch.empty(0)

    @contextmanager
    def attach(self) -> Iterator[None]:
        """Route inside the context.

        Raises:
            PipelineError: The denoiser was not called with the prompts, because the pipeline
                encodes them in another way.
        """
        denoiser = self.family.components[self.family.denoiser_key]
        layers = uncompiled(denoiser)
        attentions = self.family.cross_attention_layers()
        of_text = {f"{name}.{part}" for name in attentions for part in ("to_k", "to_v")}
        with ExitStack() as stack:

            def keep(handle: Any) -> None:
                stack.callback(handle.remove)

            keep(denoiser.register_forward_pre_hook(self._before, with_kwargs=True))
            keep(denoiser.register_forward_hook(self._after, with_kwargs=True, prepend=True))
            for channel in self.channels:
                mask = partial(self._mask_ranks, channel.owners, channel.module in of_text)
                keep(channel.down.register_forward_hook(mask))
            for index, name in enumerate(attentions):
                give = partial(self._give_values, index)
                keep(layers.get_submodule(name).to_v.register_forward_pre_hook(give))
            for name in attentions if self.given is None else ():
                attention = layers.get_submodule(name)
                keep(attention.to_q.register_forward_hook(partial(self._keep_query, name)))
                keep(attention.to_k.register_forward_hook(partial(self._keep_key, name)))
                keep(attention.register_forward_hook(partial(self._collect, name)))
            yield
        if not self.has_matched:
            raise PipelineError(
                "the denoiser was never called with the encoded prompt, so together= had no effect",
                where="together",
                fix="leave out arguments that change how prompts are encoded, and steps that "
                "rewrite them",
            )

    # -- the denoiser -----------------------------------------------------------------------------

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = list(inspect.signature(type(uncompiled(module)).forward).parameters)[1:]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        call = self._plan(arguments) if self._in_this_call() else None
        self._running.append(call)
        if call is None or not call.pictures:
            return None
        self._encode_rows(call, arguments[_TEXT])
        return (), arguments | {_TEXT: self._keys}

    def _encode_rows(self, call: _DenoiserCall, texts: Tensor) -> None:
        """Set the text inputs of keys and values, which stay the same tensors in most steps."""
        own_values = tuple(
            picture.masks is not None and not call.finds for picture in call.pictures.values()
        )
        if self._texts is texts and self._own_values == own_values:
            return
        self._texts, self._own_values = texts, own_values
        self._keys, self._values = texts.clone(), texts.clone()
        for (row, picture), is_own in zip(call.pictures.items(), own_values, strict=True):
            routed = picture.routed
            self._keys[row] = routed.keys.to(texts)
            self._values[row] = (routed.values if is_own else routed.keys).to(texts)

    def _after(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call = self._running.pop()
        if call is None:
            return
        for row, maps in call.maps.items():
            picture = call.pictures[row]
            latest = torch.stack(maps).mean(0)
            picture.maps = latest if picture.maps is None else picture.maps + latest
            picture.steps += 1

    def _plan(self, arguments: Mapping[str, Any]) -> _DenoiserCall | None:
        rows = self._prompt_rows.match(arguments[_TEXT])
        if not rows:
            return None
        self.has_matched = True
        pictures = {}
        for position, (row, prompt) in enumerate(rows.items()):
            picture = self.pictures.setdefault(position, _Picture(self.prompts[prompt]))
            if picture.routed.named:
                pictures[row] = picture
        grid = self.family.latent_grid(arguments)
        level = self.family.noise_level(arguments)
        batch = len(arguments[self.family.latents_argument])
        call = _DenoiserCall(pictures, batch, grid, level > LAYOUT_ABOVE)
        for picture in pictures.values():
            self._update_masks(picture, grid, level)
            call.finds |= self.given is None and picture.maps is None
        return call

    def _update_masks(self, picture: _Picture, grid: tuple[int, int], level: float) -> None:
        if self.given is not None:
            if picture.masks is None:  # once a call
                index = self.prompts.index(picture.routed)
                picture.masks = self.given[index](*mask_grid(*grid))
        elif picture.maps is not None and level <= LAYOUT_ABOVE and picture.masked != picture.steps:
            picture.masked = picture.steps
            masks = competing_masks(picture.maps / picture.steps, TEMPERATURE)
            picture.masks = masks if float(masks.amax((-2, -1)).min()) > FOUND else None

    # -- adapted layers ---------------------------------------------------------------------------

    def _mask_ranks(
        self, owners: tuple[int, ...], of_text: bool, module: Any, args: Any, output: Tensor
    ) -> Tensor | None:
        call = self._running[-1] if self._running and self._in_this_call() else None
        if call is None or not call.pictures:
            return None
        if output.ndim == 4:  # (batch, ranks, rows, columns), of a convolution
            rows, columns = output.shape[-2:]
            masks = self._picture_masks(call, rows, columns, output.device)
            return output * masks[:, list(owners)].to(output)
        if of_text:
            key: Any = ("text", owners, output.shape[1])
            if key not in call.masks:
                masks = self._token_masks(call, output.shape[1], output.device)
                call.masks[key] = rank_mask(masks, owners).to(output)
        else:
            key = ("picture", owners, output.shape[1])
            if key not in call.masks:
                grid = _layer_grid(call, output.shape[1])
                masks = self._picture_masks(call, *grid, output.device).flatten(-2)
                call.masks[key] = rank_mask(masks, owners).to(output)
        return output * call.masks[key]

    def _picture_masks(
        self, call: _DenoiserCall, rows: int, columns: int, device: torch.device
    ) -> Tensor:
        """(batch, concepts, rows, columns): ones where nothing is routed, or not yet."""
        masks = torch.ones(call.batch, self.concepts, rows, columns, device=device)
        for row, picture in call.pictures.items():
            if picture.masks is not None:
                resized = resize_masks(picture.masks, rows, columns)
                masks[row] = 0.0  # of concepts that the prompt does not name
                masks[row, [each.index for each in picture.routed.named]] = resized.to(masks)
        return masks

    def _token_masks(self, call: _DenoiserCall, length: int, device: torch.device) -> Tensor:
        """(batch, concepts, tokens)."""
        masks = torch.ones(call.batch, self.concepts, length, device=device)
        for row, picture in call.pictures.items():
            masks[row] = 0.0
            for each, positions in zip(picture.routed.named, picture.routed.tokens, strict=True):
                masks[row, each.index, list(positions)] = 1.0
        return masks

    def _give_values(self, index: int, module: Any, args: tuple[Any, ...]) -> Any:
        """Replace the input of the projection to values of one cross-attention layer."""
        call = self._running[-1] if self._running and self._in_this_call() else None
        if call is None or not call.pictures:
            return None
        length, values = args[0].shape[1], self._values
        if values.shape[1] > length:  # the part of this layer, with tokens of its own
            values = values[:, index * length : (index + 1) * length].contiguous()
        return (values, *args[1:])

    # -- maps -------------------------------------------------------------------------------------

    def _keep_query(self, name: str, module: Any, args: Any, output: Tensor) -> None:
        if (call := self._finding()) is not None:
            call.queries[name] = output

    def _keep_key(self, name: str, module: Any, args: Any, output: Tensor) -> None:
        if (call := self._finding()) is not None:
            call.keys[name] = output

    def _finding(self) -> _DenoiserCall | None:
        call = self._running[-1] if self._running and self._in_this_call() else None
        return call if call is not None and call.finds and call.pictures else None

    @torch.no_grad()
    def _collect(self, name: str, module: Any, args: Any, output: Any) -> None:
        call = self._finding()
        if call is None:
            return
        if name not in call.queries or name not in call.keys:
            raise PipelineError(
                "the attention processor does not call to_q and to_k, which together= reads",
                where=f"{self.family.denoiser_key}.{name}",
                fix="call unfuse_qkv_projections(), or set diffusers' own processor",
            )
        query, key = call.queries.pop(name), call.keys.pop(name)
        rows = list(call.pictures)
        attended = attention_to_tokens(query[rows], key[rows], module.heads, module.scale)
        grid = _layer_grid(call, query.shape[1])
        for attention, (row, picture) in zip(attended, call.pictures.items(), strict=True):
            maps = torch.stack([attention[:, list(at)].sum(-1) for at in picture.routed.tokens])
            resized = resize_masks(maps.unflatten(-1, grid), *mask_grid(*call.grid))
            call.maps.setdefault(row, []).append(resized)


def _layer_grid(call: _DenoiserCall, positions: int) -> tuple[int, int]:
    grid = grid_of_tokens(positions, *call.grid)
    if grid is None:
        raise PipelineError(
            f"a layer of {positions} positions is on no grid of this picture",
            where="together",
            fix="leave together= out on this pipeline",
        )
    return grid


def mask_grid(rows: int, columns: int) -> tuple[int, int]:
    """Return the grid of masks: the latents' one, halved to about 16 cells along its shorter side.

    Args:
        rows: Of the latents.
        columns: Of the latents.
    """
    halvings = max(0, math.floor(math.log2(max(1, min(rows, columns) / _GRID))))
    return -(-rows // 2**halvings), -(-columns // 2**halvings)
