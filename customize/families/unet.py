"""What the families with a UNet and DDPM noise (arXiv 2006.11239) have in common.

The prediction is epsilon, v or the sample, as the scheduler's configuration says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from customize.core import objectives
from customize.errors import PipelineError
from customize.families.base import Family, class_name, ones_like_batch, uncompiled


class UNetFamily(Family):
    """UNet2DConditionModel, AutoencoderKL, any scheduler of the DDPM kind."""

    denoiser_key = "unet"
    default_density = "uniform"
    attention_projections = re.compile(r".+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)")

    def __init__(self, components: Mapping[str, Any]) -> None:
        super().__init__(components)
        self._alphas_cumprod: Tensor | None = None

    def timesteps(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """int64 in [0, train timesteps): every step has an equal share of (0, 1)."""
        count = self._alphas(u).shape[0]
        return (u.float() * count).long().clamp(0, count - 1)

    def noisy_latents(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return objectives.noisy_latents(latents, noise, self._alphas(latents), t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return objectives.target(self.prediction, latents, noise, self._alphas(latents), t)

    def loss_weight(self, t: Tensor, min_snr_gamma: float | None) -> Tensor:
        if min_snr_gamma is None:
            return ones_like_batch(t)
        snr = objectives.snr(self._alphas(t), t)
        return objectives.min_snr_weight(snr, min_snr_gamma, self.prediction)

    @property
    def prediction(self) -> str:
        """One of :data:`customize.core.objectives.PREDICTIONS`."""
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        if kind not in objectives.PREDICTIONS:
            raise PipelineError(
                f"the scheduler's prediction_type {kind!r} is not one of family {self.name}",
                where=type(self.scheduler).__name__,
                fix=f"use a scheduler with one of {', '.join(objectives.PREDICTIONS)}",
            )
        return kind

    @property
    def latent_multiple(self) -> int:
        # The pipelines ask for multiples of 8 whatever the autoencoder's factor.
        return math.lcm(8, self._vae_factor)

    def cross_attention_layers(self) -> list[str]:
        # named_modules follows registration, where the middle block comes last.
        order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
        names = [
            name
            for name, module in uncompiled(self.denoiser).named_modules()
            if name.endswith((".attn1", ".attn2")) and module.is_cross_attention
        ]
        return sorted(names, key=lambda name: order[name.split(".")[0]])

    def denoiser_numbers(self) -> int:
        # At the first resolution, where the skip connections are widest; with the empty prompt.
        side = self.default_resolution // self._vae_factor
        return 28 * 2 * side**2 * self.denoiser.config.block_out_channels[0]

    def _alphas(self, like: Tensor) -> Tensor:
        """The scheduler's alphas_cumprod on the tensor's device, copied there once."""
        if self._alphas_cumprod is None:
            alphas = getattr(self.scheduler, "alphas_cumprod", None)
            if alphas is None:
                raise PipelineError(
                    "the scheduler has no alphas_cumprod, so it is not of the DDPM kind",
                    where=type(self.scheduler).__name__,
                    fix="give the pipeline the scheduler that the model came with",
                )
            self._alphas_cumprod = alphas
        if self._alphas_cumprod.device != like.device:
            self._alphas_cumprod = self._alphas_cumprod.to(like.device)
        return self._alphas_cumprod


def is_unet(unet: Any, addition_embed_type: str | None) -> bool:
    """Whether it is a UNet that reads a prompt and these additional embeddings, and no more."""
    if class_name(unet) != "UNet2DConditionModel":
        return False
    config = unet.config
    return (
        isinstance(config.cross_attention_dim, int)
        and config.addition_embed_type == addition_embed_type
        # Other inputs than a prompt: DeepFloyd, Kandinsky, Kolors, unCLIP, upscalers. A loaded
        # IP-Adapter also sets encoder_hid_dim_type, and changes nothing else.
        and config.encoder_hid_dim_type in (None, "ip_image_proj")
        and config.class_embed_type is None
        and config.num_class_embeds is None
    )
