"""Wan 2.1 (arXiv 2503.20314) and 2.2: one or two transformers over the tokens of a video.

Wan 2.2 14B has one transformer for high and one for low noise levels. A concept has updates of
both, each trained on its range of levels: every sample goes to the transformer that the pipeline
would use.

UMT5 reads the prompt and takes no new tokens: a trigger is a plain word of the prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from customize.errors import PipelineError
from customize.families.family import Family
from customize.families.native_references import NativeReferences
from customize.families.original_layer_names import RowRange, original_rows
from customize.families.pipeline_components import class_name, modules_named
from customize.families.rectified_flow import RectifiedFlowFamily
from customize.families.token_layout import PromptText
from customize.families.tokenization import to_device, tokenize
from customize.families.video_vae import VideoVAEFamily

#: How many tokens of the prompt the pipeline takes by default.
MAX_SEQUENCE_LENGTH = 512

#: The layer names of Wan's original code.
_ORIGINALS: dict[str, tuple[str, ...]] = {
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
    "time_projection.1": ("condition_embedder.time_proj",),
    "blocks.{}.cross_attn.k_img": ("blocks.{}.attn2.add_k_proj",),
    "blocks.{}.cross_attn.v_img": ("blocks.{}.attn2.add_v_proj",),
    "blocks.{}.ffn.0": ("blocks.{}.ffn.net.0.proj",),
    "blocks.{}.ffn.2": ("blocks.{}.ffn.net.2",),
    "head.head": ("proj_out",),
}
for _original, _attention in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    for _letter, _layer in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
        _ORIGINALS[f"blocks.{{}}.{_original}.{_letter}"] = (f"blocks.{{}}.{_attention}.{_layer}",)


class Wan(VideoVAEFamily, RectifiedFlowFamily):
    """Wan 2.1 and 2.2.

    Components: WanTransformer3DModel, UMT5, AutoencoderKLWan, and a scheduler with flow matching.

    Image-to-video models have additional projections for the picture, which take no adapter. So a
    concept of a text-to-video model also fits the image-to-video model of the same size.
    """

    name = "wan"
    native_references = (
        NativeReferences(
            model="Wan VACE",
            pipelines=("WanVACEPipeline",),
            argument="reference_images",
            blocks=("wan-vace",),
            prompts="one prompt",
            order="order of the frames that precede the video",
            size_rule="resized to fit into the video's size, on white",
        ),
    )
    default_guidance = 5.0
    output = "frames"
    attention_projections = re.compile(r"blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)")
    other_denoisers = ("transformer_2",)
    token_kinds: ClassVar = {
        r"blocks\.\d+\.attn2\.(to_k|to_v)": "text",
        r"condition_embedder\.text_embedder\.linear_[12]": "text",
        r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ffn\..+)": "picture",
        r"patch_embedding|proj_out": "picture",
    }
    text_attention_kinds: ClassVar = {r"blocks\.\d+\.attn2": ("to_q", "to_k")}
    clip_encoders: ClassVar[dict[str, str]] = {}
    other_encoders = ("text_encoder",)

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return class_name(components.get("transformer")) == "WanTransformer3DModel"

    @classmethod
    def published_models(cls) -> list[dict[str, nn.Module]]:
        from diffusers import WanTransformer3DModel

        plain = [
            WanTransformer3DModel(
                num_attention_heads=heads,
                num_layers=layers,
                in_channels=channels,
                out_channels=channels,
            )
            # 1.3B, 5B and 14B
            for heads, layers, channels in ((12, 30, 16), (24, 30, 48), (40, 40, 16))
        ]
        animating = WanTransformer3DModel(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
        # The model with two transformers comes last: a LoRA of one of them also fits Wan 2.1.
        both = {"transformer": plain[-1], "transformer_2": plain[-1]}
        return [*({"transformer": model} for model in (*plain, animating)), both]

    def original_names(self) -> dict[str, tuple[RowRange, ...]]:
        return original_rows(self.layers(self.denoiser_key), _ORIGINALS)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        encoder = self._component("text_encoder")
        texts = [prompt_clean(prompt) for prompt in prompts]
        tokens = tokenize(self._component("tokenizer"), texts, self._length(MAX_SEQUENCE_LENGTH))
        mask = to_device(tokens.attention_mask, encoder.device)
        states = encoder(to_device(tokens.input_ids, encoder.device), mask).last_hidden_state
        # The denoiser has no mask: it was trained with zeros as padding.
        return {"prompt_embeds": states.masked_fill(mask[..., None] == 0, 0.0).to(encoder.dtype)}

    def relevant_config(self) -> dict[str, Any]:
        boundary = self._boundary()
        return super().relevant_config() | (
            {} if boundary is None else {"boundary_ratio": boundary}
        )

    def timesteps(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """As :meth:`RectifiedFlowFamily.timesteps`.

        Raises:
            PipelineError: Also if the noise level between two transformers is unknown, because
                both would train on wrong levels.
        """
        self._boundary()
        return super().timesteps(u, shape)

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: float = 1.0,
    ) -> Tensor:
        self._check_channels(noisy)
        prompts = conditions["prompt_embeds"]
        denoisers = self._denoisers_at(t)
        if len(set(denoisers)) == 1:
            return self._answer(denoisers[0], noisy, t, prompts)
        # One sample at a time, since batches of models of this size are small.
        rows = zip(denoisers, noisy.split(1), t.split(1), prompts.split(1), strict=True)
        return torch.cat([self._answer(*row) for row in rows])

    def _denoisers_at(self, t: Tensor) -> list[Any]:
        """Return the denoiser of each sample; t is (batch,).

        The choice between two denoisers synchronizes with the device.
        """
        boundary, second = self._boundary(), self.components.get("transformer_2")
        if boundary is None:
            return [self.denoiser] * len(t)
        is_high = (t >= boundary * self._train_timesteps).tolist()
        return [self.denoiser if high else second for high in is_high]

    def _boundary(self) -> float | None:
        """Return the noise level in (0, 1) from which the first of two transformers is called.

        None for models with one transformer.

        Raises:
            PipelineError: The pipeline's configuration has no boundary.
        """
        if self.components.get("transformer_2") is None:
            return None
        ratio = self.pipeline_config.get("boundary_ratio")
        if ratio is None:
            raise PipelineError(
                "the pipeline has two transformers and no boundary_ratio in its configuration, the "
                "level of noise at which one follows the other",
                where="boundary_ratio",
                fix="give pipe.config along with pipe.components, of the model's own pipeline",
            )
        return float(ratio)

    def _answer(self, denoiser: Any, noisy: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        dtype = self._denoiser_dtype
        # Wan 2.2 5B takes a timestep per token; without a first frame, all tokens have the same.
        answer = denoiser(
            hidden_states=self.pack(noisy.to(dtype)),
            timestep=t,
            encoder_hidden_states=prompts.to(dtype),
            return_dict=False,
        )[0]
        return self.unpack(answer, *noisy.shape[-2:])

    def pack(self, latents: Tensor) -> Tensor:
        """Convert (batch, channels, h, w) to (batch, channels, 1, h, w)."""
        return latents[:, :, None]

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        return packed[:, :, 0]

    def schedule(self, steps: int, shape: Sequence[int], device: torch.device) -> Any:
        return Family.schedule(self, steps, shape, device)  # with the scheduler's noise levels

    def token_grid(self, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
        sides = arguments[self.latents_argument].shape[-3:]
        frames, rows, columns = (
            side // size for side, size in zip(sides, self.denoiser.config.patch_size, strict=True)
        )
        return frames, rows, columns

    def rotations(
        self, arguments: Mapping[str, Any], texts: int, grid: tuple[int, int, int]
    ) -> tuple[Tensor | None, Tensor | None]:
        return None, None  # cross-attention has none

    def prompt_text(self, prompt: str) -> PromptText:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        text = prompt_clean(prompt)
        return PromptText(self._component("tokenizer"), text, 0, self._length(MAX_SEQUENCE_LENGTH))

    def cross_attention_layers(self) -> list[str]:
        return modules_named(self.denoiser, r"blocks\.\d+\.attn2")

    @property
    def default_resolution(self) -> int:
        return 480  # the pipeline's height

    @property
    def latent_multiple(self) -> int:
        # The pipeline requires multiples of 16 and rounds to tokens of 2 x 2 latents.
        return math.lcm(16, 2 * self._vae_factor)

    @property
    def _vae_factor(self) -> int:
        return self.vae.config.scale_factor_spatial
