"""Base class of the families with FLUX.2's autoencoder."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from customize.families.family import Family


class Flux2VAEFamily(Family):
    """A family with AutoencoderKLFlux2.

    A latent of the denoiser is a patch of 2 x 2 latents of the autoencoder, normalised by the
    running statistics of the autoencoder's batch norm.
    """

    def _to_denoiser_layout(self, encoded: Tensor) -> Tensor:
        """Convert (batch, channels, h, w) to (batch, channels * 4, h / 2, w / 2)."""
        return functional.pixel_unshuffle(encoded, 2)

    def _to_vae_layout(self, latents: Tensor) -> Tensor:
        return functional.pixel_shuffle(latents, 2)

    def _latent_scaling(self) -> tuple[Tensor, Tensor]:
        norm, eps = self.vae.bn, self.vae.config.batch_norm_eps
        mean, variance = norm.running_mean.float(), norm.running_var.float()
        return mean[:, None, None], (variance + eps).rsqrt()[:, None, None]
