"""The layout of EasyRef's released weights, from its description, and what the weights compute.

Written without the package's encoder and adapter, to compare them with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

Shapes = dict[str, list[int]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of an MLLM; by default Qwen2-VL-2B's."""

    hidden: int = 1536
    intermediate: int = 8960
    layers: int = 28
    heads: int = 12
    kv_heads: int = 2
    vocabulary: int = 151936
    vision_width: int = 1280
    vision_layers: int = 32
    vision_mlp: int = 5120
    patch: tuple[int, ...] = (3, 2, 14, 14)
    theta: float = 1e6


def decoder_layer(sizes: Sizes) -> Shapes:
    """Shapes of one decoder layer."""
    hidden, inner = sizes.hidden, sizes.intermediate
    kv = hidden // sizes.heads * sizes.kv_heads
    return {
        "self_attn.q_proj.weight": [hidden, hidden],
        "self_attn.q_proj.bias": [hidden],
        "self_attn.k_proj.weight": [kv, hidden],
        "self_attn.k_proj.bias": [kv],
        "self_attn.v_proj.weight": [kv, hidden],
        "self_attn.v_proj.bias": [kv],
        "self_attn.o_proj.weight": [hidden, hidden],
        "mlp.gate_proj.weight": [inner, hidden],
        "mlp.up_proj.weight": [inner, hidden],
        "mlp.down_proj.weight": [hidden, inner],
        "input_layernorm.weight": [hidden],
        "post_attention_layernorm.weight": [hidden],
    }


def mllm_part(sizes: Sizes) -> Shapes:
    """Shapes of ``multimodal_llm.``: the vision tower and all decoder layers except the last."""
    hidden, width, inner = sizes.hidden, sizes.vision_width, sizes.vision_mlp
    shapes = {
        "lm_head.weight": [sizes.vocabulary, hidden],
        "model.embed_tokens.weight": [sizes.vocabulary, hidden],
        "model.norm.weight": [hidden],
        "visual.patch_embed.proj.weight": [width, *sizes.patch],
    }
    for number in range(sizes.layers - 1):
        for name, shape in decoder_layer(sizes).items():
            shapes[f"model.layers.{number}.{name}"] = shape
    block = {"attn.qkv": [3 * width, width], "attn.proj": [width, width]}
    block |= {"mlp.fc1": [inner, width], "mlp.fc2": [width, inner], "norm1": [width]}
    linears = {
        f"blocks.{n}.{k}": v
        for n in range(sizes.vision_layers)
        for k, v in {**block, "norm2": [width]}.items()
    }
    linears |= {"merger.ln_q": [width], "merger.mlp.0": [4 * width, 4 * width]}
    linears["merger.mlp.2"] = [hidden, 4 * width]
    for name, shape in linears.items():
        shapes[f"visual.{name}.weight"] = shape
        shapes[f"visual.{name}.bias"] = shape[:1]
    return {f"multimodal_llm.{name}": shape for name, shape in shapes.items()}


def encoder_part(sizes: Sizes, tokens: int, width: int) -> Shapes:
    """Shapes of ``mllm_final_layer.`` and ``image_proj_model.``."""
    hidden = sizes.hidden
    final = {f"layers.0.{name}": shape for name, shape in decoder_layer(sizes).items()}
    final |= {"reference_tokens": [tokens, hidden], "norm.weight": [hidden]}
    projector = {"proj.0.weight": [hidden, hidden], "proj.0.bias": [hidden]}
    projector |= {"proj.2.weight": [width, hidden], "proj.2.bias": [width]}
    projector |= {"proj.3.weight": [width], "proj.3.bias": [width]}
    shapes = {f"mllm_final_layer.{name}": shape for name, shape in final.items()}
    return shapes | {f"image_proj_model.{name}": shape for name, shape in projector.items()}


def unet_part(processors: Mapping[str, int], width: int, rank: int) -> Shapes:
    """Shapes of the processors in ``unet.``.

    Args:
        processors: Names of the UNet's attention processors -> width of their attention.
        width: Width of the text and of the tokens.
        rank: Rank of the LoRAs; 0 for none.
    """
    shapes: Shapes = {}
    for name, own in processors.items():
        is_cross = name.endswith("attn2.processor")
        source = width if is_cross else own
        if is_cross:
            shapes[f"unet.{name}.to_k_ip.weight"] = [own, width]
            shapes[f"unet.{name}.to_v_ip.weight"] = [own, width]
        for projection, width_in in {"q": own, "k": source, "v": source, "out": own}.items():
            if rank:
                shapes[f"unet.{name}.to_{projection}_lora.down.weight"] = [rank, width_in]
                shapes[f"unet.{name}.to_{projection}_lora.up.weight"] = [own, rank]
    return shapes


