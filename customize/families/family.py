"""What a model family must answer, and what the families have in common.

A family speaks of components (the entries of ``pipe.components``), never of a pipeline class.
Latents and pictures are (batch, channels, height, width), of video models too: to them a picture is
a video of one frame. "Latents" always means scaled latents, as the denoiser takes them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from customize.errors import PipelineError
from customize.families.denoiser_inputs import DenoiserInputs

# Of a scheduler's configuration: what noise is added by, and what is the target; how it steps to
# draw is left out.
_LEVELS = (
    *("num_train_timesteps", "prediction_type", "beta_start", "beta_end", "beta_schedule"),
    *("trained_betas", "rescale_betas_zero_snr", "snr_shift_scale", "shift", "use_flow_sigmas"),
    *("flow_shift", "use_dynamic_shifting", "time_shift_type", "base_shift", "max_shift"),
    *("base_image_seq_len", "max_image_seq_len"),
)

#: By booleans, true for keys that count, or by numbers that are added to the scores.
MaskKind = Literal["boolean", "added"]


class Family(DenoiserInputs):
    """The parts of one model that draws from prompts, and how they work together."""

    #: The density of :mod:`customize.core.objectives` that the family's models were trained with.
    default_density: ClassVar[str]
    #: Where the pipeline's call has what it drew: "images", or "frames" of videos.
    output: str = "images"
    #: The guidance scale that the pipeline draws with where none is given.
    default_guidance: float
    #: The guidance scale at which the pipeline leaves out the empty prompt.
    no_guidance: ClassVar[float] = 1.0
    #: Whether diffusers has the models as modular pipelines only.
    modular_only: ClassVar[bool] = False
    #: How the denoiser's attention, and what condenses prompts, mask the padding of shorter ones.
    attention_mask: ClassVar[MaskKind | None] = None
    #: Whether cross-attention reads what the text encoders say as it is, with nothing between.
    reads_prompts_as_encoded: ClassVar[bool] = False

    # -- what differs ------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        """Whether these components are a model of this family, by class names and configs."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts to the conditions that :meth:`predict` takes.

        Exactly what the pipeline's own ``encode_prompt`` makes of prompts without learned
        tokens or with expanded ones, under the names of the pipeline's call arguments.
        Differentiable with respect to the text encoders; on their device, in their dtype.

        Returns:
            name -> (len(prompts), ...). ``encode_prompts([""])`` is the empty condition.

        Raises:
            PipelineError: an encoder has been freed.
        """

    @abstractmethod
    def timesteps(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """(batch,) draws in (0, 1), 1 being all noise, to (batch,) timesteps of the denoiser.

        Args:
            shape: (channels, height, width) of the latents, by which some models shift them.
        """

    @abstractmethod
    def noisy_latents(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Latents with noise of level t, (batch,) from :meth:`timesteps`; the latents' dtype."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should answer: the latents' shape, float32."""

    @abstractmethod
    def loss_weight(self, t: Tensor, min_snr_gamma: float | None) -> Tensor:
        """The weight of each sample's squared error: (batch,), float32; ones without a gamma.

        Raises:
            ConfigError: the family has no min-SNR weighting, or gamma is not positive.
        """

    @abstractmethod
    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: float = 1.0,
    ) -> Tensor:
        """Call the denoiser once, without classifier-free guidance.

        Everything is cast to the denoiser's dtype, so it works with and without autocast.

        Args:
            noisy: (batch, channels, height, width), any floating dtype, on the denoiser's device.
            t: (batch,), from :meth:`timesteps`.
            conditions: as :meth:`encode_prompts` gives, batch first.
            guidance: the scale that denoisers with :attr:`has_guidance_input` take; at 1 they
                answer what data are like, as training targets are.

        Returns:
            noisy's shape, in the dtype that the denoiser computes in.

        Raises:
            PipelineError: the denoiser takes more channels than latents have.
        """

    @property
    @abstractmethod
    def latent_multiple(self) -> int:
        """Picture heights and widths must be a multiple of this."""

    @abstractmethod
    def cross_attention_layers(self) -> list[str]:
        """Full names of the denoiser's cross-attention modules, in the order they are computed.

        Empty where text and picture share one attention.
        """

    @abstractmethod
    def _latent_scaling(self) -> tuple[float | Tensor, float | Tensor]:
        """(shift, scale) with ``latents = (encoded - shift) * scale``, as the pipeline has it;
        numbers, or (channels, 1, 1) on the autoencoder's device."""

    # -- what is alike -----------------------------------------------------------------------

    def relevant_config(self) -> dict[str, Any]:
        """What else than the weights decides on what is learned, as JSON values: the scheduler's
        levels of noise, and what the family takes from :attr:`pipeline_config`."""
        config = self.scheduler.config
        found = {key: config[key] for key in _LEVELS if config.get(key) is not None}
        return {key: v.tolist() if hasattr(v, "tolist") else v for key, v in found.items()}

    def pack(self, latents: Tensor) -> Tensor:
        """Latents as the pipeline and the denoiser hold them, for its argument ``latents=``."""
        return latents

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        """The inverse of :meth:`pack`, for latents of this height and width."""
        return packed

    @property
    def has_guidance_input(self) -> bool:
        """Whether the denoiser was distilled to take the guidance scale as an input; then there is
        no second call for the empty prompt."""
        return False

    def is_guided(self, scale: float) -> bool:
        """Whether the pipeline calls the denoiser for the empty prompt as well.

        Args:
            scale: of guidance, as the pipeline counts it.
        """
        return scale > self.no_guidance and not self.has_guidance_input

    @property
    def guidance_needs_negative_prompt(self) -> bool:
        """Whether the pipeline is guided only where it is given a negative prompt as well."""
        return False

    @property
    def guidance_argument(self) -> str:
        """What the pipeline's call names the scale of guidance."""
        return "true_cfg_scale" if self.guidance_needs_negative_prompt else "guidance_scale"

    def guidance_kwargs(self, scale: float | None, negative: str | None) -> dict[str, Any]:
        """The arguments by which the pipeline's call is guided.

        Args:
            scale: as the pipeline counts it; None: its own.
            negative: the prompt to lead away from; None: the empty one.
        """
        if self.guidance_needs_negative_prompt and negative is None and scale is not None:
            negative = ""
        conditional = {self.guidance_argument: scale, "negative_prompt": negative}
        return {name: value for name, value in conditional.items() if value is not None}

    def schedule(self, steps: int, shape: Sequence[int], device: torch.device) -> Any:
        """A new scheduler like the pipeline's, set to so many steps as the pipeline sets it.

        Args:
            shape: (channels, height, width) of the latents.
        """
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=device)
        return scheduler

    def unconditional(self, empty: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the pipeline guides away from where no negative prompt is given.

        Args:
            empty: the conditions of the empty prompt.
        """
        return dict(empty)

    def apply_guidance(self, unconditional: Tensor, asked: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598) as the pipeline has it.

        Args:
            plain, asked: the denoiser's answers without and with the prompt.
            scale: as the pipeline counts it; see :attr:`no_guidance`.
        """
        # Some pipelines count from the prompt's own answer: 0 is no guidance to them.
        return unconditional + (scale + 1.0 - self.no_guidance) * (asked - unconditional)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The distribution of the latents of pictures, so that a cache can draw from it anew.

        Args:
            pixels: (batch, 3, height, width), in [-1, 1], any floating dtype and device.

        Returns:
            mean and standard deviation, each (batch, channels, height / f, width / f), float32,
            on the autoencoder's device: ``mean + std * noise`` are scaled latents.

        Raises:
            PipelineError: the autoencoder gives no distribution.
        """
        vae = self.vae
        encoded = vae.encode(pixels.to(vae.device, vae.dtype))
        if not hasattr(encoded, "latent_dist"):
            raise PipelineError(
                f"the autoencoder {type(vae).__name__} gives no distribution of latents",
                where="vae",
                fix="train with the AutoencoderKL that the model was made with",
            )
        shift, scale = self._latent_scaling()
        posterior = encoded.latent_dist
        mean, std = (self._to_denoiser_layout(x.float()) for x in (posterior.mean, posterior.std))
        return (mean - shift) * scale, std * scale

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents to pictures: (batch, 3, height, width), in [-1, 1], float32."""
        vae = self.vae
        shift, scale = self._latent_scaling()
        encoded = latents.to(vae.device, torch.float32) / scale + shift
        return (
            vae.decode(self._to_vae_layout(encoded).to(vae.dtype)).sample.float().clamp(-1.0, 1.0)
        )

    def denoiser_activations(self) -> int:
        """How many numbers the denoiser holds at most beside its weights, for one picture of the
        default resolution: a bound from above, at most twice what its layers allocate.

        Raises:
            PipelineError: that is not counted for this family.
        """
        raise PipelineError(
            f"what a model of family {self.name} needs beside its weights is not counted",
            fix="use the pipeline's own offloading and tiling",
        )

    def decoder_activations(self, tiled: bool = False) -> int:
        """What :meth:`denoiser_activations` is, for decoding that picture whole or in tiles."""
        side = self.default_resolution
        if tiled:
            side = min(side, self._tile_size)
        return self._decoder_width * side**2

    @property
    def default_resolution(self) -> int:
        """The height and width in pixels that the denoiser was made for."""
        size = self.denoiser.config.sample_size
        # UNets may name height and width apart.
        return int(size if isinstance(size, int) else size[0]) * self._vae_factor

    # -- helpers of the families ---------------------------------------------------------------

    @property
    def _latent_side(self) -> int:
        """Height and width in latents of a picture of the default resolution."""
        return self.default_resolution // self._vae_factor

    @property
    def _vae_factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def _decoder_width(self) -> int:
        """How many numbers the decoder holds at most for each pixel."""
        return 7 * self.vae.config.block_out_channels[0]

    @property
    def _tile_size(self) -> int:
        """The height and width in pixels of the autoencoder's tiles."""
        return self.vae.tile_latent_min_size * self._vae_factor

    def _to_denoiser_layout(self, encoded: Tensor) -> Tensor:
        """What the autoencoder encodes, laid out as the denoiser's latents are."""
        return encoded

    def _to_vae_layout(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`_to_denoiser_layout`."""
        return latents

    @property
    def _latent_channels(self) -> int:
        """How many channels the denoiser takes."""
        return self.denoiser.config.in_channels

    def _check_channels(self, noisy: Tensor) -> None:
        takes = self._latent_channels
        if noisy.shape[1] != takes:
            raise PipelineError(
                f"the denoiser takes {takes} channels where latents have {noisy.shape[1]}",
                where=self.denoiser_key,
                fix="use the model that draws from a prompt alone, not a variant for inpainting, "
                "editing or animating pictures",
            )


def unit_weights(t: Tensor) -> Tensor:
    """A loss weight of 1 for each sample of t: (batch,), float32."""
    return torch.ones(t.shape[0], device=t.device)
