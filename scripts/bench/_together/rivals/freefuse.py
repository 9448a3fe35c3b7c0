"""FreeFuse (arXiv:2510.23515, version 2 and its code): two passes with masks between them.

The first pass, without the LoRAs, runs the first steps. In one block, the positions that attend
most to a thing's words, in contrast to the other things' words, are its anchors; its map is the
similarity of the self-attention's outputs to those of its anchors. A balanced argmax makes
disjoint masks. The second pass starts from the same noise: each LoRA acts inside its mask, on all
words but those of other things, and a bias on the cross-attention's scores favours a thing's words
inside its mask.

Other than in the code, words of other things are masked in the rows of the prompts, where the code
masks the negative prompt's; and maps are normalised over positions, as its ComfyUI nodes do. A
plain thing has a mask, and no LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from _together.cast import Size
from _together.drawing import draw as draw_plain
from _together.gates import (
    BlockProbe,
    LoraGates,
    latent_grid,
    layer_masks,
    positions_of,
    stop_after,
)
from customize.core.routing import grid_of_tokens


@dataclass(frozen=True)
class Settings:
    """The settings of the method.

    Attributes:
        block: The transformer block that masks are found in.
        step: The step of 25 at which they are found; the code's is 10 of 30.
        anchors: Share of the positions that are a thing's anchors.
        temperature: Of the similarities, relative to their standard deviation.
        bias: On the scores of attention, for and against a thing's words.
        has_loras: Whether the first pass draws with the LoRAs.
    """

    block: str = "up_blocks.1.attentions.0.transformer_blocks.0"
    step: int = 8
    anchors: float = 0.1
    temperature: float = 1.0
    bias: float = 2.0
    has_loras: bool = False


# The best of `together.py --tune`, on other concepts, seeds and places: block and bias; the rest
# are the method's own values for Stable Diffusion XL, which were no worse than others.
CHOSEN = Settings()

# The rounds of the balanced argmax, its learning rate and the decay of it; the weights of the
# distance from a mask's centre and of neighbours, on a grid of 64 rows; the share of the last
# round's scores that is kept.
_ROUNDS, _RATE, _DECAY = 15, 0.01, 0.95
_GRAVITY, _VOTES, _STRETCH, _MOMENTUM, _ROWS = 4e-5, 4e-5, 1.1, 0.2, 64


def draw(
    pipe: Any,
    things: Sequence[str],
    prompts: Sequence[str],
    numbers: Sequence[int],
    size: Size,
    settings: Settings = CHOSEN,
) -> Tensor:
    gates = LoraGates(pipe)
    words = [positions_of(gates.family, things, prompt) for prompt in prompts]
    with gates.attach():
        if not settings.has_loras:
            gates.open_only()
        first_pass = BlockProbe(pipe.unet, settings.block)
        with first_pass.attach() as probe, stop_after(pipe.unet, settings.step):
            draw_plain(pipe, things, prompts, numbers, size)
        masks = torch.stack(
            [
                find_masks(
                    probe, len(prompts) + k, words[k], latent_grid(gates.family, size), settings
                )
                for k in range(len(prompts))
            ]
        )
        with confined(pipe, gates, things, words, masks, size, settings.bias):
            return draw_plain(pipe, things, prompts, numbers, size)


# --- the first pass ---------------------------------------------------------------------------


def find_masks(
    probe: BlockProbe, row: int, words: Sequence[Sequence[int]], latents: Size, settings: Settings
) -> Tensor:
    """The masks (things, rows, columns) of one row of the batch, 0 or 1."""
    attention = probe.attention
    query, key = (
        x[row].float().unflatten(-1, (attention.heads, -1)).transpose(0, 1)
        for x in (probe.query, probe.key)
    )
    # Over the positions of the image: which of them attend most to a word.
    over_image = (attention.scale * query @ key.transpose(-1, -2)).softmax(-2)
    attended = torch.stack([over_image[..., list(at)].mean((0, 2)) for at in words])
    maps = similarity_maps(attended, probe.context[row].float(), settings)
    grid = grid_of_tokens(maps.shape[-1], *latents)
    assert grid is not None
    return balanced_argmax(maps.unflatten(-1, grid))


def similarity_maps(attended: Tensor, context: Tensor, settings: Settings) -> Tensor:
    """The maps (things, positions) of how alike positions are to the anchors of each thing.

    Args:
        attended: (things, positions), what positions attend to each thing's words.
        context: (positions, width), the outputs of self-attention.
        settings: Share of anchors, and the temperature.
    """
    things, positions = attended.shape
    contrast = (things + 1) * attended - attended.sum(0)  # C S_c - sum of the others' S_j
    count = max(1, int(settings.anchors * positions))
    anchors = contrast.topk(count, -1).indices
    similarity = torch.stack([(context[at] @ context.T).mean(0) for at in anchors])
    return (similarity / (settings.temperature * similarity.std())).softmax(-1)


def balanced_argmax(maps: Tensor) -> Tensor:
    """Disjoint masks (things, rows, columns), 0 or 1, of about equal areas.

    Args:
        maps: (things, rows, columns), not negative.
    """
    things, rows, columns = maps.shape
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    scores = (maps - low) / (high - low).clamp(min=1e-12)
    y, x = torch.meshgrid(
        torch.arange(rows) * (_ROWS / rows), torch.arange(columns) * (_ROWS / rows), indexing="ij"
    )
    bias = torch.zeros(things, 1, 1)
    current = scores
    for step in range(_ROUNDS):
        soft = current.softmax(0)
        mass = soft.sum((1, 2), keepdim=True)
        above = (soft * y).sum((1, 2), keepdim=True) / mass
        left = (soft * x).sum((1, 2), keepdim=True) / mass
        chosen = F.one_hot(current.argmax(0), things).permute(2, 0, 1).float()
        votes = 9 * F.avg_pool2d(chosen[None], 3, 1, 1)[0] - chosen
        excess = chosen.sum((1, 2), keepdim=True) - rows * columns / things
        bias = bias - excess.sign() * _RATE * _DECAY**step
        distance = (y - above) ** 2 + (_STRETCH * (x - left)) ** 2
        latest = scores + bias - _GRAVITY * distance + _VOTES * votes
        current = _MOMENTUM * current + (1 - _MOMENTUM) * latest
    return F.one_hot(current.argmax(0), things).permute(2, 0, 1).float()


# --- the second pass --------------------------------------------------------------------------


@contextmanager
def confined(
    pipe: Any,
    gates: LoraGates,
    things: Sequence[str],
    words: Sequence[Sequence[Sequence[int]]],
    masks: Tensor,
    size: Size,
    bias: float,
) -> Iterator[None]:
    """Confine LoRAs and words to masks.

    Args:
        pipe: The pipeline.
        gates: Of its LoRAs.
        things: The words of each thing.
        words: For each prompt and thing its tokens.
        masks: (prompts, things, rows, columns).
        size: Of the images.
        bias: On the scores of attention.
    """
    latents = latent_grid(gates.family, size)
    count = len(words)

    def of_image(positions: int) -> Tensor:
        """(prompts, positions, LoRAs); one that no thing names acts everywhere."""
        resized = layer_masks(masks, positions, latents)
        result = torch.ones(count, positions, len(gates.owners))
        for i, thing in enumerate(things):
            if thing in gates.owners:
                result[..., gates.owners[thing]] = resized[:, i]
        return result

    def of_text(tokens: int) -> Tensor:
        """(prompts, tokens, LoRAs)."""
        result = torch.ones(count, tokens, len(gates.owners))
        for k, each in enumerate(words):
            for thing, at in zip(things, each, strict=True):
                for trigger, index in gates.owners.items():
                    if trigger != thing:
                        result[k, list(at), index] = 0.0
        return result

    def choose(name: str, output: Tensor) -> Tensor:
        positions = output.shape[1]
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            asked = of_text(positions)
            return torch.cat([torch.ones_like(asked), asked])
        return of_image(positions).repeat(2, 1, 1)

    def add_bias(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, text = args[0] if args else kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        resized = layer_masks(masks, hidden.shape[1], latents)
        scores = torch.zeros(2 * count, hidden.shape[1], text.shape[1])
        for k, each in enumerate(words):
            for i, at in enumerate(each):
                inside, others = resized[k, i], resized[k].sum(0) - resized[k, i]
                scores[count + k][:, list(at)] += bias * (inside - others)[:, None]
        return args, kwargs | {"attention_mask": scores.to(hidden)}

    gates.masks = choose
    handles = []
    if bias:
        for name in gates.family.cross_attention_layers():
            layer = pipe.unet.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(add_bias, with_kwargs=True))
    try:
        yield
    finally:
        gates.masks = None
        for handle in handles:
            handle.remove()
