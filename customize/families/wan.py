"""Wan 2.1 (arXiv 2503.20314) and 2.2: a transformer over the tokens of a video, or two of them.

Wan 2.2 14B has one transformer for much noise and one for little. A concept has updates of both,
each learned on its own levels: a batch's samples go where the pipeline would send them.

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
from customize.families.original_layer_names import RowRange, original_rows
from customize.families.pipeline_components import class_name, modules_named
from customize.families.rectified_flow import RectifiedFlowFamily
from customize.families.tokenization import to_device, tokenize
from customize.families.video_vae import VideoVAEFamily

#: How many tokens of the prompt the pipeline takes by default.
MAX_SEQUENCE_LENGTH = 512

#: The names of Wan's own code.
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
for _theirs, _ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    for _layer, _own in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
        _ORIGINALS[f"blocks.{{}}.{_theirs}.{_layer}"] = (f"blocks.{{}}.{_ours}.{_own}",)


class Wan(VideoVAEFamily, RectifiedFlowFamily):
    """WanTransformer3DModel, UMT5, AutoencoderKLWan, and a scheduler that knows flow matching.

    What animates a picture has projections of that besides; they are left alone, so what was
    learned on the model that draws from prompts also fits the one of its size that animates.
    """

    name = "wan"
    default_guidance = 5.0
    output = "frames"
    attention_projections = re.compile(r"blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)")
    other_denoisers = ("transformer_2",)
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
        # The one with two comes last: what fits one of them is as well a LoRA of Wan 2.1's.
        both = {"transformer": plain[-1], "transformer_2": plain[-1]}
        return [*({"transformer": each} for each in (*plain, animating)), both]

    def original_names(self) -> dict[str, tuple[RowRange, ...]]:
        return original_rows(self.layers(self.denoiser_key), _ORIGINALS)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        encoder = self._component("text_encoder")
        texts = [prompt_clean(prompt) for prompt in prompts]
        tokens = tokenize(self._component("tokenizer"), texts, MAX_SEQUENCE_LENGTH)
        mask = to_device(tokens.attention_mask, encoder.device)
        states = encoder(to_device(tokens.input_ids, encoder.device), mask).last_hidden_state
        # The denoiser has no mask: it was trained with zeros behind the prompt.
        return {"prompt_embeds": states.masked_fill(mask[..., None] == 0, 0.0).to(encoder.dtype)}

    def relevant_config(self) -> dict[str, Any]:
        boundary = self._boundary()
        return super().relevant_config() | (
            {} if boundary is None else {"boundary_ratio": boundary}
        )

    def timesteps(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """As :meth:`FlowFamily.timesteps`.

        Raises:
            PipelineError: also where it isn't told which levels are whose, since both would be
                trained on wrong ones.
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
        denoisers = self._asked(t)
        if len(set(denoisers)) == 1:
            return self._answer(denoisers[0], noisy, t, prompts)
        # Batches of models of this size are small: one sample at a time.
        rows = zip(denoisers, noisy.split(1), t.split(1), prompts.split(1), strict=True)
        return torch.cat([self._answer(*row) for row in rows])

    def _asked(self, t: Tensor) -> list[Any]:
        """The denoiser of each sample. Of two, the choice is the one thing here that waits for
        the device."""
        boundary, second = self._boundary(), self.components.get("transformer_2")
        if boundary is None:
            return [self.denoiser] * len(t)
        much = (t >= boundary * self._train_timesteps).tolist()
        return [self.denoiser if noise else second for noise in much]

    def _boundary(self) -> float | None:
        """The share of noise from which of two transformers the first is called; None of one.

        Raises:
            PipelineError: the pipeline's configuration has none.
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
        # Wan 2.2 5B is given a time for each token, but tokens to draw all have the same.
        answer = denoiser(
            hidden_states=self.pack(noisy.to(dtype)),
            timestep=t,
            encoder_hidden_states=prompts.to(dtype),
            return_dict=False,
        )[0]
        return self.unpack(answer, *noisy.shape[-2:])

    def pack(self, latents: Tensor) -> Tensor:
        """(batch, channels, h, w) to (batch, channels, 1, h, w)."""
        return latents[:, :, None]

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        return packed[:, :, 0]

    def schedule(self, steps: int, shape: Sequence[int], device: torch.device) -> Any:
        return Family.schedule(self, steps, shape, device)  # the levels are the scheduler's own

    def cross_attention_layers(self) -> list[str]:
        return modules_named(self.denoiser, r"blocks\.\d+\.attn2")

    @property
    def default_resolution(self) -> int:
        return 480  # the pipeline's height

    @property
    def latent_multiple(self) -> int:
        # The pipeline asks for multiples of 16, and rounds to its tokens of 2 x 2 latents.
        return math.lcm(16, 2 * self._vae_factor)

    @property
    def _vae_factor(self) -> int:
        return self.vae.config.scale_factor_spatial
