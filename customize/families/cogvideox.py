"""CogVideoX (arXiv 2408.06072): a transformer over the tokens of prompt and video, with DDPM noise.

T5 reads the prompt and takes no new tokens: a trigger is a plain word of the prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from customize.errors import PipelineError
from customize.families.ddpm import DDPMFamily
from customize.families.pipeline_components import NO_CONFIG, class_name
from customize.families.token_layout import PromptText, complex_rotations
from customize.families.tokenization import to_device, tokenize
from customize.families.video_vae import VideoVAEFamily

#: How many T5 tokens the pipeline takes by default.
MAX_SEQUENCE_LENGTH = 226


class CogVideoX(VideoVAEFamily, DDPMFamily):
    """CogVideoX 2B and 5B.

    Components: CogVideoXTransformer3DModel, T5EncoderModel, AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler or CogVideoXDPMScheduler.

    Raises:
        PipelineError: The transformer is that of CogVideoX 1.5, whose patches span two latent
            frames, so that it cannot draw a single frame.
    """

    name = "cogvideox"
    default_guidance = 6.0
    output = "frames"
    denoiser_key = "transformer"
    attention_projections = re.compile(
        r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"
    )
    clip_encoders: ClassVar[dict[str, str]] = {}
    other_encoders = ("text_encoder",)
    token_kinds: ClassVar = {
        r"patch_embed\.text_proj": "text",
        r"patch_embed\.proj|proj_out": "picture",
        r"transformer_blocks\.\d+\.(attn1|ff)\..+": "text_picture",
    }
    text_attention_kinds: ClassVar = {r"transformer_blocks\.\d+\.attn1": ("to_q", "to_k")}

    def __init__(
        self, components: Mapping[str, Any], pipeline_config: Mapping[str, Any] = NO_CONFIG
    ) -> None:
        super().__init__(components, pipeline_config)
        transformer = self.components.get("transformer")
        if transformer is not None and transformer.config.patch_size_t is not None:
            raise PipelineError(
                "this is CogVideoX 1.5, which reads latent frames in pairs, so that an image is "
                "no video to it",
                where="transformer",
                fix="use CogVideoX 2B or 5B",
            )

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return class_name(components.get("transformer")) == "CogVideoXTransformer3DModel"

    @classmethod
    def published_models(cls) -> list[dict[str, nn.Module]]:
        from diffusers import CogVideoXTransformer3DModel

        return [
            {"transformer": CogVideoXTransformer3DModel(num_attention_heads=h, num_layers=layers)}
            for h, layers in ((30, 30), (48, 42))
        ]

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        encoder = self._component("text_encoder")
        ids = tokenize(
            self._component("tokenizer"), prompts, self._length(MAX_SEQUENCE_LENGTH)
        ).input_ids
        return {"prompt_embeds": encoder(to_device(ids, encoder.device))[0].to(encoder.dtype)}

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: float = 1.0,
    ) -> Tensor:
        self._check_channels(noisy)
        dtype = self._denoiser_dtype
        answer = self.denoiser(
            hidden_states=self.pack(noisy.to(dtype)),
            encoder_hidden_states=conditions["prompt_embeds"].to(dtype),
            timestep=t,
            image_rotary_emb=self._positions(noisy),
            return_dict=False,
        )[0]
        return self.unpack(answer, *noisy.shape[-2:])

    def pack(self, latents: Tensor) -> Tensor:
        """Convert (batch, channels, h, w) to (batch, 1, channels, h, w)."""
        return latents[:, None]

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        return packed[:, 0]

    def schedule(self, steps: int, shape: Sequence[int], device: torch.device) -> Any:
        scheduler = super().schedule(steps, shape, device)
        multistep = class_name(scheduler) == "CogVideoXDPMScheduler"
        return _Multistep(scheduler) if multistep else scheduler

    @property
    def token_size(self) -> int:  # type: ignore[override]
        return self.denoiser.config.patch_size

    def rotations(
        self, arguments: Mapping[str, Any], texts: int, grid: tuple[int, int, int]
    ) -> tuple[Tensor | None, Tensor | None]:
        of_picture = arguments.get("image_rotary_emb")
        return (None if of_picture is None else complex_rotations(of_picture)), None

    def prompt_text(self, prompt: str) -> PromptText:
        return PromptText(
            self._component("tokenizer"), prompt, 0, self._length(MAX_SEQUENCE_LENGTH)
        )

    def _frames(self, arguments: Mapping[str, Any]) -> int:
        return int(arguments[self.latents_argument].shape[1])

    def cross_attention_layers(self) -> list[str]:
        return []

    @property
    def default_resolution(self) -> int:
        return self.denoiser.config.sample_height * self._vae_factor

    @property
    def latent_multiple(self) -> int:
        # The pipeline requires multiples of 8; the denoiser's tokens are 2 x 2 latents.
        return math.lcm(8, self._vae_factor * self.denoiser.config.patch_size)

    def _latent_scaling(self) -> tuple[float, float]:
        return 0.0, self.vae.config.scaling_factor

    def _positions(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine of one frame's rotary embedding; None for additive embeddings."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        config = self.denoiser.config
        if not config.use_rotary_positional_embeddings:
            return None
        grid = tuple(side // config.patch_size for side in latents.shape[-2:])
        base_size = [
            side // config.patch_size for side in (config.sample_width, config.sample_height)
        ]
        return get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim,
            crops_coords=get_resize_crop_region_for_grid(grid, *base_size),
            grid_size=grid,
            temporal_size=1,
            device=latents.device,
        )


class _Multistep:
    """CogVideoXDPMScheduler with the ``step`` signature of other schedulers.

    It stores the previous step's prediction and timestep, which the pipeline passes to ``step``.
    """

    def __init__(self, scheduler: Any) -> None:
        self.timesteps = scheduler.timesteps
        self._scheduler = scheduler
        self._previous: tuple[Tensor | None, Tensor | None] = (None, None)

    def step(
        self,
        answer: Tensor,
        t: Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        previous, previous_t = self._previous
        sample, clean = self._scheduler.step(
            answer, previous, t, previous_t, sample, generator=generator, return_dict=False
        )
        self._previous = clean, t
        return (sample,)
