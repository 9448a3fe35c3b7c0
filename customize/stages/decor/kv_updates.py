"""DECOR on the updates of concepts: unwanted directions projected out of keys and values.

A concept that was trained on a few images of one place shows that place in every image, mostly not
through its tokens but through its updates of cross-attention. So the formula of DECOR (arXiv
2412.09169) is applied to these updates instead of the prompt's embeddings (ours)::

    Y' = Y - strength * confidence * Y V V^T

where Y is the output of a layer's update for a prompt's keys or values, and V an orthonormal basis
of the base layer's outputs for the unwanted words. The base layer's output for the prompt is
unchanged. Measured against this default (leak 11 %, identity 76 %) by scripts/bench/decor.py,
task "options" in scripts/bench/results/decor.json:

- Each attention head has its own V, because a head reads only its part of a value. One V for all
  heads leaks 21 %.
- Directions in which values of colours differ are left out of V, so that a concept keeps its
  colours where an unwanted object has them too: identity 76 %, and 77 % without.
- ``confidence`` is 0 for rows that overlap V no more than chance
  (:func:`customize.core.projection.overlap_confidence`). Without it 7 % leak, at an identity of
  75 %.
- Keys decide where a concept attends rather than what it adds, so a fraction of the strength is
  applied to them (:attr:`customize.Decor.keys`, 0.25): 0 leaks 16 %; 1 leaks 3 % and lowers
  identity to 70 %.
- All noise levels: the first half alone leaks 20 %, all but the last quarter 17 %.

Where unwanted phrases were added to a negative prompt, concepts add nothing to it: guidance would
push the image away from the concept as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from customize.core.projection import overlap_confidence, principal_directions, project_out
from customize.families import Family
from customize.pipeline.call_scope import capture_call_scope
from customize.pipeline.model_guards import ADAPTER_NAME
from customize.pipeline.state import AttachedState
from customize.stages.decor.phrase_rows import mean_phrase_rows
from customize.stages.prompt_rows import MATCH_TOLERANCE

#: Concepts keep the directions in which the values of these words differ.
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")


@dataclass(frozen=True, eq=False)
class AdaptedKVLayer:
    """A key or value projection of cross-attention with an adapter of concepts.

    Attributes:
        attention: The index of its attention layer in the denoiser.
        heads: The number of attention heads.
        projection: "to_k" or "to_v".
        module: The peft layer.
    """

    attention: int
    heads: int
    projection: str
    module: Any


def adapted_kv_layers(family: Family, state: AttachedState) -> list[AdaptedKVLayer]:
    """List the key and value projections that attached concepts adapt."""
    names = family.cross_attention_layers() if family.reads_prompts_as_encoded else []
    adapted = [a.layers.get(family.denoiser_key, {}) for a in state.adapters if a.is_attached()]
    return [
        AdaptedKVLayer(index, family.denoiser.get_submodule(name).heads, projection, modules[path])
        for modules in adapted
        for index, name in enumerate(names)
        for projection in ("to_k", "to_v")
        if (path := f"{name}.{projection}") in modules
    ]


class UpdateCleaner:
    """Projects unwanted phrases out of the updates of keys and values by attached concepts.

    Create it before the text encoders are cleaned: it encodes the phrases.

    Args:
        family: The models of the pipeline.
        state: The concepts attached to them.
        phrases: The unwanted phrases.
        protected: Texts whose rows are left unchanged: the empty text and negative prompts.
        unadapted: Those of them to which concepts add nothing.
        key_strength: The strength for keys as a fraction of that for values.

    Raises:
        ConfigError: A phrase has more tokens than the text encoder reads.
    """

    def __init__(
        self,
        family: Family,
        state: AttachedState,
        phrases: Sequence[str],
        protected: Sequence[str],
        unadapted: Sequence[str],
        key_strength: float,
    ) -> None:
        self.family = family
        self.relative_strength = {"to_k": key_strength, "to_v": 1.0}
        self.layers = [
            layer
            for layer in adapted_kv_layers(family, state)
            if unadapted or self.relative_strength[layer.projection]
        ]
        # A phrase is encoded alone and behind each class word.
        classes = dict.fromkeys(a.concept.info.class_word for a in state.attached.values())
        prefixes = ["", *(f"a photo of a {name} " for name in classes if name)]
        texts = [prefix + phrase for phrase in phrases for prefix in prefixes]
        encoded = self._encode(list(dict.fromkeys([*texts, "", *protected, *COLOURS])))
        self.protected = [encoded[text] for text in dict.fromkeys(protected)]
        self.unadapted = [encoded[text] for text in dict.fromkeys(unadapted)]

        tokenizer = family.token_dictionaries()[0].tokenizer
        self.phrase_rows = {
            phrase: mean_phrase_rows(phrase, prefixes, encoded, tokenizer) for phrase in phrases
        }
        colours = [mean_phrase_rows(colour, [""], encoded, tokenizer) for colour in COLOURS]
        self.colour_rows = torch.stack([rows.mean(0) for rows in colours])

    @contextmanager
    def attach(self, unwanted: Mapping[str, tuple[str, ...]], strength: float) -> Iterator[None]:
        """Clean the updates of all layers inside the context.

        Args:
            unwanted: prompt -> the phrases that are removed from it.
            strength: From 0 to 2.
        """
        prompts: dict[tuple[str, ...], list[Tensor]] = {p: [] for p in unwanted.values()}
        if len(prompts) > 1:  # otherwise all prompts are treated alike
            encoded = self._encode(list(unwanted))
            for prompt, phrases in unwanted.items():
                prompts[phrases].append(encoded[prompt])
        matcher = RowMatcher(self.protected, self.unadapted, prompts, strength)
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(CleanedLayer(self, layer, matcher).attach())
            yield

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            embeddings = self.family.encode_prompts(texts)["prompt_embeds"]
        return dict(zip(texts, embeddings, strict=True))


class RowMatcher:
    """Determines the rows of an attention's text input to clean, and their unwanted phrases.

    Args:
        protected: Encoded texts (length, width) whose rows are left unchanged.
        unadapted: Those of them to which concepts add nothing.
        prompts: unwanted phrases -> the encoded prompts they are removed from; empty lists where
            all prompts have the same phrases.
        strength: From 0 to 2.
    """

    def __init__(
        self,
        protected: Sequence[Tensor],
        unadapted: Sequence[Tensor],
        prompts: Mapping[tuple[str, ...], Sequence[Tensor]],
        strength: float,
    ) -> None:
        self.protected, self.unadapted = protected, unadapted
        self.prompts, self.strength = prompts, strength
        self._last_input: tuple[Tensor, int] | None = None
        self._last_result: tuple[list[Tensor], Tensor] = ([], torch.empty(0))

    def row_strengths(self, words: Tensor, attention: int) -> tuple[list[Tensor], Tensor]:
        """Return the strength of cleaning for every row, and the factor of concepts' updates.

        Args:
            words: The text input of one attention layer, (batch, length, width).
            attention: The index of that layer.

        Returns:
            For each group of prompts the strengths, (batch, 1), float32; and (batch, 1, 1), 0 for
            rows to which concepts add nothing and 1 for others.
        """
        if _is_unchanged(words, self._last_input):
            return self._last_result
        is_protected = self._matches(words, attention, self.protected)
        _, *others = self.prompts.values()
        # Prompts that no group contains, such as those of regions, belong to the first one.
        in_others = [prompt for group in others for prompt in group]
        selected = [~is_protected & ~self._matches(words, attention, in_others)]
        selected += [~is_protected & self._matches(words, attention, group) for group in others]
        strengths = [self.strength * rows.float()[:, None] for rows in selected]
        is_unadapted = self._matches(words, attention, self.unadapted)
        self._last_result = strengths, (~is_unadapted).to(words.dtype)[:, None, None]
        # With an embedding for each layer, every attention has its own input rows.
        reads_all_rows = all(len(text) == words.shape[1] for text in self.protected)
        self._last_input = (words, _version(words)) if reads_all_rows else None
        return self._last_result

    def _matches(self, words: Tensor, attention: int, texts: Sequence[Tensor]) -> Tensor:
        """Return which rows equal one of the texts: (batch,), bool; without a device sync."""
        matches = torch.zeros(len(words), dtype=torch.bool, device=words.device)
        for text in texts:
            text = text.to(words.device)
            length = words.shape[1]
            if len(text) > length:  # an embedding for each layer: the part of this one
                text = text[attention * length : (attention + 1) * length]
            if text.shape == words.shape[1:]:
                difference = (words.float() - text.float()).square().sum((1, 2))
                matches |= difference <= MATCH_TOLERANCE**2 * text.float().square().sum()
        return matches


class CleanedLayer:
    """One key or value projection whose update is cleaned; its output is computed once per call."""

    def __init__(self, cleaner: UpdateCleaner, layer: AdaptedKVLayer, matcher: RowMatcher) -> None:
        self.cleaner, self.layer, self.matcher = cleaner, layer, matcher
        self._in_this_call = capture_call_scope()
        self._directions: dict[tuple[str, ...], Tensor] = {}
        self._strengths: list[Tensor] = []
        self._update_factor: Tensor = torch.empty(0)
        # All steps of a call read the same prompt, so the output is cached until an input changes.
        self._last_input: tuple[Tensor, int] | None = None
        self._last_state: tuple[Any, ...] = ()
        self._last_output: Tensor | None = None

    @contextmanager
    def attach(self) -> Iterator[None]:
        """Clean the layer's update inside the context."""
        module = self.layer.module
        replaced_forward, compute = vars(module).get("forward"), module.forward
        hook = module.lora_B[ADAPTER_NAME].register_forward_hook(self._clean_update)

        def forward(words: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not self._in_this_call():
                stock: Tensor = compute(words, *args, **kwargs)
                return stock
            state = (
                module.disable_adapters,
                tuple(module.active_adapters),
                tuple(module.scaling.values()),
                _version(module.get_base_layer().weight),
            )
            is_same = _is_unchanged(words, self._last_input) and state == self._last_state
            if self._last_output is None or not is_same:
                self._last_input, self._last_state = (words, _version(words)), state
                self._last_output = None
                self._strengths, self._update_factor = self.matcher.row_strengths(
                    words, self.layer.attention
                )
                output: Tensor = compute(words, *args, **kwargs)
                if output.requires_grad:
                    return output
                self._last_output = output
            return self._last_output

        module.forward = forward
        try:
            yield
        finally:
            hook.remove()
            if replaced_forward is None:
                del module.forward
            else:
                module.forward = replaced_forward

    def _clean_update(self, module: nn.Module, args: Any, update: Tensor) -> Tensor:
        """Clean the adapter's output: (batch, length, width), before its scaling."""
        if not self._in_this_call():
            return update
        relative_strength = self.cleaner.relative_strength[self.layer.projection]
        for phrases, strength in zip(self.matcher.prompts, self._strengths, strict=True):
            if phrases and relative_strength:
                if phrases not in self._directions:
                    with torch.no_grad():
                        self._directions[phrases] = self._unwanted_directions(phrases, update)
                directions, rows = self._directions[phrases], self._split_heads(update)
                factor = relative_strength * strength[:, None]
                factor = factor * overlap_confidence(rows, directions)
                update = project_out(rows, directions, factor).transpose(-2, -3).flatten(-2)
        return update * self._update_factor

    def _unwanted_directions(self, phrases: tuple[str, ...], like: Tensor) -> Tensor:
        """Return orthonormal rows (heads, k, width of a head) in the dtype and on the device."""
        base = self.layer.module.get_base_layer()
        rows = torch.cat([self.cleaner.phrase_rows[phrase] for phrase in phrases])
        values = self._split_heads(base(rows.to(like)))
        colours = self._split_heads(base(self.cleaner.colour_rows.to(like)))
        shades = principal_directions(colours, mean=colours.mean(-2, keepdim=True))
        return principal_directions(values, mean=values - project_out(values, shades, 1.0))

    def _split_heads(self, rows: Tensor) -> Tensor:
        """Reshape (..., n, width) to (..., heads, n, width of a head)."""
        return rows.unflatten(-1, (self.layer.heads, -1)).transpose(-2, -3)


def _is_unchanged(words: Tensor, last: tuple[Tensor, int] | None) -> bool:
    """Whether a tensor is the one seen last, and was not modified in place since."""
    return last is not None and last[0] is words and last[1] == _version(words)


def _version(tensor: Tensor) -> int:
    """Return the number of in-place changes; inference tensors do not count them."""
    return 0 if tensor.is_inference() else tensor._version
