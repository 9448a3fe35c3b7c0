"""Drawing with reference tokens: which rows of the denoiser's calls read which group.

A pipeline calls the denoiser with rows of prompts and of negative prompts, in an order of its own.
Rows are recognized by their encoded text, as ``regions=`` recognizes them; where the call gives
the prompt in another form, by their order: negative prompts first. Rows of negative prompts read
the tokens of a black image with an empty prompt, as in training. A modular pipeline with a
:class:`~customize.api.references_step.ReferencesStep` has its own blocks give each row its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from customize.errors import ConfigError, PipelineError
from customize.families import Family
from customize.pipeline.stage import CallArguments, CallContext
from customize.references.avoided_values import AvoidedText
from customize.references.group import ReferenceGroup
from customize.references.model import ReferenceModel
from customize.references.seams import seam_of
from customize.references.seams.attachment import RowTokens, Scale
from customize.stages.multidiffusion import REGION_ROWS
from customize.stages.prompt_rows import is_same_prompt

#: Arguments that replace the prompt, or change how it is encoded.
_ENCODED_OTHERWISE = ("prompt_embeds", "prompt_2", "prompt_3", "clip_skip")
_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")
#: Number of different texts and rows that are remembered in a call.
_MAX_REMEMBERED = 64


@dataclass(frozen=True, eq=False)
class PromptReferences:
    """The references of one prompt.

    Attributes:
        groups: Words of the prompt, or None for the whole prompt -> (group, scale).
        avoided: What is removed from the values of all groups, with words of (k, width); None:
            nothing.
    """

    groups: Mapping[str | None, tuple[ReferenceGroup, float]]
    avoided: AvoidedText | None = None


class _Entry(NamedTuple):
    """What a row of the denoiser's call reads: tokens (num_tokens, width) and their scale."""

    tokens: Tensor
    scale: float
    avoided: AvoidedText | None = None


@contextmanager
def read_references(
    context: CallContext,
    call: CallArguments,
    model: ReferenceModel,
    references: Sequence[PromptReferences],
    layer_scale: Scale,
    *,
    from_blocks: bool = False,
) -> Iterator[None]:
    """Make the denoiser read references while a pipeline is called.

    Args:
        context: The pipeline.
        call: The arguments of its call.
        model: The model that encoded the groups.
        references: For each prompt of the call.
        layer_scale: Scale in each layer, which the groups' scales multiply.
        from_blocks: Whether blocks of the pipeline give the denoiser the tokens.

    Raises:
        PipelineError: The denoiser was never called with the prompt.
    """
    components = dict(context.pipe.components)
    family = type(context.family)(components, context.family.pipeline_config)
    denoiser = components[family.denoiser_key]
    device = execution_device(context.pipe, denoiser)
    adapter = model.adapter_on(device, family.denoiser.dtype)
    selector = _RowSelector(
        family, call, context, references, model.unconditional_tokens(), from_blocks
    )
    with (
        seam_of(family).attached(denoiser, adapter, layer_scale) as attachment,
        attachment.condition(selector),
    ):
        yield
    if not selector.has_matched:
        raise PipelineError(
            "the denoiser was never called with the encoded prompt, so the references had no "
            "effect",
            where="reference_images",
            fix="leave out arguments that change how prompts are encoded, and steps that rewrite "
            "them",
        )


def images_per_prompt(context: CallContext, call: CallArguments) -> int:
    """Return the number of images of each prompt of a call."""
    counts = [call.get(name, context.parameters.get(name)) for name in _COUNTS]
    return next((count for count in counts if isinstance(count, int)), 1)


def execution_device(pipe: Any, denoiser: Any) -> torch.device:
    """Return the device on which a pipeline computes, with or without offloading."""
    device = getattr(pipe, "_execution_device", None)
    return torch.device(denoiser.device if device is None else device)


