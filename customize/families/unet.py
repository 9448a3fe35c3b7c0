"""Base class of the families with a UNet."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from customize.core.routing import grid_of_tokens
from customize.families.ddpm import DDPMFamily
from customize.families.original_layer_names import RowRange
from customize.families.pipeline_components import class_name, uncompiled
from customize.families.token_layout import TextAttention, TokenKind

#: A UNet with AnimateDiff's motion modules between its layers, and a frame axis.
MOTION_UNET = "UNetMotionModel"

# Linear layers of a UNet whose inputs have positions; the keys of image prompts have others.
_OF_POSITIONS = re.compile(
    r".*\.attentions\.\d+\.(proj_in|proj_out"
    r"|transformer_blocks\.\d+\.(attn\d\.(to_q|to_k|to_v|to_out\.0)|ff\..+))"
)

# Arguments of ControlNets and T2I-Adapters, whose values have the picture's positions.
_OF_WHOLE_PICTURES = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)

_ORIGINAL_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


class UNetFamily(DDPMFamily):
    """A family with UNet2DConditionModel, AutoencoderKL and any scheduler of the DDPM kind."""

    denoiser_key = "unet"
    latents_argument = "sample"
    reads_prompts_as_encoded = True
    together_by_default = True
    has_clip_rows = True
    # Excludes AnimateDiff's motion modules, which are siblings of the attentions.
    attention_projections = re.compile(
        r".+\.attentions\.\d+\..+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
    )

    @property
    def latent_multiple(self) -> int:
        # The pipelines require multiples of 8, independent of the autoencoder's factor.
        return math.lcm(8, self._vae_factor)

    def cross_attention_layers(self) -> list[str]:
        # named_modules has the order of registration, with the middle block last.
        order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
        names = [
            name
            for name, module in uncompiled(self.denoiser).named_modules()
            if name.endswith((".attn1", ".attn2")) and module.is_cross_attention
        ]
        return sorted(names, key=lambda name: order[name.split(".")[0]])

    def layer_tokens(self, component: str) -> dict[str, TokenKind]:
        attentions = self.cross_attention_layers()
        of_text = {f"{name}.{part}" for name in attentions for part in ("to_k", "to_v")}
        # Convolutions have the positions of their output.
        return {
            name: "text" if name in of_text else "picture"
            for name, shape in self.weight_shapes(component).items()
            if len(shape) > 2 or _OF_POSITIONS.fullmatch(name)
        }

    def text_attentions(self, component: str) -> list[TextAttention]:
        return [
            TextAttention(name, bias="attention_mask") for name in self.cross_attention_layers()
        ]

    def layer_grid(self, positions: int, grid: tuple[int, int, int]) -> tuple[int, int, int] | None:
        frames, rows, columns = grid
        halved = grid_of_tokens(positions // frames, rows, columns)
        return None if halved is None or positions % frames else (frames, *halved)

    def _frames(self, arguments: Mapping[str, Any]) -> int:
        latents = arguments[self.latents_argument][0]
        return latents.shape[1] if latents.ndim == 4 else 1  # of AnimateDiff

    @property
    def window_multiple(self) -> int:
        return int(2 ** (len(self.denoiser.config.block_out_channels) - 1))

    def window_arguments(
        self, arguments: Mapping[str, Any], rows: slice, columns: slice
    ) -> dict[str, Any] | None:
        attention = arguments.get("cross_attention_kwargs") or {}
        if "ip_adapter_masks" in attention or any(
            arguments.get(name) is not None for name in _OF_WHOLE_PICTURES
        ):
            return None
        latents = arguments[self.latents_argument][..., rows, columns]
        return {**arguments, self.latents_argument: latents}

    def original_names(self) -> dict[str, tuple[RowRange, ...]]:
        unet = uncompiled(self.denoiser)
        # `input_blocks` and `output_blocks` are numbered consecutively; each has up to three parts:
        # a residual block, an attention, and a down- or upsampler.
        blocks = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
        blocks |= {f"time_embedding.linear_{n + 1}": f"time_embed.{2 * n}" for n in range(2)}
        blocks |= {f"add_embedding.linear_{n + 1}": f"label_emb.0.{2 * n}" for n in range(2)}
        for kind, part in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
            blocks[f"mid_block.{kind}"] = f"middle_block.{part}"
        count = 1
        for number, down in enumerate(unet.down_blocks):
            for layer in range(len(down.resnets)):
                for kind, part in (("resnets", 0), ("attentions", 1)):
                    name = f"down_blocks.{number}.{kind}.{layer}"
                    blocks[name] = f"input_blocks.{count}.{part}"
                count += 1
            if down.downsamplers is not None:
                blocks[f"down_blocks.{number}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
                count += 1
        count = 0
        for number, up in enumerate(unet.up_blocks):
            for layer in range(len(up.resnets)):
                for kind, part in (("resnets", 0), ("attentions", 1)):
                    name = f"up_blocks.{number}.{kind}.{layer}"
                    blocks[name] = f"output_blocks.{count}.{part}"
                count += 1
            if up.upsamplers is not None:
                part = 2 if hasattr(up, "attentions") else 1
                name = f"up_blocks.{number}.upsamplers.0.conv"
                blocks[name] = f"output_blocks.{count - 1}.{part}.conv"
        names: dict[str, tuple[RowRange, ...]] = {}
        for module, (out, _) in self.layers(self.denoiser_key).items():
            # The longest known prefix: a block (three names) or a single layer.
            head = next((h for h in _prefixes(module) if h in blocks), None)
            if head is not None:
                suffix = module[len(head) :].lstrip(".")
                suffix = _ORIGINAL_RESNET.get(suffix, suffix)
                name = f"{blocks[head]}.{suffix}" if suffix else blocks[head]
                names[name] = (RowRange(module, 0, out),)
        return names

    def denoiser_activations(self) -> int:
        # At the first resolution, where skip connections are largest; twice for guidance.
        return 28 * 2 * self._latent_side**2 * self.denoiser.config.block_out_channels[0]


def _prefixes(module: str) -> list[str]:
    """Return the module's name and its ancestors' names, the longest first."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def is_unet(unet: Any, addition_embed_type: str | None) -> bool:
    """Whether a UNet takes a prompt and these additional embeddings, and no other conditions.

    Args:
        unet: A component.
        addition_embed_type: Value of the UNet's configuration; None: no additional embeddings.
    """
    if class_name(unet) not in ("UNet2DConditionModel", MOTION_UNET):
        return False
    config = unet.config
    return (
        isinstance(config.cross_attention_dim, int)
        and config.addition_embed_type == addition_embed_type
        # Excludes models with other conditions: DeepFloyd, Kandinsky, Kolors, unCLIP, upscalers. A
        # loaded IP-Adapter sets encoder_hid_dim_type but is compatible.
        and config.encoder_hid_dim_type in (None, "ip_image_proj")
        and config.get("class_embed_type") is None
        and config.get("num_class_embeds") is None
    )
