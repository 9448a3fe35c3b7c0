"""The layout of EasyRef's released weights, and its names in this package.

The file (that of its training script; arXiv 2412.09618, commit d8638f4) has four parts, each with a
prefix:

    image_proj_model.   the projector
    mllm_final_layer.   last decoder layer, norm and reference tokens
    multimodal_llm.     the other decoder layers and the vision tower; absent after the first stage
    unet.               keys, values and LoRAs of the attention layers, by their processors

Beside them it may have the adapter a second time (``adapter_modules.``), the UNet's weights, which
were frozen, and the MLLM's language head. These are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from customize.errors import ConceptError
from customize.references.adapter import AttentionLayers
from customize.references.config import ReferencesConfig
from customize.text import quote

#: The instruction of all of EasyRef's training (``read_data`` of its ``finetune_sdxl.py``). The
#: weights know no other wording.
INSTRUCTION = (
    "Visualize a scene that closely resembles the provided images, capturing the essence and "
    "details described in this prompt:"
)
#: Fewest and most image tokens of a reference, as the release resizes it: (336 / 28 - 1)^2 and
#: (336 / 28)^2 + 1.
IMAGE_TOKENS = (121, 145)

_PARTS = ("image_proj_model.", "mllm_final_layer.", "unet.")
MLLM = "multimodal_llm."
_UNUSED = re.compile(r"adapter_modules\.|multimodal_llm\.lm_head\.|unet\.(?!.*\.processor\.)")
_ENCODER_KEYS = {
    "multimodal_llm.visual.": "mllm.visual.",
    "multimodal_llm.model.": "mllm.language_model.",
    "mllm_final_layer.layers.0.": "final_layer.layer.",
    "mllm_final_layer.norm.": "final_layer.norm.",
    "mllm_final_layer.reference_tokens": "final_layer.reference_tokens",
    "image_proj_model.proj.0.": "projector.linear_1.",
    "image_proj_model.proj.2.": "projector.linear_2.",
    "image_proj_model.proj.3.": "projector.norm.",
}
_ADAPTER_KEY = re.compile(
    r"unet\.(?P<attention>.+)\.processor\."
    r"(?:to_(?P<token>[kv])_ip|to_(?P<projection>q|k|v|out)_lora\.(?P<factor>down|up))\.weight"
)
_FACTORS = {"down": "lora_A", "up": "lora_B"}


@dataclass(frozen=True)
class EasyRefKeys:
    """Where the tensors of a file go.

    Attributes:
        encoder: Key of the file -> key of :class:`ReferenceEncoder`.
        adapter: Key of the file -> key of :class:`ReferenceAdapter`.
        unused: Keys that are not read.
    """

    encoder: Mapping[str, str]
    adapter: Mapping[str, str]
    unused: Sequence[str]

    @property
    def has_mllm(self) -> bool:
        """Whether the file has the MLLM's weights."""
        return any(name.startswith(MLLM) for name in self.encoder)


def sdxl_layers() -> AttentionLayers:
    """Return the attention layers of Stable Diffusion XL's UNet, which EasyRef adapts."""
    # Block -> width, attention modules, and transformer blocks of each.
    blocks = {
        "down_blocks.1": (640, 2, 2),
        "down_blocks.2": (1280, 2, 10),
        "up_blocks.0": (1280, 3, 10),
        "up_blocks.1": (640, 3, 2),
        "mid_block": (1280, 1, 10),
    }
    attentions: dict[str, int] = {}
    projections: dict[str, tuple[int, int]] = {}
    for block, (width, modules, depth) in blocks.items():
        for module in range(modules):
            for number in range(depth):
                path = f"{block}.attentions.{module}.transformer_blocks.{number}"
                attentions[f"{path}.attn2"] = width
                for attention, text in (("attn1", width), ("attn2", 2048)):
                    for name, width_in in zip(
                        ("to_q", "to_k", "to_v", "to_out.0"),
                        (width, text, text, width),
                        strict=True,
                    ):
                        projections[f"{path}.{attention}.{name}"] = (width, width_in)
    return AttentionLayers(attentions, projections)


