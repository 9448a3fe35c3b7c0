"""LoRAShop (arXiv:2505.23758): masks from one prior prediction, then blended residuals of blocks.

The base model lays the image out without the LoRAs. At one noise level, what positions attend to
each thing's words in one block is smoothed, and what is above a threshold is the thing's mask;
masks are made disjoint. From the next noise levels on, each block computes once without LoRAs and
once with each LoRA, and the residuals are blended by the masks.

The paper's block is the last one of FLUX.1 in which words and image have weights of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from _together.cast import Size
from _together.drawing import draw as draw_plain
from _together.gates import BlockProbe, LoraGates, latent_grid, layer_masks, positions_of
from customize.core.routing import attention_to_tokens, grid_of_tokens, smooth_maps


@dataclass(frozen=True)
class Settings:
    """The settings of the method.

    Attributes:
        block: The transformer block that masks are found in.
        found_at: Masks are found at the first noise level that is not above this, where 1 is pure
            noise.
        act_from: LoRAs act at noise levels up to this.
        threshold: Of maps from 0 to 1.
    """

    block: str = "up_blocks.1.attentions.0.transformer_blocks.0"
    found_at: float = 0.94
    act_from: float = 0.9
    threshold: float = 0.1


# The best of `together.py --tune`, on other concepts, seeds and places: block and threshold (the
# paper's is 0.7); the noise levels are the paper's, which were no worse than others.
CHOSEN = Settings()


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
    latents = latent_grid(gates.family, size)
    masks: list[Tensor] = []
    acts = False

    def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal acts
        acts = bool(masks) and _noise_level(pipe, args, kwargs) <= settings.act_from
        gates.open_only()

    def end(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not masks and _noise_level(pipe, args, kwargs) <= settings.found_at:
            masks.extend(
                find_masks(probe, len(prompts) + k, words[k], latents, settings.threshold)
                for k in range(len(prompts))
            )

    def weights(positions: int) -> dict[int, Tensor] | None:
        """LoRA -> its weights (2 * prompts, positions, 1)."""
        if not acts:
            return None
        resized = layer_masks(torch.stack(masks), positions, latents).repeat(2, 1, 1)
        shares = resized / resized.sum(1, keepdim=True).clamp(min=1.0)
        return {
            gates.owners[thing]: shares[:, i, :, None]
            for i, thing in enumerate(things)
            if thing in gates.owners
        }

    handles = [
        pipe.unet.register_forward_pre_hook(begin, with_kwargs=True),
        pipe.unet.register_forward_hook(end, with_kwargs=True),
    ]
    try:
        probe = BlockProbe(pipe.unet, settings.block)
        with gates.attach(), blended(pipe.unet, gates, weights), probe.attach():
            return draw_plain(pipe, things, prompts, numbers, size)
    finally:
        for handle in handles:
            handle.remove()


def _noise_level(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The share of noise in the latents, sigma / (alpha + sigma), as in FLUX.1's levels."""
    timestep = args[1] if len(args) > 1 else kwargs["timestep"]
    signal = float(pipe.scheduler.alphas_cumprod[int(torch.as_tensor(timestep).max())])
    alpha, sigma = signal**0.5, (1 - signal) ** 0.5
    return sigma / (alpha + sigma)


def find_masks(
    probe: BlockProbe, row: int, words: Sequence[Sequence[int]], latents: Size, threshold: float
) -> Tensor:
    """The disjoint masks (things, rows, columns) of one row of the batch, 0 or 1."""
    query, key = probe.query[row : row + 1], probe.key[row : row + 1]
    attention = probe.attention
    attended = attention_to_tokens(query, key, attention.heads, attention.scale)[0]
    grid = grid_of_tokens(attended.shape[0], *latents)
    assert grid is not None
    maps = torch.stack([attended[:, list(at)].sum(-1).unflatten(0, grid) for at in words])
    smooth = smooth_maps(maps)
    low, high = smooth.amin((1, 2), keepdim=True), smooth.amax((1, 2), keepdim=True)
    scaled = (smooth - low) / (high - low).clamp(min=1e-12)
    is_first = scaled == scaled.amax(0)
    return ((scaled >= threshold) & is_first).float()


@contextmanager
def blended(denoiser: Any, gates: LoraGates, weights: Any) -> Iterator[None]:
    """Blend the residuals of each transformer block.

    Args:
        denoiser: The denoiser.
        gates: Of its LoRAs; all closed, except in the blocks.
        weights: Function of the number of positions: LoRA -> its weights (batch, positions, 1),
            or None to compute without LoRAs.
    """
    is_inner = False

    def blend(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        nonlocal is_inner
        hidden = args[0] if args else kwargs["hidden_states"]
        shares = None if is_inner else weights(hidden.shape[1])
        if not shares:
            return None
        is_inner = True
        try:
            rest = 1.0 - sum(shares.values())
            residual = rest * (output - hidden)
            for index, share in shares.items():
                gates.open_only(index)
                residual = residual + share * (module(*args, **kwargs) - hidden)
        finally:
            is_inner = False
            gates.open_only()
        return hidden + residual

    handles = [
        module.register_forward_hook(blend, with_kwargs=True)
        for name, module in denoiser.named_modules()
        if type(module).__name__ == "BasicTransformerBlock"
    ]
    assert handles, "the denoiser has no transformer blocks"
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
