"""Resolving the layer names of adapter files in a model.

Most names are derived from the model's modules: kohya's names have underscores for the dots of
module names, old names of diffusers go through the attention processor, and the family provides the
names of the original code. Unknown names are reported, never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from customize.concepts.adapter import saved_module_name
from customize.concepts.formats.bias_and_norm_updates import (
    has_only_vectors,
    norm_widths,
    original_norm_names,
)
from customize.concepts.formats.denoiser_labels import DenoiserLabels
from customize.concepts.formats.tensor_group import TensorGroup
from customize.families.family import Family
from customize.families.original_layer_names import RowRange

# In order of precedence; a name without a prefix is the denoiser's.
_OF_DENOISER = ("diffusion_model.", "model.diffusion_model.", "base_model.model.", "lycoris_", "")
_FLAT_DENOISER = (
    *("lora_unet_", "lora_transformer_", "lycoris_unet_", "lycoris_"),
    "oft_unet_",  # of sd-scripts' OFT
)
_CLIP_NAMES = ("clip_l", "clip_g")
_OLD_LEAVES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclass(frozen=True)
class LayerTarget:
    """The rows of a model's layers that an update changes.

    Attributes:
        component: "unet", "transformer", "text_encoder", ...
        rows: Row ranges of modules, in the order of the update's rows; mostly one whole layer.
        is_norm: Whether it is a norm, whose weight and bias are vectors.
    """

    component: str
    rows: tuple[RowRange, ...]
    is_norm: bool = False


class LayerNameMap:
    """All names that files may use for a model's layers; shared among files, as it is costly.

    Attributes:
        family: The model.
        layers: Component -> result of :meth:`Family.layers`.
        norms: Component -> module whose weight is a vector -> width.
        labels: The denoiser names in keys.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.layers = {component: family.layers(component) for component in family.adaptable}
        self.norms = {component: norm_widths(family, component) for component in family.adaptable}
        self.labels = DenoiserLabels(family)
        self._targets: dict[str, LayerTarget] = {}
        for component, layers in self.layers.items():
            if component in family.other_denoisers:  # they share the names of the first
                continue
            aliases = dict(_layer_aliases(family, component, layers))
            for name, target in _norm_aliases(family, component, self.norms[component]):
                aliases.setdefault(name, target)
            flat = {name.replace(".", "_"): target for name, target in aliases.items()}
            for prefix in _dotted_prefixes(family, component):
                self._add(prefix, aliases)
            for prefix in _flat_prefixes(family, component):
                self._add(prefix, flat)

    def resolve_group(self, group: TensorGroup) -> LayerTarget | None:
        """Resolve a layer; None if there is none, or if a matrix would update a norm."""
        target = self.resolve(group.path)
        return (
            None
            if target is not None and target.is_norm and not has_only_vectors(group)
            else target
        )

    def resolve(self, path: str) -> LayerTarget | None:
        """Resolve a name; None if it is unknown."""
        target = self._targets.get(path)
        if target is not None:
            return target
        label = self.labels.split(path)
        target = self._targets.get(label[1]) if label else None
        if label is None or target is None or target.component != self.family.denoiser_key:
            return None
        return self.move_to(target, label[0])

    def move_to(self, target: LayerTarget, component: str) -> LayerTarget | None:
        """The same target in another denoiser; None if that does not have the layer."""
        modules = self.layers.get(component, {}).keys() | self.norms.get(component, {}).keys()
        if any(rows.module not in modules for rows in target.rows):
            return None
        return replace(target, component=component)

    def _add(self, prefix: str, names: dict[str, LayerTarget]) -> None:
        for name, target in names.items():
            self._targets.setdefault(prefix + name, target)


def _norm_aliases(
    family: Family, component: str, norms: Mapping[str, int]
) -> Iterator[tuple[str, LayerTarget]]:
    def norm_target(module: str) -> LayerTarget:
        return LayerTarget(component, (RowRange(module, 0, norms[module]),), is_norm=True)

    for module in norms:
        # CLIP's last norm is outside of its encoder, to which saved_module_name adds the prefix.
        prefixed = [f"text_model.{module}"] if component != family.denoiser_key else []
        for name in dict.fromkeys((module, saved_module_name(component, module), *prefixed)):
            yield name, norm_target(module)
    for original, module in original_norm_names(family, component, norms):
        yield original, norm_target(module)


def match_text_encoder(path: str) -> str | None:
    """Match the text encoder that a name belongs to: "text encoder", "T5", ...; None for none."""
    for pattern, encoder in (
        (r"lora_te3_|text_encoder_3\.|text_encoders\.t5xxl\.|t5xxl\.", "T5"),
        (r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.|clip_g\.", "second text encoder"),
        (r"lora_te1?_|text_encoder\.|text_encoders\.clip_l\.|clip_l\.", "text encoder"),
    ):
        if re.match(pattern, path):
            return encoder
    return None


def _layer_aliases(
    family: Family, component: str, layers: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, LayerTarget]]:
    for module, (out, _) in layers.items():
        target = LayerTarget(component, (RowRange(module, 0, out),))
        for name in dict.fromkeys((module, saved_module_name(component, module))):
            yield name, target
            old_name = _attention_processor_name(name)
            if old_name is not None:
                yield old_name, target
    if component == family.denoiser_key:
        for original, rows in family.original_names().items():
            yield original, LayerTarget(component, rows)


def _attention_processor_name(name: str) -> str | None:
    """The name in old files, from when attention processors contained the LoRA; or None."""
    parent, _, leaf = name.removesuffix(".0").rpartition(".")
    if parent.endswith(".self_attn"):  # CLIP's attention has no named processor
        return f"{parent}.{_OLD_LEAVES[leaf]}" if leaf in _OLD_LEAVES else None
    if re.search(r"\.attn\d?$", parent):
        return f"{parent}.processor.{leaf}"
    return None


def _dotted_prefixes(family: Family, component: str) -> list[str]:
    if component == family.denoiser_key:
        return [f"{component}.", *_OF_DENOISER]
    clip = _CLIP_NAMES[list(family.clip_encoders).index(component)]
    return [f"{component}.", f"text_encoders.{clip}.transformer.", f"{clip}.transformer."]


def _flat_prefixes(family: Family, component: str) -> list[str]:
    if component == family.denoiser_key:
        return list(_FLAT_DENOISER)
    number = list(family.clip_encoders).index(component) + 1
    return [f"lora_te{number}_", *(["lora_te_"] if number == 1 else [])]
