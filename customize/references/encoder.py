"""The encoder of a group of reference images (EasyRef, arXiv 2412.09618, section 3).

A multimodal LLM without its last decoder layer reads one chat turn of all images and an
instruction. Learned reference tokens are appended to its states, the last layer reads both, and a
projector makes the denoiser's condition of the reference tokens alone. So the denoiser's cost is
that of ``num_tokens`` keys, whatever the number of images.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from customize.errors import ConfigError
from customize.references.config import ReferencesConfig
from customize.references.encoder_inputs import EncoderInputs
from customize.references.projector import ReferenceProjector
from customize.text import quote

#: Types of MLLMs with this seam: a vision tower whose merged features replace embeddings.
#: "model_type" of a configuration -> names of the classes in transformers.
MLLMS = {
    "qwen2_vl": ("Qwen2VLConfig", "Qwen2VLModel"),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLModel"),
    "qwen3_vl": ("Qwen3VLConfig", "Qwen3VLModel"),
}
#: Images that the vision tower reads at once.
VISION_BATCH = 8


class FinalLayer(nn.Module):
    """The MLLM's last decoder layer and norm, with the learned reference tokens."""

    def __init__(self, layer: nn.Module, norm: nn.Module, num_tokens: int, hidden: int) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm
        self.reference_tokens = nn.Parameter(0.1 * torch.randn(num_tokens, hidden))

    def forward(
        self, states: Tensor, mask: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Read states and return the reference tokens.

        Args:
            states: (batch, length, hidden), without the reference tokens.
            mask: (batch, 1, length + num_tokens, length + num_tokens), added to the scores.
            position_embeddings: Cosines and sines of all positions, the tokens' behind the states'.

        Returns:
            (batch, num_tokens, hidden).
        """
        tokens = self.reference_tokens.to(states.dtype).expand(len(states), -1, -1)
        states = torch.cat([states, tokens], dim=1)
        states = self.layer(states, attention_mask=mask, position_embeddings=position_embeddings)
        return self.norm(states[:, -tokens.shape[1] :])


class ReferenceEncoder(nn.Module):
    """Groups of images -> reference tokens.

    Args:
        config: The number and width of tokens, attention and positions.
        mllm: A ``Qwen2VLModel``, ``Qwen2_5_VLModel`` or ``Qwen3VLModel`` with all its decoder
            layers. The last one is moved to :attr:`final_layer`.

    Attributes:
        vision_batch: Number of images that the vision tower reads at once.

    Raises:
        ConfigError: The MLLM is of another kind, or has too few decoder layers.
    """

    def __init__(self, config: ReferencesConfig, mllm: Any) -> None:
        super().__init__()
        self.config = config
        self.vision_batch = VISION_BATCH
        _check_mllm(mllm)
        decoder = mllm.language_model
        hidden = decoder.config.hidden_size
        layer, norm = decoder.layers[-1], copy.deepcopy(decoder.norm)
        del decoder.layers[-1]
        layer.self_attn.layer_idx = 0
        decoder.config.num_hidden_layers -= 1
        if layer_types := getattr(decoder.config, "layer_types", None):
            decoder.config.layer_types = layer_types[:-1]
        if not config.normalize_twice:
            decoder.norm = nn.Identity()
        self.mllm = mllm
        self.final_layer = FinalLayer(layer, norm, config.num_tokens, hidden)
        self.projector = ReferenceProjector(hidden, config.width)

    def forward(self, inputs: EncoderInputs, weights: Tensor | None = None) -> Tensor:
        """Encode groups.

        Args:
            inputs: A padded batch of groups, on the device of the encoder.
            weights: (batch, images), at least 0: weight of each image in the final layer's
                attention, where 1 changes nothing and 0 hides it; None: 1 for all. Columns beyond
                a group's images are not read.

        Returns:
            (batch, num_tokens, width), in the encoder's dtype. A group has the same tokens in a
            batch as alone, up to rounding.
        """
        return self.read_tokens(self.read_images(inputs), inputs, weights)

    def read_images(self, inputs: EncoderInputs) -> Tensor:
        """Return the states (batch, length, hidden) before the final layer."""
        decoder = self.mllm.language_model
        embeds = self.mllm.get_input_embeddings()(inputs.input_ids)
        features, deepstack = self._image_features(inputs)
        is_image = inputs.image_index >= 0
        embeds = embeds.masked_scatter(
            is_image[..., None].expand_as(embeds), features.to(embeds.dtype)
        )
        # Features that Qwen3-VL adds to the states of its first layers.
        added = {"visual_pos_masks": is_image, "deepstack_visual_embeds": deepstack}
        output = decoder(
            inputs_embeds=embeds,
            attention_mask=causal_mask(inputs, 0, "causal", embeds.dtype),
            position_ids=inputs.position_ids,
            use_cache=False,
            **(added if deepstack else {}),
        )
        states: Tensor = output.last_hidden_state
        return states

    def read_tokens(
        self, states: Tensor, inputs: EncoderInputs, weights: Tensor | None = None
    ) -> Tensor:
        """Return the tokens (batch, num_tokens, width) of states; see :meth:`forward`."""
        number = self.config.num_tokens
        mask = causal_mask(inputs, number, self.config.attention, states.dtype)
        if weights is not None:
            mask = mask + _image_bias(inputs, weights, number, states.dtype)
        following = inputs.next_position[:, None] + torch.arange(number, device=states.device)
        positions = torch.cat([inputs.position_ids, following.expand(3, -1, -1)], dim=2)
        rotary = self.mllm.language_model.rotary_emb(states, positions)
        tokens: Tensor = self.projector(self.final_layer(states, mask, rotary))
        return tokens

    def _image_features(self, inputs: EncoderInputs) -> tuple[Tensor, list[Tensor]]:
        """Return the features of all images, and those for each of the first decoder layers.

        All are (image tokens, hidden). MLLMs without DeepStack have none of the latter.
        """
        patches = inputs.image_grid_thw.prod(1).tolist()
        pixels = inputs.pixel_values.to(self.dtype).split(patches)
        outputs = []
        for first in range(0, len(pixels), self.vision_batch):
            batch = slice(first, first + self.vision_batch)
            outputs.append(self.mllm.visual(torch.cat(pixels[batch]), inputs.image_grid_thw[batch]))
        features = torch.cat([output.pooler_output for output in outputs])
        levels = [getattr(output, "deepstack_features", None) or [] for output in outputs]
        return features, [torch.cat(level) for level in zip(*levels, strict=True)]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the reference tokens and of what the encoder returns."""
        return self.final_layer.reference_tokens.dtype

    @property
    def device(self) -> torch.device:
        """Device of the reference tokens."""
        return self.final_layer.reference_tokens.device


def _check_mllm(mllm: Any) -> None:
    kind = mllm.config.model_type
    if kind not in MLLMS:
        raise ConfigError(
            f"an MLLM of the type {quote(kind)} cannot read references",
            where="mllm",
            fix=f"give one of the type {', '.join(MLLMS)}",
        )
    text, vision = mllm.config.text_config, mllm.config.vision_config
    # The final layer is no early layer, which the features of Qwen3-VL's vision tower are added to.
    needed = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    if text.num_hidden_layers < needed:
        raise ConfigError(
            f"the MLLM has {text.num_hidden_layers} decoder layers, and needs at least {needed}",
            where="mllm",
            fix="give an MLLM with more decoder layers",
        )
    if getattr(text, "use_sliding_window", False):
        raise ConfigError(
            "the MLLM uses sliding-window attention, which hides images from reference tokens",
            where="mllm",
            fix="set use_sliding_window to false in its configuration",
        )


def causal_mask(
    inputs: EncoderInputs, num_tokens: int, attention: str, dtype: torch.dtype
) -> Tensor:
    """Return the attention mask of padded groups, with reference tokens behind the padding.

    It is always explicit: without a mask, transformers' layers are causal or not depending on
    whether a batch is padded.

    Args:
        inputs: The groups.
        num_tokens: Number of reference tokens behind each row; 0 for none.
        attention: "causal" or "bidirectional", among the reference tokens.
        dtype: Dtype of the mask.

    Returns:
        (batch, 1, length + num_tokens, length + num_tokens), 0 for keys that are read and the
        lowest number of the dtype for others.
    """
    batch, length = inputs.input_ids.shape
    total = length + num_tokens
    device = inputs.input_ids.device
    index = torch.arange(total, device=device)
    is_key = (index < inputs.lengths[:, None]) | (index >= length)
    reads = index[:, None] >= index
    if attention == "bidirectional":
        reads = reads | (index[:, None] >= length)
    # A padding row reads itself, since a row that reads nothing is not a number.
    reads = (reads & is_key[:, None]) | torch.eye(total, dtype=torch.bool, device=device)
    mask = torch.zeros(batch, 1, total, total, dtype=dtype, device=device)
    return mask.masked_fill(~reads[:, None], torch.finfo(dtype).min)


def _image_bias(
    inputs: EncoderInputs, weights: Tensor, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    """Return log weights (batch, 1, 1, length + num_tokens) of the keys of each image."""
    log = weights.to(inputs.input_ids.device, torch.float32).log()
    log = log.clamp_min(torch.finfo(dtype).min / 2)
    index = inputs.image_index
    bias = torch.where(index >= 0, log.gather(1, index.clamp_min(0)), 0.0)
    return nn.functional.pad(bias, (0, num_tokens))[:, None, None].to(dtype)
