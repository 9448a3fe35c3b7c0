"""The interface of model families and its defaults.

A family depends on components (the entries of ``pipe.components``), never on a pipeline class.
Latents and pictures are (batch, channels, height, width), for video models too: a picture is a
video of one frame. "Latents" always means scaled latents, the denoiser's input.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from customize.errors import PipelineError
from customize.families.denoiser_inputs import DenoiserInputs
from customize.families.native_references import NativeReferences

# The entries of a scheduler's configuration that set noise levels and training target; those of the
# solver are left out.
_LEVELS = (
    *("num_train_timesteps", "prediction_type", "beta_start", "beta_end", "beta_schedule"),
    *("trained_betas", "rescale_betas_zero_snr", "snr_shift_scale", "shift", "use_flow_sigmas"),
    *("flow_shift", "use_dynamic_shifting", "time_shift_type", "base_shift", "max_shift"),
    *("base_image_seq_len", "max_image_seq_len"),
)

#: Boolean masks, true for the keys to attend to, or masks added to the attention scores.
MaskKind = Literal["boolean", "added"]


class Family(DenoiserInputs):
    """The components of one text-to-image or text-to-video model and how they work together."""

    #: The density of :mod:`customize.core.objectives` that the family's models were trained with.
    default_density: ClassVar[str]
    #: The attribute of the pipeline's output with the result: "images", or "frames" of videos.
    output: str = "images"
    #: The pipeline's default guidance scale.
    default_guidance: float
    #: The guidance scale at which the pipeline does not call the denoiser for the empty prompt.
    no_guidance: ClassVar[float] = 1.0
    #: Whether diffusers has only modular pipelines for the models.
    modular_only: ClassVar[bool] = False
    #: The mask type with which denoiser and connectors ignore the padding of prompts.
    attention_mask: ClassVar[MaskKind | None] = None
    #: Whether cross-attention reads the text encoders' states without layers in between.
    reads_prompts_as_encoded: ClassVar[bool] = False
    #: Whether concepts that one prompt names are kept apart unless a call says ``together=False``.
    #: For families in which that was measured to be better.
    together_by_default: ClassVar[bool] = False
    #: The pipelines of the family that read reference images by themselves.
    native_references: ClassVar[tuple[NativeReferences, ...]] = ()

    # -- specific to a family ----------------------------------------------------------------

    @classmethod
    @abstractmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        """Whether class names and configurations of the components match this family."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts to the conditions that :meth:`predict` takes.

        The result equals that of the pipeline's ``encode_prompt`` exactly, under the names of the
        pipeline's call arguments, and is differentiable with respect to the text encoders.

        Args:
            prompts: Texts without learned tokens, or with expanded ones.

        Returns:
            Name -> (len(prompts), ...), on the text encoders' device, in their dtype:
            "prompt_embeds" (len(prompts), tokens, width) for every family; depending on the family
            also a pooled vector, a mask or the lengths of the prompts.
            ``encode_prompts([""])`` is the empty condition.

        Raises:
            PipelineError: A text encoder has been freed.
        """

    @abstractmethod
    def timesteps(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """Convert draws from (0, 1) to timesteps of the denoiser.

        Args:
            u: (batch,), floating, in (0, 1); 1 is pure noise.
            shape: (channels, height, width) of the latents, which some models shift timesteps by.

        Returns:
            (batch,), on u's device: int64 with DDPM noise, float32 with rectified flow.
        """

    @abstractmethod
    def noisy_latents(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Add noise to latents.

        Args:
            latents: (batch, channels, height, width), any floating dtype.
            noise: Standard normal, in the latents' shape.
            t: (batch,), from :meth:`timesteps`.

        Returns:
            Noisy latents in the latents' shape and dtype.
        """

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Compute the denoiser's training target.

        Args:
            latents: (batch, channels, height, width), any floating dtype.
            noise: Standard normal, in the latents' shape.
            t: (batch,), from :meth:`timesteps`.

        Returns:
            The target in the latents' shape, float32.
        """

    @abstractmethod
    def loss_weight(self, t: Tensor, min_snr_gamma: float | None) -> Tensor:
        """Compute the weight of each sample's squared error.

        Args:
            t: (batch,), from :meth:`timesteps`.
            min_snr_gamma: Gamma of min-SNR weighting (arXiv 2303.09556), positive; None: all
                weights are 1.

        Returns:
            (batch,), float32.

        Raises:
            ConfigError: The family has no min-SNR weighting, or gamma is not positive.
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

        Inputs are cast to the denoiser's dtype, so the call works with and without autocast.

        Args:
            noisy: (batch, channels, height, width), any floating dtype, on the denoiser's device.
            t: (batch,), from :meth:`timesteps`.
            conditions: As returned by :meth:`encode_prompts`, batch first.
            guidance: Guidance scale for denoisers with :attr:`has_guidance_input`; 1 predicts the
                data distribution, like the training target.

        Returns:
            The prediction in noisy's shape, in the dtype that the denoiser computes in.

        Raises:
            PipelineError: The denoiser takes more channels than the latents have.
        """

    @property
    @abstractmethod
    def latent_multiple(self) -> int:
        """The number of pixels that picture heights and widths must be a multiple of."""

    @abstractmethod
    def cross_attention_layers(self) -> list[str]:
        """Return the full names of the denoiser's cross-attention modules in execution order.

        Empty if text and picture share one attention.
        """

    @abstractmethod
    def _latent_scaling(self) -> tuple[float | Tensor, float | Tensor]:
        """Return (shift, scale) of ``latents = (encoded - shift) * scale``, as in the pipeline.

        Both are numbers, or (channels, 1, 1) on the autoencoder's device.
        """

    # -- defaults ----------------------------------------------------------------------------

    def encode_clip_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts by the CLIP text encoders alone, for families that have some.

        Args:
            prompts: Texts without learned tokens, or with expanded ones.

        Returns:
            The part of :meth:`encode_prompts` that comes from CLIP: "prompt_embeds" has CLIP's rows
            alone, and is left out where they are none.
        """
        return self.encode_prompts(prompts)

    def relevant_config(self) -> dict[str, Any]:
        """Return the configuration that training depends on besides the weights, as JSON values.

        It contains the scheduler's noise levels and the entries of :attr:`pipeline_config` that
        the family reads.
        """
        config = self.scheduler.config
        levels = {key: config[key] for key in _LEVELS if config.get(key) is not None}
        return {key: v.tolist() if hasattr(v, "tolist") else v for key, v in levels.items()}

    def pack(self, latents: Tensor) -> Tensor:
        """Convert latents to the layout of the denoiser and of the pipeline's ``latents=``.

        Args:
            latents: (batch, channels, height, width).
        """
        return latents

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        """Invert :meth:`pack`.

        Args:
            packed: In the denoiser's layout.
            height: Of the latents.
            width: Of the latents.

        Returns:
            (batch, channels, height, width).
        """
        return packed

    @property
    def has_guidance_input(self) -> bool:
        """Whether the denoiser takes the guidance scale as an input (guidance distillation).

        The pipeline then does not call it for the empty prompt.
        """
        return False

    def is_guided(self, scale: float) -> bool:
        """Whether the pipeline calls the denoiser for the empty prompt as well.

        Args:
            scale: Guidance scale in the pipeline's convention; see :attr:`no_guidance`.
        """
        return scale > self.no_guidance and not self.has_guidance_input

    @property
    def guidance_needs_negative_prompt(self) -> bool:
        """Whether the pipeline applies guidance only with a negative prompt."""
        return False

    @property
    def guidance_argument(self) -> str:
        """The name of the guidance scale among the pipeline's call arguments."""
        return "true_cfg_scale" if self.guidance_needs_negative_prompt else "guidance_scale"

    def guidance_kwargs(self, scale: float | None, negative: str | None) -> dict[str, Any]:
        """Return the guidance arguments of the pipeline's call.

        Args:
            scale: Guidance scale in the pipeline's convention; None: the pipeline's default.
            negative: Negative prompt; None: the empty one.
        """
        if self.guidance_needs_negative_prompt and negative is None and scale is not None:
            negative = ""
        conditional = {self.guidance_argument: scale, "negative_prompt": negative}
        return {name: value for name, value in conditional.items() if value is not None}

    def schedule(self, steps: int, shape: Sequence[int], device: torch.device) -> Any:
        """Create a scheduler with the pipeline's configuration and timesteps.

        Args:
            steps: Number of sampling steps.
            shape: (channels, height, width) of the latents.
            device: Device of the timesteps.
        """
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=device)
        return scheduler

    def unconditional(self, empty: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the unconditional input of guidance without a negative prompt.

        Args:
            empty: The conditions of the empty prompt.

        Returns:
            Name -> tensor, in the shapes of the empty prompt's conditions.
        """
        return dict(empty)

    def apply_guidance(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Apply classifier-free guidance (arXiv 2207.12598) as the pipeline does.

        Args:
            unconditional: The prediction without the prompt, (batch, channels, height, width).
            conditional: The prediction with the prompt, in the same shape.
            scale: Guidance scale in the pipeline's convention; see :attr:`no_guidance`.
        """
        # In some pipelines the scale is relative to the prompt's prediction: 0 is no guidance.
        return unconditional + (scale + 1.0 - self.no_guidance) * (conditional - unconditional)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures to the distribution of their latents, which a cache can sample from.

        Args:
            pixels: (batch, 3, height, width), in [-1, 1], any floating dtype and device.

        Returns:
            Mean and standard deviation, each (batch, channels, height / f, width / f), float32,
            on the autoencoder's device: ``mean + std * noise`` are scaled latents.

        Raises:
            PipelineError: The autoencoder returns no distribution.
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
        """Decode latents to pictures.

        Args:
            latents: (batch, channels, height / f, width / f), any floating dtype and device.

        Returns:
            (batch, 3, height, width), in [-1, 1], float32, on the autoencoder's device.
        """
        vae = self.vae
        shift, scale = self._latent_scaling()
        encoded = self._to_vae_layout(latents.to(vae.device, torch.float32) / scale + shift)
        return vae.decode(encoded.to(vae.dtype)).sample.float().clamp(-1.0, 1.0)

    def denoiser_activations(self) -> int:
        """Return an upper bound of the denoiser's activations, in numbers, for one picture.

        The picture has the default resolution; the bound is at most twice the layers' allocation.

        Raises:
            PipelineError: The family has no estimate.
        """
        raise PipelineError(
            f"what a model of family {self.name} needs beside its weights is not counted",
            fix="use the pipeline's own offloading and tiling",
        )

    def decoder_activations(self, tiled: bool = False) -> int:
        """Return the bound of :meth:`denoiser_activations` for decoding the same picture.

        Args:
            tiled: Whether the autoencoder decodes in tiles.
        """
        side = self.default_resolution
        if tiled:
            side = min(side, self._tile_size)
        return self._decoder_width * side**2

    @property
    def default_resolution(self) -> int:
        """The height and width in pixels that the denoiser was trained for."""
        size = self.denoiser.config.sample_size
        # UNets may have separate values for height and width.
        return int(size if isinstance(size, int) else size[0]) * self._vae_factor

    # -- helpers -----------------------------------------------------------------------------

    @property
    def _latent_side(self) -> int:
        """Height and width in latents of a picture of the default resolution."""
        return self.default_resolution // self._vae_factor

    @property
    def _vae_factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def _decoder_width(self) -> int:
        """The maximum number of the decoder's activations for each pixel."""
        return 7 * self.vae.config.block_out_channels[0]

    @property
    def _tile_size(self) -> int:
        """The height and width in pixels of the autoencoder's tiles."""
        return self.vae.tile_latent_min_size * self._vae_factor

    def _to_denoiser_layout(self, encoded: Tensor) -> Tensor:
        """Convert the autoencoder's latents to the denoiser's layout."""
        return encoded

    def _to_vae_layout(self, latents: Tensor) -> Tensor:
        """Invert :meth:`_to_denoiser_layout`."""
        return latents

    @property
    def _latent_channels(self) -> int:
        """The number of latent channels that the denoiser takes."""
        return self.denoiser.config.in_channels

    def _check_channels(self, noisy: Tensor) -> None:
        takes = self._latent_channels
        if noisy.shape[1] != takes:
            raise PipelineError(
                f"the denoiser takes {takes} channels where latents have {noisy.shape[1]}",
                where=self.denoiser_key,
                fix="use the model that draws from a prompt alone, not a variant for inpainting, "
                "editing or animating images",
            )
