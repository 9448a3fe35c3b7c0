"""What the families share whose autoencoder is one of videos: a picture is its first frame."""

from __future__ import annotations

import torch
from torch import Tensor

from customize.families.flow import PackedFamily


class FirstFrameFamily(PackedFamily):
    """A family with one of Qwen-Image's autoencoders, whose latents are normalised by channel."""

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().encode_images(pixels[:, :, None])
        return mean[:, :, 0], std[:, :, 0]

    def decode_latents(self, latents: Tensor) -> Tensor:
        return super().decode_latents(latents[:, :, None])[:, :, 0]

    @property
    def _vae_factor(self) -> int:
        return 2 ** len(self.vae.config.temperal_downsample)

    def _latent_scaling(self) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        values = torch.tensor([config.latents_mean, config.latents_std], device=self.vae.device)
        mean, std = values[..., None, None, None]
        return mean, 1.0 / std
