"""Base class of the families with DDPM noise (arXiv 2006.11239).

The scheduler's configuration sets the prediction type: epsilon, v or the sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from customize.core import objectives
from customize.errors import PipelineError
from customize.families.family import Family
from customize.families.pipeline_components import NO_CONFIG


class DDPMFamily(Family):
    """Any denoiser with any scheduler of the DDPM kind."""

    default_density = "uniform"

    def __init__(
        self, components: Mapping[str, Any], pipeline_config: Mapping[str, Any] = NO_CONFIG
    ) -> None:
        super().__init__(components, pipeline_config)
        self._alphas_cumprod: Tensor | None = None

    def timesteps(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """As :meth:`Family.timesteps`: int64 in [0, train timesteps), uniform in u."""
        count = self._alphas(u).shape[0]
        return (u.float() * count).long().clamp(0, count - 1)

    def noisy_latents(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return objectives.noisy_latents(latents, noise, self._alphas(latents), t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return objectives.target(self.prediction, latents, noise, self._alphas(latents), t)

    def loss_weight(self, t: Tensor, min_snr_gamma: float | None) -> Tensor:
        if min_snr_gamma is None:
            return objectives.unit_weights(t)
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

    def _alphas(self, like: Tensor) -> Tensor:
        """The scheduler's alphas_cumprod on the tensor's device, copied only once."""
        if self._alphas_cumprod is None:
            alphas = getattr(self.scheduler, "alphas_cumprod", None)
            if alphas is None:
                raise PipelineError(
                    "the scheduler has no alphas_cumprod, so it is not of the DDPM kind",
                    where=type(self.scheduler).__name__,
                    fix="give the pipeline the scheduler that the model came with",
                )
            self._alphas_cumprod = alphas.float()
        if self._alphas_cumprod.device != like.device:
            self._alphas_cumprod = self._alphas_cumprod.to(like.device)
        return self._alphas_cumprod
