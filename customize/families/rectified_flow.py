"""Base classes of the families with rectified flow (arXiv 2403.03206).

A noise level is sigma in (0, 1) on the straight line from the latents to the noise. Timesteps are
sigma * num_train_timesteps (usually 1000), after the shift that the pipeline applies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from customize.core import objectives
from customize.errors import ConfigError, PipelineError
from customize.families.denoiser_inputs import weights_per_token
from customize.families.family import Family

# At least the default number of prompt tokens of these pipelines.
_PROMPT_TOKENS = 512


class RectifiedFlowFamily(Family):
    """A transformer that predicts the velocity ``noise - latents``, and a flow-matching scheduler.

    The scheduler's shift is constant or grows with the number of picture tokens.
    """

    denoiser_key = "transformer"
    default_density = "logit_normal"
    #: The denoiser's maximum number of activations for each token and unit of width.
    _width_factor: ClassVar[int] = 18

    def relevant_config(self) -> dict[str, Any]:
        # The shift of some schedulers can change without their configuration.
        shift = getattr(self.scheduler, "shift", None)
        return super().relevant_config() | ({} if shift is None else {"shift": float(shift)})

    def timesteps(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """As :meth:`Family.timesteps`: float32 in (0, train timesteps), with the pipeline's shift.

        Raises:
            PipelineError: The scheduler has no supported shift.
        """
        return objectives.shift_sigmas(u.float(), self._shift(shape)) * self._train_timesteps

    def noisy_latents(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return objectives.flow_noisy_latents(latents, noise, t / self._train_timesteps)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return objectives.flow_target(latents, noise)

    def loss_weight(self, t: Tensor, min_snr_gamma: float | None) -> Tensor:
        if min_snr_gamma is not None:
            raise ConfigError(
                "min-SNR weighting is for DDPM models; flow matching weights by its density",
                where=f"family {self.name}",
                fix="leave min-SNR out, and choose a timestep density instead",
            )
        return objectives.unit_weights(t)

    def schedule(self, steps: int, shape: Sequence[int], device: torch.device) -> Any:
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        extra = {"mu": self._mu(shape, steps)} if self._is_dynamic else {}
        scheduler.set_timesteps(sigmas=self._levels(steps), device=device, **extra)
        return scheduler

    def schedule_level(self, arguments: Mapping[str, Any]) -> float:
        level = self.noise_level(arguments)
        _, rows, columns = self.token_grid(arguments)
        # The shift is one of the picture's tokens, each of 2 x 2 latents or a packed one.
        side = self._latents_of_token
        shift = self._known_shift((0, rows * side, columns * side)) or 1.0
        return level / (shift - (shift - 1.0) * level)

    def cross_attention_layers(self) -> list[str]:
        return []

    def denoiser_activations(self) -> int:
        side = self._latent_side
        tokens = self._picture_tokens((0, side, side)) + _PROMPT_TOKENS
        # Layers fused with the MLP are wider than the tokens on one side.
        width = max(min(shape) for shape in self.adapter_targets(self.denoiser_key).values())
        calls = 1 if self.has_guidance_input else 2
        return self._width_factor * calls * tokens * width

    def _latent_scaling(self) -> tuple[float | Tensor, float | Tensor]:
        config = self.vae.config
        return config.shift_factor or 0.0, config.scaling_factor

    def _picture_tokens(self, shape: Sequence[int]) -> int:
        """Return the number of tokens of (channels, height, width) latents: 2 x 2 latents each."""
        return (shape[-2] // 2) * (shape[-1] // 2)

    def _levels(self, steps: int) -> Any:
        """Return the noise levels of sampling before the shift."""
        return np.linspace(1.0, 1 / steps, steps)

    def _mu(self, shape: Sequence[int], steps: int | None = None) -> float:
        """Return the dynamic shift, linear in the number of picture tokens (FLUX).

        Args:
            shape: (channels, height, width) of the latents.
            steps: Number of sampling steps; None: for training.
        """
        config = self.scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return first + (last - first) * (self._picture_tokens(shape) - low) / (high - low)

    @property
    def _is_dynamic(self) -> bool:
        return bool(self.scheduler.config.get("use_dynamic_shifting", False))

    def _shift(self, shape: Sequence[int]) -> float:
        """Return the factor of :func:`customize.core.objectives.shift_sigmas`."""
        shift = self._known_shift(shape)
        if shift is None:
            raise PipelineError(
                "the scheduler has no shift of sigmas to train with",
                where=type(self.scheduler).__name__,
                fix="give the pipeline the flow-matching scheduler that the model came with",
            )
        return shift

    def _known_shift(self, shape: Sequence[int]) -> float | None:
        """Return :meth:`_shift`; None for a scheduler without one."""
        scheduler = self.scheduler
        if self._is_dynamic:
            mu = self._mu(shape)
            kind = scheduler.config.get("time_shift_type", "exponential")
            return math.exp(mu) if kind == "exponential" else mu
        shift = getattr(scheduler, "shift", None)
        if scheduler.config.get("use_flow_sigmas", False):  # UniPC, DPM-Solver and similar
            shift = scheduler.config.flow_shift
        return None if shift is None else float(shift)

    @property
    def _latents_of_token(self) -> int:
        """The height and width in latents of what :meth:`_picture_tokens` counts."""
        return 2

    @property
    def _train_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps


class PackedLatentsFamily(RectifiedFlowFamily):
    """A flow family whose denoiser takes latents as a sequence of tokens (FLUX, Qwen-Image)."""

    #: The height and width of a token in latents.
    patch: ClassVar[int] = 2
    _max_timestep = 1.0

    def pack(self, latents: Tensor) -> Tensor:
        """Convert (batch, channels, h, w) to the denoiser's tokens.

        Returns:
            (batch, h / patch * w / patch, channels * patch ** 2).
        """
        return functional.pixel_unshuffle(latents, self.patch).flatten(2).transpose(1, 2)

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        size = (height // self.patch, width // self.patch)
        return functional.pixel_shuffle(packed.transpose(1, 2).unflatten(2, size), self.patch)

    def broadcast_weights(self, weights: Tensor, answer: Tensor) -> Tensor:
        return weights_per_token(weights, answer)

    @property
    def default_resolution(self) -> int:
        # These transformers have no configured size; their pipelines' default is 128 latents.
        return 128 * self._vae_factor

    @property
    def latent_multiple(self) -> int:
        return 2 * self._vae_factor

    @property
    def _latent_channels(self) -> int:
        return self.denoiser.config.in_channels // self.patch**2

    @property
    def _latents_of_token(self) -> int:
        return self.patch

    def _picture_tokens(self, shape: Sequence[int]) -> int:
        return (shape[-2] // self.patch) * (shape[-1] // self.patch)

    def _positions(self, latents: Tensor) -> Tensor:
        """(tokens, 3): 0, row and column of each token of these latents, on their device."""
        height, width = latents.shape[-2:]
        rows, columns = (
            torch.arange(side // self.patch, device=latents.device) for side in (height, width)
        )
        return torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns)
