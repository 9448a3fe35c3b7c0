"""The adapter of a denoiser to reference tokens: decoupled cross-attention and LoRA.

Each cross-attention layer gets keys and values of the reference tokens beside those of the text
(IP-Adapter, arXiv 2308.06721, section 3.2; EasyRef, arXiv 2412.09618, section 3.4):

    out = W_o (Attn(Q, K_text, V_text) + scale * Attn(Q, W_k' tokens, W_v' tokens))

where W_k' and W_v' start as the layer's own text projections. With a rank, the projections of all
attention layers get a LoRA as well. Its parameters have the denoiser's module names, so an adapter
fits every denoiser with these modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from customize.concepts.base_weight import dense_weight
from customize.errors import ConfigError


@dataclass(frozen=True)
class AttentionLayers:
    """The attention layers of a denoiser.

    Attributes:
        attentions: Name of each module that reads reference tokens -> width of its keys and values.
        projections: Name of each linear layer that takes a LoRA -> (out, in).
    """

    attentions: Mapping[str, int]
    projections: Mapping[str, tuple[int, int]]


class LowRankUpdate(nn.Module):
    """``factor * B(A(x))``, where B starts at zero: (..., in) -> (..., out)."""

    def __init__(self, out: int, width: int, rank: int, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.lora_A = nn.Linear(width, rank, bias=False)
        self.lora_B = nn.Linear(rank, out, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of a layer's output in the weights' dtype, or autocast's."""
        return self.factor * self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype)))


class ReferenceAdapter(nn.Module):
    """Projections of reference tokens for each attention layer, and LoRAs.

    The keys of the state dict are ``<attention>.to_k_ref.weight``, ``<attention>.to_v_ref.weight``,
    ``<projection>.lora_A.weight`` and ``<projection>.lora_B.weight``.

    Args:
        layers: The attention layers of the denoiser.
        width: Width of the reference tokens.
        rank: Rank of the LoRAs; 0 for none.
        alpha: Their alpha; their factor is ``alpha / rank``.
    """

    def __init__(
        self, layers: AttentionLayers, width: int, rank: int = 0, alpha: float = 1.0
    ) -> None:
        super().__init__()
        if not layers.attentions:
            raise ConfigError("the denoiser has no attention layer that reads reference tokens")
        self.layers, self.width, self.rank = layers, width, rank
        for name, out in layers.attentions.items():
            _add_submodule(self, f"{name}.to_k_ref", nn.Linear(width, out, bias=False))
            _add_submodule(self, f"{name}.to_v_ref", nn.Linear(width, out, bias=False))
        if rank:
            for name, (out, width_in) in layers.projections.items():
                _add_submodule(self, name, LowRankUpdate(out, width_in, rank, alpha / rank))

    def key(self, attention: str) -> Any:
        """Return the projection of reference tokens to keys of an attention layer."""
        return self.get_submodule(f"{attention}.to_k_ref")

    def value(self, attention: str) -> Any:
        """Return the projection of reference tokens to values of an attention layer."""
        return self.get_submodule(f"{attention}.to_v_ref")

    def updates(self) -> dict[str, nn.Module]:
        """Return the LoRA of each projection, by its name; empty without LoRAs."""
        names = self.layers.projections if self.rank else ()
        return {name: self.get_submodule(name) for name in names}

    @torch.no_grad()
    def copy_text_projections(self, denoiser: nn.Module) -> None:
        """Start keys and values of the tokens as those of the text, in layers where shapes agree.

        In other layers values start at zero. In joint attention the text has projections apart.

        Args:
            denoiser: The denoiser, uncompiled; quantized weights are dequantized.

        Raises:
            PipelineError: A quantized weight cannot be read.
        """
        for name in self.layers.attentions:
            attention: Any = denoiser.get_submodule(name)
            reads_text = getattr(attention, "is_cross_attention", False)
            text = ("to_k", "to_v") if reads_text else ("add_k_proj", "add_v_proj")
            fits = True
            for projection, own in zip(text, (self.key(name), self.value(name)), strict=True):
                layer = getattr(attention, projection, None)
                weight = None if layer is None else dense_weight(layer, f"{name}.{projection}")
                fits = weight is not None and weight.shape == own.weight.shape
                if weight is not None and fits:
                    own.weight.copy_(weight)
            if not fits:
                nn.init.zeros_(self.value(name).weight)


def _add_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module under a dotted name, creating the modules between."""
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    root.add_module(last, module)
