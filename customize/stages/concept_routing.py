"""Denoising with each concept confined to its own words and its own part of the picture.

Each concept's ranks (:mod:`customize.core.routing`) act on its own tokens where a layer computes
from the prompt, and inside its mask where it computes from the picture; families know which layer
does what (:meth:`customize.families.Family.layer_tokens`). Other words of the prompt get no ranks,
because what they stand for is everywhere in the picture. Masks are found while the picture is
drawn: at high noise levels, where the layout is decided, the maps of what positions attend to each
concept's tokens are averaged over the attention layers and over the steps. A video has masks for
each of its latent frames, as things move. Masks also confine what positions attend to
(:mod:`customize.stages.routed_attentions`). In the rows of a picture's other prompts, such as the
negative one, no concept acts, so that guidance leads from what the model draws without them to each
concept in its mask. If concepts acted there on the whole picture, guidance would lead away from a
concept in its own mask, too, and further away from it in the others' masks.

Hooks change the text inputs of the denoiser and the mid-activations of the adapters; so each step
takes one call of the denoiser, as without routing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from customize.core.routing import (
    competing_masks,
    rank_mask,
    resize_masks,
)
from customize.errors import PipelineError
from customize.families import Family
from customize.families.pipeline_components import uncompiled
from customize.families.token_layout import TokenKind
from customize.pipeline.call_scope import capture_call_scope
from customize.pipeline.rank_channels import RankChannels
from customize.stages.concept_words import RoutedPrompt
from customize.stages.prompt_rows import PromptRows, replace_rows
from customize.stages.routed_attentions import RoutedAttentions, layer_grid, mask_grid
from customize.stages.routed_call import RoutedCall, RoutedPicture

#: Above this noise level, where 1 is pure noise, the layout is decided, and masks are found. Below
#: it they act. Levels are those before the shift that a model was trained with.
LAYOUT_ABOVE = 0.9

#: See :func:`customize.core.routing.competing_masks`.
TEMPERATURE = 0.1

#: A concept is found where its mask is above this share; if it is nowhere, no mask acts.
FOUND = 0.5

# (rows, columns) -> masks (concepts of the prompt, rows, columns), in [0, 1].
GivenMasks = Callable[[int, int], Tensor]


class ConceptRouter:
    """The hooks of a denoiser during one call of a pipeline.

    Args:
        family: The models of the pipeline.
        channels: The ranks of the adapted layers.
        concepts: The number of attached concepts.
        prompts: One for each prompt of the call, in their order.
        given: Masks of each prompt's concepts; None to find them.
        wordless: Indices of concepts that act everywhere, as without routing.
        is_requested: Whether the call asks for routing. If not, what cannot be routed is drawn on
            without it, and ``stopped_by`` says why.
    """

    def __init__(
        self,
        family: Family,
        channels: Sequence[RankChannels],
        concepts: int,
        prompts: Sequence[RoutedPrompt],
        given: Sequence[GivenMasks] | None = None,
        wordless: Sequence[int] = (),
        is_requested: bool = True,
    ) -> None:
        self.family, self.prompts, self.given = family, prompts, given
        self.is_requested, self.stopped_by = is_requested, ""
        self.channels = [c for c in channels if c.component in family.denoisers]
        self.concepts, self.wordless = concepts, list(wordless)
        self.has_matched = False
        self.pictures: dict[int, RoutedPicture] = {}
        self._prompt_rows = PromptRows([prompt.encoded for prompt in prompts])
        self._in_this_call = capture_call_scope()
        self._running: list[RoutedCall | None] = []
        # Families whose rows stay as they are encoded have one tensor for all.
        self._has_rows = any(prompt.rows is not prompt.encoded for prompt in prompts)
        # The latest text argument of the denoiser, and the one in its place.
        self._texts: Tensor | None = None
        self._routed_texts = torch.empty(0)

    @contextmanager
    def attach(self) -> Iterator[None]:
        """Route inside the context.

        Raises:
            PipelineError: The denoiser was not called with the prompts, because the pipeline
                encodes them in another way.
        """
        with ExitStack() as stack:
            for component in self.family.denoisers:
                self._hook(component, lambda handle: stack.callback(handle.remove))
            yield
        if not self.has_matched:
            self._stop(
                PipelineError(
                    "the denoiser was never called with the encoded prompt, so together= had no "
                    "effect",
                    where="together",
                    fix="leave out arguments that change how prompts are encoded, and steps that "
                    "rewrite them",
                )
            )

    def _stop(self, error: PipelineError) -> None:
        """Raise an error if the call asks for routing; otherwise route nothing from here on."""
        if self.is_requested:
            raise error
        self.stopped_by = error.problem

    def _hook(self, component: str, keep: Callable[[Any], Any]) -> None:
        """Hook one denoiser."""
        denoiser = self.family.components[component]
        keep(denoiser.register_forward_pre_hook(self._before, with_kwargs=True))
        keep(denoiser.register_forward_hook(self._after, with_kwargs=True, prepend=True))
        for channel in self.channels:
            if channel.component == component and channel.tokens is not None:
                masks = partial(self._mask_of, channel.owners, channel.tokens)
                keep(channel.mask(masks, self._routed_entries))
        attentions = RoutedAttentions(self.family, self._routed_call, self._stop)
        attentions.hook(component, keep, finds_masks=self.given is None)

    # -- the denoiser -----------------------------------------------------------------------------

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = list(inspect.signature(type(uncompiled(module)).forward).parameters)[1:]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        is_routed = self._in_this_call() and not self.stopped_by
        call = self._plan(arguments) if is_routed else None
        self._running.append(call)
        if call is None or not call.pictures:
            return None  # nothing is replaced in a call for negative prompts alone
        replaced = dict(arguments)
        texts = arguments[self.family.text_argument]
        if self._has_rows:
            replaced[self.family.text_argument] = self._encode_rows(call, texts)
        pooled = {row: p.routed.pooled for row, p in call.pictures.items()}
        vectors = [vector for vector in pooled.values() if vector is not None]
        if vectors:
            kwargs = self.family.denoiser_kwargs(
                {"prompt_embeds": texts, "pooled_prompt_embeds": torch.stack(vectors)}
            )
            del kwargs[self.family.text_argument]
            replaced |= replace_rows(arguments, kwargs, list(pooled), replaces_all=False)
        return (), replaced

    def _encode_rows(self, call: RoutedCall, texts: Tensor) -> Tensor:
        """Return the text input with rows of routed prompts, the same tensor in most steps."""
        if self._texts is not texts:
            self._texts, self._routed_texts = texts, texts.clone()
            count = len(texts) // call.batch
            for row, picture in call.pictures.items():
                routed = picture.routed.rows.to(texts)
                self._routed_texts[row * count : (row + 1) * count] = routed
        return self._routed_texts

    def _after(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call = self._running.pop()
        if call is None:
            return
        for row, maps in call.maps.items():
            picture = call.pictures[row]
            latest = torch.stack(maps).mean(0)
            picture.maps = latest if picture.maps is None else picture.maps + latest
            picture.steps += 1

    def _plan(self, arguments: Mapping[str, Any]) -> RoutedCall | None:
        texts = arguments[self.family.text_argument]
        batch = len(arguments[self.family.latents_argument])
        rows = self._prompt_rows.match(texts, max(1, len(texts) // batch))
        self.has_matched |= bool(rows)
        if not self.has_matched:
            return None
        pictures = {}
        for position, (row, prompt) in enumerate(rows.items()):
            picture = self.pictures.setdefault(position, RoutedPicture(self.prompts[prompt]))
            if picture.routed.named:
                pictures[row] = picture
        # Rows of other prompts are in the order of the pictures.
        rest = [row for row in range(batch) if row not in rows]
        count = len(rows) or len(self.pictures)
        negatives = [row for k, row in enumerate(rest) if self.pictures[k % count].routed.named]
        grid = self.family.token_grid(arguments)
        level = self.family.schedule_level(arguments)
        lengths = [len(text) for text in texts]
        valid = arguments.get(self.family.text_mask_argument)
        if valid is None and len(set(lengths)) > 1:
            device = texts[0].device
            positions = torch.arange(max(lengths), device=device)
            valid = positions < torch.tensor(lengths, device=device)[:, None]
        finds = level > LAYOUT_ABOVE and bool(pictures)
        call = RoutedCall(pictures, negatives, batch, grid, max(lengths), valid, finds)
        for picture in pictures.values():
            self._update_masks(picture, grid, level)
            call.finds |= self.given is None and picture.maps is None
        return call

    def _update_masks(
        self, picture: RoutedPicture, grid: tuple[int, int, int], level: float
    ) -> None:
        if self.given is not None:
            if picture.masks is None:  # once a call
                index = self.prompts.index(picture.routed)
                masks = self.given[index](*mask_grid(*grid[1:]))
                picture.set_masks(masks[:, None].expand(-1, grid[0], -1, -1))
        elif picture.maps is not None and level <= LAYOUT_ABOVE and picture.masked != picture.steps:
            picture.masked = picture.steps
            masks = competing_masks(picture.maps / picture.steps, TEMPERATURE)
            is_found = float(masks.amax((-3, -2, -1)).min()) > FOUND
            picture.set_masks(masks if is_found else None)

    # -- adapted layers ---------------------------------------------------------------------------

    def _mask_of(self, owners: tuple[int, ...], kind: TokenKind, output: Tensor) -> Tensor | None:
        """Return the mask of a mid-activation; None in calls that are not routed."""
        call = self._routed_call()
        if call is None:
            return None
        if output.ndim > 3:  # of a convolution
            return self._convolution_mask(call, owners, output)
        key = (kind, owners, output.shape[:2])
        if key not in call.masks:
            per_row = len(output) // call.batch
            try:
                masks = self._position_masks(call, kind, per_row, output)
            except PipelineError as error:
                self._stop(error)
                return None
            call.masks[key] = rank_mask(masks, owners).to(output)
        return call.masks[key]

    def _routed_entries(self, middle: Tensor) -> Tensor:
        """Return whether each entry of a mid-activation belongs to a routed row, (entries,)."""
        call = self._routed_call()
        if call is None:
            return torch.zeros(len(middle), dtype=torch.bool, device=middle.device)
        key = ("entries", len(middle))
        if key not in call.masks:
            is_routed = torch.tensor([row in call.changed for row in range(call.batch)])
            entries = is_routed.repeat_interleave(len(middle) // call.batch)
            call.masks[key] = entries.to(middle.device)
        return call.masks[key]

    def _routed_call(self) -> RoutedCall | None:
        call = self._running[-1] if self._running and self._in_this_call() else None
        return call if call is not None and call.changed and not self.stopped_by else None

    def _position_masks(
        self, call: RoutedCall, kind: TokenKind, per_row: int, output: Tensor
    ) -> Tensor:
        """(entries, concepts, positions or 1) for a layer's output of (entries, positions, ranks).

        Args:
            call: The running call.
            kind: The layer's positions.
            per_row: The number of entries for each row: one of each frame, or of each token.
            output: The output.
        """
        length, device = output.shape[1], output.device
        if kind == "text":
            return self._token_masks(call, length, device).repeat_interleave(per_row, 0)
        if kind == "text_rows":
            return self._token_masks(call, per_row, device).transpose(1, 2).flatten(0, 1)[..., None]
        if kind == "picture":
            grid = layer_grid(self.family, call, per_row * length)
            masks = self._picture_masks(call, *grid, device)
            if per_row > 1:  # frames
                return masks.transpose(1, 2).flatten(0, 1).flatten(-2)
            return _pad(masks.flatten(-3), length)
        picture, text = self.family.token_offsets(kind, call.texts, call.grid)
        is_last = picture > text
        layer_grid(self.family, call, length - picture if is_last else text)
        masks = torch.zeros(call.batch, self.concepts, length, device=device)
        of_picture = self._picture_masks(call, *call.grid, device).flatten(-3)
        masks[..., picture : picture + of_picture.shape[-1]] = of_picture
        of_text = self._token_masks(call, min(call.texts, length - text), device)
        masks[..., text : text + of_text.shape[-1]] = of_text
        return masks

    def _convolution_mask(
        self, call: RoutedCall, owners: tuple[int, ...], output: Tensor
    ) -> Tensor:
        """A mask for (entries, ranks, rows, columns), or (batch, ranks, frames, rows, columns)."""
        rows, columns = output.shape[-2:]
        frames = output.shape[2] if output.ndim == 5 else len(output) // call.batch
        masks = self._picture_masks(call, frames, rows, columns, output.device)
        if output.ndim == 4:
            masks = masks.transpose(1, 2).flatten(0, 1)
        return masks[:, list(owners)].to(output)

    def _picture_masks(
        self, call: RoutedCall, frames: int, rows: int, columns: int, device: torch.device
    ) -> Tensor:
        """(batch, concepts, frames, rows, columns): ones in rows that are not routed.

        Of a routed row, those of the concepts that its prompt names are ones until they are found.
        """
        masks = self._wordless_masks(call, frames, rows, columns, device=device)
        for row, picture in call.pictures.items():
            named = [each.index for each in picture.routed.named]
            masks[row, named] = 1.0
            if picture.masks is not None:
                masks[row, named] = resize_masks(picture.masks, rows, columns).to(masks)
        return masks

    def _token_masks(self, call: RoutedCall, length: int, device: torch.device) -> Tensor:
        """(batch, concepts, tokens)."""
        masks = self._wordless_masks(call, length, device=device)
        for row, picture in call.pictures.items():
            for each, positions in zip(picture.routed.named, picture.routed.tokens, strict=True):
                masks[row, each.index, list(positions)] = 1.0
        return masks

    def _wordless_masks(self, call: RoutedCall, *shape: int, device: torch.device) -> Tensor:
        """(batch, concepts, *shape): ones in rows that are not routed, and of wordless concepts."""
        masks = torch.ones(call.batch, self.concepts, *shape, device=device)
        for row in call.changed:
            masks[row] = 0.0
            masks[row, self.wordless] = 1.0
        return masks


def _pad(masks: Tensor, length: int) -> Tensor:
    """Pad the positions of (batch, concepts, positions): no concept acts on padding."""
    return functional.pad(masks, (0, length - masks.shape[-1]))
