"""Hooks of the attentions of the picture to the prompt, in denoising with routed concepts.

While the layout is decided, they collect maps of what positions attend to each concept's tokens,
of which masks are made. As soon as there are masks, positions attend to each concept's tokens in
proportion to its mask (:func:`customize.core.routing.attention_bias`). Otherwise a concept changes
what attends to it in the other's mask: a rabbit beside a blue fish becomes blue. Families whose
attentions take no such argument keep their scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from customize.core.routing import attention_bias, resize_masks
from customize.errors import PipelineError
from customize.families import Family
from customize.families.pipeline_components import uncompiled
from customize.families.token_layout import TextAttention
from customize.stages.attention_maps import attended_tokens
from customize.stages.routed_call import RoutedCall

#: The shorter side of the grid of masks is at most twice this number of cells.
_GRID = 16


class RoutedAttentions:
    """The hooks of the attentions of one denoiser.

    Args:
        family: The models of the pipeline.
        running: Returns the running call of the denoiser; None in one that is not routed.
        stop: Called with the error if an attention is on no grid of the picture, or its maps cannot
            be collected.
    """

    def __init__(
        self,
        family: Family,
        running: Callable[[], RoutedCall | None],
        stop: Callable[[PipelineError], None],
    ) -> None:
        self.family, self.running, self.stop = family, running, stop

    def hook(self, component: str, keep: Callable[[Any], Any], finds_masks: bool) -> None:
        """Register the hooks.

        Args:
            component: Of the denoiser.
            keep: Called with the handle of each hook.
            finds_masks: Whether maps are collected.
        """
        layers = uncompiled(self.family.components[component])
        for attention in self.family.text_attentions(component):
            module = layers.get_submodule(attention.name)
            if attention.bias:
                bias = partial(self._bias, attention)
                keep(module.register_forward_pre_hook(bias, with_kwargs=True))
            if not finds_masks:
                continue
            query, key = (module.get_submodule(name) for name in (attention.query, attention.key))
            keep(query.register_forward_hook(partial(self._keep_query, attention.name)))
            keep(key.register_forward_hook(partial(self._keep_key, attention.name)))
            collect = partial(self._collect, attention)
            keep(module.register_forward_hook(collect, with_kwargs=True))

    # -- scores -----------------------------------------------------------------------------------

    def _bias(
        self, attention: TextAttention, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = self.running()
        if call is None or not any(picture.is_divided for picture in call.pictures.values()):
            return None
        texts = kwargs["encoder_hidden_states"]
        # With an IP-Adapter, its image embeddings follow the text.
        text = texts[0] if isinstance(texts, tuple) else texts
        try:
            bias = self._bias_of(call, args[0], text.shape[1])
        except PipelineError as error:
            self.stop(error)
            return None
        given = kwargs.get(attention.bias)
        return args, kwargs | {attention.bias: bias if given is None else bias + given}

    def _bias_of(self, call: RoutedCall, states: Tensor, length: int) -> Tensor:
        """(entries, positions, tokens) for the hidden states (entries, positions, width)."""
        entries, positions = states.shape[:2]
        key = ("bias", entries, positions, length)
        if key not in call.masks:
            per_row = entries // call.batch  # frames
            grid = layer_grid(self.family, call, per_row * positions)
            bias = torch.zeros(call.batch, per_row * positions, length, device=states.device)
            for row, picture in call.pictures.items():
                if picture.masks is not None and picture.is_divided:
                    masks = resize_masks(picture.masks, *grid[1:]).flatten(1).to(states.device)
                    bias[row] = attention_bias(masks, picture.routed.tokens, length)
            call.masks[key] = bias.reshape(entries, positions, length).to(states)
        return call.masks[key]

    # -- maps -------------------------------------------------------------------------------------

    def _keep_query(self, name: str, module: Any, args: Any, output: Tensor) -> None:
        if (call := self._finding()) is not None:
            call.queries[name] = output

    def _keep_key(self, name: str, module: Any, args: Any, output: Tensor) -> None:
        if (call := self._finding()) is not None:
            call.keys[name] = output

    def _finding(self) -> RoutedCall | None:
        call = self.running()
        return call if call is not None and call.finds else None

    @torch.no_grad()
    def _collect(
        self,
        attention: TextAttention,
        module: Any,
        args: Any,
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        call = self._finding()
        if call is None:
            return
        try:
            self._collect_maps(call, attention, module, kwargs)
        except PipelineError as error:
            self.stop(error)

    def _collect_maps(
        self, call: RoutedCall, attention: TextAttention, module: Any, kwargs: dict[str, Any]
    ) -> None:
        name = attention.name
        if name not in call.queries or name not in call.keys:
            raise PipelineError(
                f"the attention processor does not call {attention.query} and {attention.key}, "
                "which together= reads",
                where=name,
                fix="call unfuse_qkv_projections(), or set diffusers' own processor",
            )
        query, key = call.queries.pop(name), call.keys.pop(name)
        attended = attended_tokens(self.family, call, attention, module, kwargs, query, key)
        for each, (row, picture) in zip(attended, call.pictures.items(), strict=True):
            maps = torch.stack([each[:, list(at)].sum(-1) for at in picture.routed.tokens])
            grid = layer_grid(self.family, call, maps.shape[1])
            count = math.prod(grid)  # without padding
            maps = maps[:, :count].unflatten(-1, grid)
            call.maps.setdefault(row, []).append(resize_masks(maps, *mask_grid(*call.grid[1:])))


def layer_grid(family: Family, call: RoutedCall, positions: int) -> tuple[int, int, int]:
    """Return (frames, rows, columns) of a layer with this number of positions of the picture.

    Raises:
        PipelineError: The positions are on no grid of the picture.
    """
    grid = family.layer_grid(positions, call.grid)
    if grid is None:
        raise PipelineError(
            f"a layer of {positions} positions is on no grid of this picture",
            where="together",
            fix="leave together= out on this pipeline, and reference pictures with it",
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