def map_keys(names: Iterable[str], where: object = None) -> EasyRefKeys:
    """Return where the tensors of a file go.

    Args:
        names: The keys of the file.
        where: The file, for messages.

    Raises:
        ConceptError: A part is missing, or a key belongs to no part.
    """
    encoder: dict[str, str] = {}
    adapter: dict[str, str] = {}
    unused: list[str] = []
    unknown: list[str] = []
    for name in names:
        prefix = next((prefix for prefix in _ENCODER_KEYS if name.startswith(prefix)), None)
        if prefix is not None:
            encoder[name] = _ENCODER_KEYS[prefix] + name[len(prefix) :]
        elif match := _ADAPTER_KEY.fullmatch(name):
            adapter[name] = _adapter_key(match)
        else:
            (unused if _UNUSED.match(name) else unknown).append(name)
    if unknown:
        raise ConceptError(
            f"{len(unknown)} tensors belong to no part of EasyRef's layout: {list_names(unknown)}",
            where=where,
            fix=f"keep only the tensors of {', '.join((*_PARTS, MLLM))}, with these prefixes",
        )
    read = [*encoder, *adapter]
    missing = [part for part in _PARTS if not any(name.startswith(part) for name in read)]
    if missing:
        raise ConceptError(
            f"the file has no tensors of {' and '.join(missing)}",
            where=where,
            fix="get the complete weights; those of adapter_modules. alone are not enough",
        )
    return EasyRefKeys(encoder, adapter, unused)


def make_config(shapes: Mapping[str, Sequence[int]], keys: EasyRefKeys) -> ReferencesConfig:
    """Return the configuration of the weights: the release's, with the file's sizes."""
    tokens = _size(shapes, "mllm_final_layer.reference_tokens", 0)
    width = _size(shapes, "image_proj_model.proj.2.weight", 0)
    downs = [name for name, own in keys.adapter.items() if own.endswith(".lora_A.weight")]
    rank = _size(shapes, downs[0], 0) if downs else 0
    return ReferencesConfig(
        family="sdxl",
        width=width,
        num_tokens=tokens,
        attention="causal",
        positions="running",
        normalize_twice=True,
        instruction=INSTRUCTION,
        includes_prompt=True,
        lora_rank=rank,
        lora_alpha=float(rank or 1),
        attributes=(),
    )


def _size(shapes: Mapping[str, Sequence[int]], name: str, axis: int) -> int:
    """Return a size of a tensor; 1, which no check of shapes accepts, if it is missing."""
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) == 2 else 1


def check_shapes(
    shapes: Mapping[str, Sequence[int]],
    keys: Mapping[str, str],
    expected: Mapping[str, Sequence[int]],
    path: object,
    fix: str,
) -> None:
    """Check that a file has all tensors of a module and no others, with their shapes.

    Args:
        shapes: Key of the file -> shape.
        keys: Key of the file -> key of the module.
        expected: Key of the module -> shape.
        path: The file.
        fix: What to do about a tensor that does not fit.
    """
    problems = {
        "lacks": sorted(set(expected) - set(keys.values())),
        "has unknown": sorted(name for name, own in keys.items() if own not in expected),
    }
    for verb, names in problems.items():
        if names:
            raise ConceptError(
                f"the file {verb} {len(names)} tensors: {list_names(names)}", where=path, fix=fix
            )
    for name, own in keys.items():
        if list(shapes[name]) != list(expected[own]):
            raise ConceptError(
                f"{quote(name)} is {list(shapes[name])}, and {list(expected[own])} is expected",
                where=path,
                fix=fix,
            )


def _adapter_key(match: re.Match[str]) -> str:
    attention, token = match["attention"], match["token"]
    if token is not None:
        return f"{attention}.to_{token}_ref.weight"
    projection = "to_out.0" if match["projection"] == "out" else f"to_{match['projection']}"
    return f"{attention}.{projection}.{_FACTORS[match['factor']]}.weight"


def list_names(names: Sequence[str]) -> str:
    """Return the first names, for a message."""
    return ", ".join(map(quote, names[:3])) + (", ..." if len(names) > 3 else "")
