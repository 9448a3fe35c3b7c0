"""Stable Diffusion in one file, with the names of the original checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def write_single_file(pipe: Any, path: Path) -> Path:
    """Write UNet, autoencoder and text encoder as diffusers' ``from_single_file`` reads them."""
    tensors: dict[str, Tensor] = {}
    unet = pipe.unet
    layers = unet.config.layers_per_block + 1
    for key, value in unet.state_dict().items():
        tensors[f"model.diffusion_model.{_unet(key, layers, unet)}"] = value
    count = len(pipe.vae.config.block_out_channels)
    for key, value in pipe.vae.state_dict().items():
        name = _vae(key, count)
        flat = value.ndim == 2 and ".attn_1." in name
        tensors[f"first_stage_model.{name}"] = value[..., None, None] if flat else value
    for key, value in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{key}"] = value
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
    return path


def _unet(key: str, layers: int, unet: Any) -> str:
    for ours, theirs in _ENDS.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    if match := re.match(r"mid_block\.(attentions|resnets)\.(\d)\.(.*)", key):
        kind, number, suffix = match.groups()
        number_in_block = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{number_in_block}.{_part(kind, suffix)}"
    match = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key)
    assert match is not None, key
    side, block, kind, number, suffix = match.groups()
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{layers * (int(block) + 1)}.0.{suffix.replace('conv', 'op')}"
        number_in_block = layers * int(block) + int(number) + 1
        return f"input_blocks.{number_in_block}.{int(kind == 'attentions')}.{_part(kind, suffix)}"
    if kind == "upsamplers":
        second = 2 if hasattr(unet.up_blocks[int(block)], "attentions") else 1
        return f"output_blocks.{layers * (int(block) + 1) - 1}.{second}.{suffix}"
    number_in_block = layers * int(block) + int(number)
    return f"output_blocks.{number_in_block}.{int(kind == 'attentions')}.{_part(kind, suffix)}"


def _part(kind: str, suffix: str) -> str:
    if kind == "attentions":
        return suffix
    name, _, leaf = suffix.rpartition(".")
    return f"{_RESNET[name]}.{leaf}"


def _vae(key: str, count: int) -> str:
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(
        r"up_blocks\.(\d)\.(resnets\.|upsamplers\.0)",
        lambda m: f"up.{count - 1 - int(m[1])}." + ("block." if "res" in m[2] else "upsample"),
        key,
    )
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0" in key:
        key = key.replace("mid_block.attentions.0", "mid.attn_1")
        for ours, theirs in _VAE_ATTENTION.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
    return key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
