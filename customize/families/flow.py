"""What the families with rectified flow (arXiv 2403.03206) have in common.

A level of noise is sigma in (0, 1) on the straight line from the latents to the noise; timesteps
are 1000 sigma (or whatever the scheduler counts to), after the shift that the pipeline applies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from customize.core import objectives
from customize.errors import ConfigError, PipelineError
from customize.families.base import Family, ones_like_batch

# As many as the pipelines of these families take by default, or more.
_PROMPT_TOKENS = 512


class FlowFamily(Family):
    """A transformer that answers the velocity ``noise - latents``, and a flow-matching scheduler.

    The scheduler's shift is fixed, or it grows with the number of picture tokens.
    """

    denoiser_key = "transformer"
    default_density = "logit_normal"

    def timesteps(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """float32 in (0, train timesteps): sigma after the shift that the pipeline also applies to
        its evenly spaced levels.

        Raises:
            PipelineError: the scheduler has no shift that is known here.
        """
        return objectives.shift(u.float(), self._shift(shape)) * self._train_timesteps

    def noisy_latents(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return objectives.flow_noisy(latents, noise, t / self._train_timesteps)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return objectives.flow_target(latents, noise)

    def loss_weight(self, t: Tensor, min_snr_gamma: float | None) -> Tensor:
        if min_snr_gamma is not None:
            raise ConfigError(
                "min-SNR weighting is for DDPM models; flow matching weights by its density",
                where=f"family {self.name}",
                fix="leave min-SNR out, and choose a timestep density instead",
            )
        return ones_like_batch(t)

    def schedule(self, steps: int, shape: Sequence[int], device: torch.device) -> Any:
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        extra = {"mu": self._mu(shape)} if self._is_dynamic else {}
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device, **extra)
        return scheduler

    def cross_attention_layers(self) -> list[str]:
        return []

    def denoiser_numbers(self) -> int:
        side = self.default_resolution // self._vae_factor
        tokens = self._picture_tokens((0, side, side)) + _PROMPT_TOKENS
        widths = [width for _, width in self.adapter_targets(self.denoiser_key).values()]
        return 18 * (1 if self.guidance_is_an_input else 2) * tokens * max(widths)

    def _latent_scaling(self) -> tuple[float | Tensor, float | Tensor]:
        config = self.vae.config
        return config.shift_factor or 0.0, config.scaling_factor

    def _picture_tokens(self, shape: Sequence[int]) -> int:
        """How many tokens latents of (channels, height, width) are to the denoiser: 2 x 2 each."""
        return (shape[-2] // 2) * (shape[-1] // 2)

    def _mu(self, shape: Sequence[int]) -> float:
        """The dynamic shift: on a line through two numbers of picture tokens (FLUX)."""
        config = self.scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return first + (last - first) * (self._picture_tokens(shape) - low) / (high - low)

    @property
    def _is_dynamic(self) -> bool:
        return bool(self.scheduler.config.get("use_dynamic_shifting", False))

    def _shift(self, shape: Sequence[int]) -> float:
        """The factor of :func:`customize.core.objectives.shift`."""
        scheduler = self.scheduler
        if self._is_dynamic:
            mu = self._mu(shape)
            kind = scheduler.config.get("time_shift_type", "exponential")
            return math.exp(mu) if kind == "exponential" else mu
        shift = getattr(scheduler, "shift", None)
        if shift is None:
            raise PipelineError(
                "the scheduler has no shift of sigmas to train with",
                where=type(scheduler).__name__,
                fix="give the pipeline the flow-matching scheduler that the model came with",
            )
        return float(shift)

    @property
    def _train_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps


class PackedFamily(FlowFamily):
    """A flow family whose denoiser reads latents as tokens of 2 x 2 (FLUX, Qwen-Image)."""

    def pack(self, latents: Tensor) -> Tensor:
        """(batch, channels, h, w) to tokens (batch, h / 2 * w / 2, channels * 4)."""
        batch, channels, height, width = latents.shape
        patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * 4)

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        patches = packed.reshape(len(packed), height // 2, width // 2, -1, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(packed), -1, height, width)

    @property
    def default_resolution(self) -> int:
        # These transformers name no size; their pipelines' is 128 latents.
        return 128 * self._vae_factor

    @property
    def latent_multiple(self) -> int:
        return 2 * self._vae_factor

    @property
    def _latent_channels(self) -> int:
        return self.denoiser.config.in_channels // 4
