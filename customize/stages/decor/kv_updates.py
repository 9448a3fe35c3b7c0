"""What attached concepts add to a prompt, without what is not wanted.

A concept that was learned from a few pictures of one place says the place as well wherever it is
called, and mostly not by its tokens: its updates of the cross-attention's keys and values say it
when they read them. So the formula of DECOR (arXiv 2412.09169) is applied to what these updates
add, ours in place of the paper's embeddings: ``Y' = Y - strength Y V V^T``, where ``Y`` is what a
layer's update adds to the values of a prompt, and ``V`` spans those that the layer itself gives to
the words that are not wanted; in each attention head by itself, as a head reads its own part of
them alone, and only as far as a row's share in that span is more than chance brings. Keys say where
a concept is looked for rather than what it says, and styles are lost with theirs, so less is taken
out of them. What the base reads in the prompt stays as it is, and so do words that the prompt asks
for. Where what is not wanted is named in negative prompts as well, concepts add nothing to these:
guidance, which draws away from what they say, would draw away from the concept too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from customize.core.projection import overlap_confidence, principal_directions, project_out
from customize.families import Family
from customize.pipeline.call_wrapper import capture_call_scope
from customize.pipeline.model_guards import ADAPTER_NAME
from customize.pipeline.state import AttachedState
from customize.stages.decor.text_encoder import phrase_too_long
from customize.stages.multidiffusion import MATCH_TOLERANCE

#: Whose differences are left in what concepts add, so that a concept keeps its own colours where
#: what is not wanted has them too.
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
#: All shares of noise.
ALL = (0.0, 1.0)


@dataclass(frozen=True, eq=False)
class AdaptedKVLayer:
    """A layer that gives keys or values of prompts and carries our adapter.

    Attributes:
        number: of its attention.
        heads: how many that has.
        which: "to_k" or "to_v".
    """

    number: int
    heads: int
    which: str
    layer: Any


def adapted_kv_layers(family: Family, state: AttachedState) -> list[AdaptedKVLayer]:
    """All that there are."""
    names = family.cross_attention_layers() if family.reads_prompts_as_encoded else []
    own = [a.layers.get(family.denoiser_key, {}) for a in state.adapters if a.is_there()]
    return [
        AdaptedKVLayer(
            number, family.denoiser.get_submodule(name).heads, which, layers[f"{name}.{which}"]
        )
        for layers in own
        for number, name in enumerate(names)
        for which in ("to_k", "to_v")
        if f"{name}.{which}" in layers
    ]


class UpdateCleaner:
    """What is not wanted, as each layer reads it.

    It is made before anything cleans what the text encoders say.

    Args:
        phrases: what is not wanted.
        kept: the texts whose rows are left alone, such as the empty one and negative prompts.
        bare: those of them to which concepts add nothing.
        rank: how many directions at most.
        centred: whether the mean of what the empty text says, but for its beginning, is taken from
            what is not wanted first.
        noise: the least and the most share of noise at which it is done.
        by_head: whether in each attention head by itself.
        keys: for keys, the share of the strength that values have.
        surely: whether only as far as it is more than chance.
        colours: whether the colours of what is not wanted are cleaned as well.

    Raises:
        ConfigError: a phrase has more tokens than the text encoder reads.
    """

    def __init__(
        self,
        family: Family,
        state: AttachedState,
        phrases: Sequence[str],
        kept: Sequence[str],
        bare: Sequence[str],
        *,
        rank: int | None,
        centred: bool,
        noise: tuple[float, float],
        by_head: bool,
        keys: float,
        surely: bool,
        colours: bool,
    ) -> None:
        self.family, self.rank, self.noise = family, rank, noise
        self.by_head, self.surely = by_head, surely
        self.shares = {"to_k": keys, "to_v": 1.0}
        self.layers = [o for o in adapted_kv_layers(family, state) if bare or self.shares[o.which]]
        # A word says another thing behind others than alone; it stands for the mean of both.
        things = dict.fromkeys(each.concept.info.class_word for each in state.attached.values())
        before = ["", *(f"a photo of a {thing} " for thing in things if thing)]
        worded = {phrase: [start + phrase for start in before] for phrase in phrases}
        texts = [text for own in worded.values() for text in own]
        spared = () if colours else COLOURS
        said = self._encoded(list(dict.fromkeys([*texts, "", *kept, *spared])))
        self.kept = [said[text] for text in dict.fromkeys(kept)]
        self.bare = [said[text] for text in dict.fromkeys(bare)]
        tokenizer = family.token_dictionaries()[0].tokenizer

        def count(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False).input_ids)

        room = tokenizer.model_max_length - 2  # but for the beginning and the end
        # Without the beginning; of one layer, where each reads rows of its own.
        empty = said[""][1 : tokenizer.model_max_length]
        self.mean = empty.mean(0, keepdim=True) if centred else None
        self.rows = {}
        for phrase, own in worded.items():
            lengths = [count(text) for text in own]
            if lengths[0] > room:
                raise phrase_too_long(phrase, room)
            rows = [
                said[text][1 + length - lengths[0] : 1 + length]
                for text, length in zip(own, lengths, strict=True)
                if length <= room
            ]
            self.rows[phrase] = torch.stack(rows).mean(0)
        self.spared = [said[text][1 : 1 + count(text)].mean(0) for text in spared]

    @contextmanager
    def applied(self, asked: dict[str, tuple[str, ...]], strength: float) -> Iterator[None]:
        """Within it, what the layers' updates add lacks what is not wanted.

        Args:
            asked: prompt -> the phrases that are not wanted in it.
        """
        groups: dict[tuple[str, ...], list[Tensor]] = {phrases: [] for phrases in asked.values()}
        if len(groups) > 1:  # else there is nothing to tell apart
            said = self._encoded(list(asked))
            for prompt, phrases in asked.items():
                groups[phrases].append(said[prompt])
        telling = RowMatcher(self.kept, self.bare, groups, strength)
        with ExitStack() as stack:
            if self.noise != ALL:
                stack.callback(self._follow_noise(telling).remove)
            for each in self.layers:
                stack.enter_context(CleanedLayer(self, each, telling).applied())
            yield

    def _follow_noise(self, telling: RowMatcher) -> Any:
        """A hook around the denoiser, by which the layers know how much noise there is."""
        denoiser: Any = self.family.denoiser
        names = list(inspect.signature(type(denoiser).forward).parameters)[1:]

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not telling.is_ours():
                return
            share = self.family.noise_level(dict(zip(names, args, strict=False)) | kwargs)
            telling.on = self.noise[0] <= share <= self.noise[1]

        return denoiser.register_forward_pre_hook(before, with_kwargs=True)

    def _encoded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            found = self.family.encode_prompts(texts)["prompt_embeds"]
        return dict(zip(texts, found, strict=True))


class RowMatcher:
    """Which of what the layers read is a prompt, and what is not wanted in it.

    Args:
        kept: the texts that are left alone, as they are encoded.
        bare: those of them to which concepts add nothing.
        groups: what is not wanted -> the prompts in which it is not; none where all are alike.
        strength: with which it is taken out.

    Attributes:
        on: whether anything is taken out at present.
    """

    def __init__(
        self,
        kept: Sequence[Tensor],
        bare: Sequence[Tensor],
        groups: dict[tuple[str, ...], list[Tensor]],
        strength: float,
    ) -> None:
        self.kept, self.bare, self.groups, self.strength = kept, bare, groups, strength
        self.on = True
        self.is_ours = capture_call_scope()
        self._seen: tuple[Tensor, int] | None = None
        self._found: tuple[list[Tensor], Tensor] = ([], torch.empty(0))

    def told(self, words: Tensor, number: int) -> tuple[list[Tensor], Tensor]:
        """Of what one attention reads, (batch, length, width): strengths, (batch, 1) for each
        group, and (batch, 1, 1), the share of what concepts add that stays, 0 or 1."""
        if _is_unchanged(
            words, self._seen
        ):  # all layers read the same tensor, but for layerwise tokens
            return self._found
        left = self._among(words, number, self.kept)
        chosen = []
        for group, prompts in enumerate(self.groups.values()):
            if group == 0:
                # The first has what is of none: prompts that a stage made of one.
                rest = [each for other in list(self.groups.values())[1:] for each in other]
                chosen.append(~left & ~self._among(words, number, rest))
            else:
                chosen.append(~left & self._among(words, number, prompts))
        strengths = [self.strength * own.float()[:, None] for own in chosen]
        bare = self._among(words, number, self.bare)
        self._found = strengths, (~bare).to(words.dtype)[:, None, None]
        whole = all(len(each) == words.shape[1] for each in self.kept)
        self._seen = (words, _version(words)) if whole else None
        return self._found

    def _among(self, words: Tensor, number: int, known: Sequence[Tensor]) -> Tensor:
        """(batch,), which rows are one of the known texts; nothing waits for the device."""
        found = torch.zeros(len(words), dtype=torch.bool, device=words.device)
        for each in known:
            own = each.to(words.device)
            length = words.shape[1]
            if len(own) > length:  # the part that this layer reads
                own = own[number * length : (number + 1) * length]
            if own.shape == words.shape[1:]:
                off = (words.float() - own.float()).square().sum((1, 2))
                found |= off <= MATCH_TOLERANCE**2 * own.float().square().sum()
        return found


class CleanedLayer:
    """One layer's part in it: what it answers to the prompts, once for all steps."""

    def __init__(
        self, withheld: UpdateCleaner, adding: AdaptedKVLayer, telling: RowMatcher
    ) -> None:
        self.withheld, self.telling = withheld, telling
        self.number, self.layer = adding.number, adding.layer
        self.heads = adding.heads if withheld.by_head else 1
        self.share = withheld.shares[adding.which]
        self.spans: dict[tuple[str, ...], Tensor] = {}
        self.strengths: list[Tensor] = []
        self.stays: Tensor = torch.empty(0)
        self._seen: tuple[Tensor, int] | None = None
        self._then: Any = None
        self._answer: Tensor | None = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, what our adapter adds in this layer lacks what is not wanted."""
        layer = self.layer
        before, compute = vars(layer).get("forward"), layer.forward
        after = partial(self._after, layer.get_base_layer())
        handle = layer.lora_B[ADAPTER_NAME].register_forward_hook(after)

        def forward(words: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not self.telling.is_ours():
                stock: Tensor = compute(words, *args, **kwargs)
                return stock
            now = _layer_state(layer, self.telling.on)
            if self._answer is None or not _is_unchanged(words, self._seen) or now != self._then:
                self._seen, self._then, self._answer = (words, _version(words)), now, None
                self.strengths, self.stays = self.telling.told(words, self.number)
                answer: Tensor = compute(words, *args, **kwargs)
                if answer.requires_grad:
                    return answer
                self._answer = answer
            return self._answer

        layer.forward = forward
        try:
            yield
        finally:
            handle.remove()
            if before is None:
                del layer.forward
            else:
                layer.forward = before

    def _after(self, base: Any, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not self.telling.on or not self.telling.is_ours():
            return output
        for phrases, strength in zip(self.telling.groups, self.strengths, strict=True):
            if phrases and self.share:
                if phrases not in self.spans:
                    with torch.no_grad():
                        self.spans[phrases] = self._span(base, phrases, output)
                directions, rows = self.spans[phrases], self._apart(output)
                factor = self.share * strength[:, None]
                if self.withheld.surely:
                    factor = factor * overlap_confidence(rows, directions)
                output = project_out(rows, directions, factor).transpose(-2, -3).flatten(-2)
        return output * self.stays

    def _span(self, base: Any, phrases: tuple[str, ...], output: Tensor) -> Tensor:
        rows = torch.cat([self.withheld.rows[each] for each in phrases])
        mean, spared = self.withheld.mean, self.withheld.spared
        said = self._apart(base(rows.to(output)))
        left = torch.zeros_like(said) if mean is None else self._apart(base(mean.to(output)))
        if spared:
            colours = self._apart(base(torch.stack(spared).to(output)))
            shades = principal_directions(colours, mean=colours.mean(-2, keepdim=True))
            left = said - project_out(said - left, shades, 1.0)
        return principal_directions(said, self.withheld.rank, left)

    def _apart(self, rows: Tensor) -> Tensor:
        """(..., n, width) as (..., heads, n, width of each head)."""
        return rows.unflatten(-1, (self.heads, -1)).transpose(-2, -3)


def _layer_state(layer: Any, on: bool) -> tuple[Any, ...]:
    """What a layer's answer depends on besides what it reads, and may change from step to step."""
    weight = layer.get_base_layer().weight
    return (
        on,
        layer.disable_adapters,
        tuple(layer.active_adapters),
        tuple(layer.scaling.values()),
        _version(weight),
    )


def _is_unchanged(words: Tensor, seen: tuple[Tensor, int] | None) -> bool:
    """Whether a tensor is the one that was seen, and unchanged."""
    return seen is not None and seen[0] is words and seen[1] == _version(words)


def _version(words: Tensor) -> int:
    """How often a tensor was changed in place; those of inference mode do not tell."""
    return 0 if words.is_inference() else words._version
