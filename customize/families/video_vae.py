"""Base classes of the families with a video autoencoder.

Concepts are trained on pictures, as videos of one frame. Families add the frame axis before a
model's call and remove it afterwards; no other module depends on it. A concept applies to videos of
any length, because the adapted layers are the same for any number of frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from customize.families.family import Family
from customize.families.rectified_flow import PackedLatentsFamily


class VideoVAEFamily(Family):
    """A family whose autoencoder takes (batch, channels, frames, height, width).

    The autoencoder's configuration has a mean and standard deviation for each latent channel.
    """

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
    """A family of picture models with one of Qwen-Image's autoencoders."""

    @property
    def _vae_factor(self) -> int:
        return 2 ** len(self.vae.config.temperal_downsample)

    @property
    def _decoder_width(self) -> int:
        return 19 * self.vae.config.base_dim

    @property
    def _tile_size(self) -> int:
        return self.vae.tile_sample_min_height