def random_weights(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Random weights that keep the size of what they multiply; norms are near one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            is_norm = "norm" in name or "ln_q" in name or "proj.3" in name
            values = 0.2 * values + float(is_norm and name.endswith("weight"))
        elif "embed_tokens" not in name and "reference_tokens" not in name:
            values = values / math.sqrt(math.prod(shape[1:]))
        weights[name] = values
    return weights


def read_references(weights: Mapping[str, Tensor], sizes: Sizes, embeds: Tensor) -> Tensor:
    """Return the tokens (num_tokens, width) of one sequence of embeddings (length, hidden)."""
    states = embeds
    for number in range(sizes.layers - 1):
        states = _decode(_part(weights, f"multimodal_llm.model.layers.{number}."), sizes, states)
    states = _rms_norm(states, weights["multimodal_llm.model.norm.weight"])
    tokens = weights["mllm_final_layer.reference_tokens"]
    states = torch.cat([states, tokens])
    states = _decode(_part(weights, "mllm_final_layer.layers.0."), sizes, states)
    states = _rms_norm(states, weights["mllm_final_layer.norm.weight"])[-len(tokens) :]
    part = _part(weights, "image_proj_model.proj.")
    inner = gelu(states @ part["0.weight"].T + part["0.bias"])
    outer = inner @ part["2.weight"].T + part["2.bias"]
    return layer_norm(outer, outer.shape[-1:], part["3.weight"], part["3.bias"])


def attend(
    weights: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    heads: int,
    states: Tensor,
    text: Tensor,
    tokens: Tensor | None,
    scale: float,
    lora: float = 1.0,
) -> Tensor:
    """Return the output of one attention layer for one row.

    Args:
        weights: The weights of its processor.
        base: The layer's own weights.
        heads: Number of heads.
        states: (pixels, channels).
        text: (text tokens, width), or the states again for self-attention.
        tokens: (reference tokens, width); None for self-attention.
        scale: Scale of the references.
        lora: Scale of the LoRAs; 1 in the release.
    """

    def project(name: str, x: Tensor) -> Tensor:
        layer = "to_out.0" if name == "out" else f"to_{name}"
        down, up = (weights[f"to_{name}_lora.{part}.weight"] for part in ("down", "up"))
        bias = base.get(f"{layer}.bias", torch.zeros(()))
        return x @ base[f"{layer}.weight"].T + bias + lora * x @ down.T @ up.T

    query, key, value = project("q", states), project("k", text), project("v", text)
    output = _attention(query, key, value, heads)
    if tokens is not None:
        key, value = (tokens @ weights[f"to_{name}_ip.weight"].T for name in ("k", "v"))
        output = output + scale * _attention(query, key, value, heads)
    return project("out", output)


def _attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention of (length, channels), head by head."""
    outputs = []
    for q, k, v in zip(*(x.chunk(heads, -1) for x in (query, key, value)), strict=True):
        outputs.append((q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v)
    return torch.cat(outputs, -1)


def _decode(weights: Mapping[str, Tensor], sizes: Sizes, states: Tensor) -> Tensor:
    """One causal decoder layer on (length, hidden), whose positions are 0, 1, ..."""
    width = sizes.hidden // sizes.heads
    normed = _rms_norm(states, weights["input_layernorm.weight"])
    q, k, v = (
        normed @ weights[f"self_attn.{n}_proj.weight"].T + weights[f"self_attn.{n}_proj.bias"]
        for n in "qkv"
    )
    outputs = []
    for head in range(sizes.heads):
        shared = head // (sizes.heads // sizes.kv_heads)
        query = _rotate(q[:, head * width : (head + 1) * width], sizes.theta)
        key = _rotate(k[:, shared * width : (shared + 1) * width], sizes.theta)
        value = v[:, shared * width : (shared + 1) * width]
        scores = query @ key.T / math.sqrt(width)
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ value)
    states = states + torch.cat(outputs, -1) @ weights["self_attn.o_proj.weight"].T
    normed = _rms_norm(states, weights["post_attention_layernorm.weight"])
    gate = silu(normed @ weights["mlp.gate_proj.weight"].T)
    inner = gate * (normed @ weights["mlp.up_proj.weight"].T)
    return states + inner @ weights["mlp.down_proj.weight"].T


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of (length, width) by the index of each row."""
    half = x.shape[1] // 2
    frequencies = theta ** (-torch.arange(half) / half)
    angles = torch.arange(len(x))[:, None] * frequencies
    first, second = x[:, :half], x[:, half:]
    return torch.cat(
        [
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ],
        dim=1,
    )


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