class _RowSelector:
    """Chooses the tokens of each row of a call of the denoiser.

    Attributes:
        has_matched: Whether a row of a prompt was found.
    """

    def __init__(
        self,
        family: Family,
        call: CallArguments,
        context: CallContext,
        references: Sequence[PromptReferences],
        unconditional: Tensor,
        from_blocks: bool,
    ) -> None:
        self.has_matched = False
        self._family, self._references = family, references
        self._unconditional, self._from_blocks = unconditional, from_blocks
        self._given: dict[int, tuple[Tensor, RowTokens]] = {}
        self._tokens: dict[tuple[Any, ...], RowTokens] = {}
        self._rows: dict[int, tuple[Any, list[int | None]]] = {}
        self._num_rows = len(references) * images_per_prompt(context, call)
        # A guider of modular pipelines calls the denoiser for negative prompts by themselves.
        guider = context.pipe.components.get("guider")
        self._is_separate = getattr(guider, "num_conditions", 1) > 1 or (
            family.guidance_needs_negative_prompt
            and float(call.get(family.guidance_argument) or 1.0) > 1.0
        )
        self._encoded = _encode_prompts(family, call)

    def __call__(self, arguments: Mapping[str, Any]) -> RowTokens:
        """Return the tokens of a call's rows."""
        rows = len(arguments[self._family.latents_argument])
        text = arguments["encoder_hidden_states"]
        regional = REGION_ROWS.get()
        given = (arguments.get("added_cond_kwargs") or {}).get("image_embeds")
        if regional is None and self._from_blocks and given:
            return self._take(given[0], text)
        if regional is not None:
            entries = [self._region_entry(row) for row in regional]
            self.has_matched = True
        else:
            entries = self._entries(self._prompts_of(text, rows))
        ids = ((id(entry.tokens), entry.scale, id(entry.avoided)) for entry in entries)
        key = (text.dtype, text.device, *ids)
        if key not in self._tokens:
            if len(self._tokens) >= _MAX_REMEMBERED:
                self._tokens.clear()
            self._tokens[key] = _row_tokens(entries, text)
        return self._tokens[key]

    def _take(self, embeds: Tensor, text: Tensor) -> RowTokens:
        """Return the tokens that blocks give: (rows, 1, num_tokens, width)."""
        self.has_matched = True
        if id(embeds) not in self._given:  # the embeddings are kept, so that no other has their id
            if len(self._given) >= _MAX_REMEMBERED:
                self._given.clear()
            repeats = len(embeds) // len(self._references)
            prompts = [prompt for prompt in self._references for _ in range(repeats)]
            entries = [
                _Entry(tokens, prompt.groups[None][1], self._avoided_in(tokens, prompt))
                for tokens, prompt in zip(embeds[:, 0], prompts, strict=True)
            ]
            self._given[id(embeds)] = (embeds, _row_tokens(entries, text))
        return self._given[id(embeds)][1]

    def _avoided_in(self, tokens: Tensor, prompt: PromptReferences) -> AvoidedText | None:
        """Return what is removed from tokens that blocks give: nothing from those of no image."""
        if prompt.avoided is None or torch.equal(tokens, self._unconditional.to(tokens)):
            return None
        return prompt.avoided

    def _region_entry(self, row: tuple[int, str | None] | None) -> _Entry:
        """Return the entry of a row that is drawn by regions; None: of a negative prompt."""
        if row is None:
            every = [scale for prompt in self._references for _, scale in prompt.groups.values()]
            return _Entry(self._unconditional, max(every))
        prompt, phrase = row
        groups = self._references[prompt].groups
        found = groups.get(phrase, groups.get(None))
        if found is None:  # no reference term
            return _Entry(self._unconditional, 0.0)
        return _Entry(found[0].tokens, found[1], self._references[prompt].avoided)

    def _entries(self, prompts: Sequence[int | None]) -> list[_Entry]:
        """Return the entry of each row, from the number of its prompt or None."""
        entries = []
        negatives, count = 0, sum(prompt is None for prompt in prompts)
        for prompt in prompts:
            if prompt is None:
                # Rows of negative prompts have the order of the prompts.
                references = self._references[negatives * len(self._references) // count]
                negatives += 1
            else:
                references = self._references[prompt]
            group = references.groups
            if prompt is None and None not in group:  # in a call of negative prompts alone
                entries.append(self._region_entry(None))
                continue
            if None not in group:
                raise ConfigError(
                    "references for words of the prompt need their regions",
                    where="reference_images",
                    fix="give regions= with the same words, or one list of images",
                )
            tokens, scale = group[None]
            if prompt is None:
                entries.append(_Entry(self._unconditional, scale))
            else:
                entries.append(_Entry(tokens.tokens, scale, references.avoided))
        return entries

    def _prompts_of(self, text: Tensor, rows: int) -> list[int | None]:
        """Return the number of the prompt of each row; None for negative prompts."""
        # The comparison synchronizes with a GPU, so it is made once for each tensor, which is kept
        # so that its id is not reused.
        if id(text) not in self._rows:
            if len(self._rows) >= _MAX_REMEMBERED:
                self._rows.clear()
            self._rows[id(text)] = (text, self._match(text, rows))
        prompts = self._rows[id(text)][1]
        self.has_matched |= any(prompt is not None for prompt in prompts)
        return prompts

    def _match(self, text: Tensor, rows: int) -> list[int | None]:
        number = len(self._references)
        if self._encoded is None:
            if self._is_separate or rows not in (self._num_rows, 2 * self._num_rows):
                raise PipelineError(
                    "negative prompts cannot be told from prompts that are given as embeddings",
                    where="reference_images",
                    fix="give the prompt as prompt= alone; or, in a modular Stable Diffusion XL, "
                    "put a ReferencesStep among the blocks",
                )
            negatives: list[int | None] = [None] * (rows - self._num_rows)
            per_prompt = self._num_rows // number
            return negatives + [row // per_prompt for row in range(self._num_rows)]
        per_row = max(1, len(text) // rows)
        candidates = [
            [n for n, each in enumerate(self._encoded) if is_same_prompt(text[row * per_row], each)]
            for row in range(rows)
        ]
        matching = [row for row in range(rows) if candidates[row]]
        if len(matching) == 2 * self._num_rows:  # the negative prompts are the prompts
            matching = matching[self._num_rows :]
        prompts: list[int | None] = [None] * rows
        for position, row in enumerate(matching):
            # Images of one prompt are adjacent; equal prompts are distinguished by position.
            expected = position * number // len(matching)
            prompts[row] = expected if expected in candidates[row] else candidates[row][0]
        return prompts


def _row_tokens(entries: Sequence[_Entry], text: Tensor) -> RowTokens:
    """Return the tokens and scales of rows, on the device and in the dtype of the text."""
    tokens = torch.stack([entry.tokens for entry in entries]).to(text)
    scales = [entry.scale for entry in entries]
    is_scaled = any(scale != 1.0 for scale in scales)
    scale = torch.tensor(scales).to(text) if is_scaled else None
    return RowTokens(tokens, scale, _stack_avoided([entry.avoided for entry in entries], text))


def _stack_avoided(avoided: Sequence[AvoidedText | None], text: Tensor) -> AvoidedText | None:
    """Return what each row avoids, padded with zeros; None if no row avoids anything."""
    present = [each for each in avoided if each is not None]
    if not present:
        return None
    nothing = present[0].words[:0]
    words = [nothing if each is None else each.words for each in avoided]
    return AvoidedText(pad_sequence(words, batch_first=True).to(text), present[0].strength)


def _encode_prompts(family: Family, call: CallArguments) -> list[Tensor] | None:
    """Return the encoded text of each prompt; None if the call encodes it in another way."""
    prompt = call.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if any(call.get(name) is not None for name in _ENCODED_OTHERWISE):
        return None
    if not isinstance(prompts, list | tuple) or not all(isinstance(p, str) for p in prompts):
        return None
    encoders = family.all_text_encoders.values()
    if any(weight.is_meta for encoder in encoders for weight in encoder.parameters()):
        return None  # sequential offload loads weights only where the pipeline calls a layer
    with torch.no_grad():
        kwargs = family.denoiser_kwargs(family.encode_prompts(list(prompts)))
    return list(kwargs["encoder_hidden_states"])
