"""What the families with a UNet have in common."""

from __future__ import annotations

import math
import re
from typing import Any

from customize.families.components import class_name, uncompiled
from customize.families.diffusion import DiffusionFamily

#: A UNet with AnimateDiff's motion modules between its layers, and a frame axis.
MOTION_UNET = "UNetMotionModel"


class UNetFamily(DiffusionFamily):
    """UNet2DConditionModel, AutoencoderKL, any scheduler of the DDPM kind."""

    denoiser_key = "unet"
    # Not those of AnimateDiff's motion modules, which lie beside the attentions.
    attention_projections = re.compile(
        r".+\.attentions\.\d+\..+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
    )

    @property
    def latent_multiple(self) -> int:
        # The pipelines ask for multiples of 8 whatever the autoencoder's factor.
        return math.lcm(8, self._vae_factor)

    def cross_attention_layers(self) -> list[str]:
        # named_modules follows registration, where the middle block comes last.
        order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
        names = [
            name
            for name, module in uncompiled(self.denoiser).named_modules()
            if name.endswith((".attn1", ".attn2")) and module.is_cross_attention
        ]
        return sorted(names, key=lambda name: order[name.split(".")[0]])


def is_unet(unet: Any, addition_embed_type: str | None) -> bool:
    """Whether it is a UNet that reads a prompt and these additional embeddings, and no more."""
    if class_name(unet) not in ("UNet2DConditionModel", MOTION_UNET):
        return False
    config = unet.config
    return (
        isinstance(config.cross_attention_dim, int)
        and config.addition_embed_type == addition_embed_type
        # Other inputs than a prompt: DeepFloyd, Kandinsky, Kolors, unCLIP, upscalers. A loaded
        # IP-Adapter also sets encoder_hid_dim_type, and changes nothing else.
        and config.encoder_hid_dim_type in (None, "ip_image_proj")
        and config.get("class_embed_type") is None
        and config.get("num_class_embeds") is None
    )
