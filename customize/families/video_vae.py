"""What the families with an autoencoder of videos have in common.

Concepts are learned from pictures, and a picture is a video of one frame. The frame axis is added
where such a model is called and taken away behind it: nothing outside of families knows of it. What
was learned serves all frames, because the layers that take an adapter are the same for every number
of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from customize.families.family import Family
from customize.families.rectified_flow import PackedLatentsFamily


class VideoVAEFamily(Family):
    """An autoencoder of (batch, channels, frames, height, width), with latents normalised by
    channel as its configuration says."""

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().encode_images(pixels[:, :, None])
        return mean[:, :, 0], std[:, :, 0]

    def decode_latents(self, latents: Tensor) -> Tensor:
        return super().decode_latents(latents[:, :, None])[:, :, 0]

    def _latent_scaling(self) -> tuple[float | Tensor, float | Tensor]:
        config = self.vae.config
        values = torch.tensor([config.latents_mean, config.latents_std], device=self.vae.device)
        mean, std = values[..., None, None, None]
        return mean, 1.0 / std


class QwenImageVAEFamily(VideoVAEFamily, PackedLatentsFamily):
    """A family that draws pictures with one of Qwen-Image's autoencoders."""

    @property
    def _vae_factor(self) -> int:
        return 2 ** len(self.vae.config.temperal_downsample)

    @property
    def _decoder_width(self) -> int:
        return 19 * self.vae.config.base_dim

    @property
    def _tile_size(self) -> int:
        return self.vae.tile_sample_min_height
