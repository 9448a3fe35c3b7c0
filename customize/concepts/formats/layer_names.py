"""Which layers of a model the names in a file mean.

Nearly all is derived from the model's own modules: kohya's names are module names with dots turned
to underscores, old diffusers' go over the attention's processor, and the originals' are told by the
family. A name that means nothing here is reported, never dropped.
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

# In the order of trying; a bare name is the denoiser's.
_OF_DENOISER = ("diffusion_model.", "model.diffusion_model.", "base_model.model.", "lycoris_", "")
_FLAT_DENOISER = (
    *("lora_unet_", "lora_transformer_", "lycoris_unet_", "lycoris_"),
    "oft_unet_",  # of sd-scripts' OFT
)
_CLIP_NAMES = ("clip_l", "clip_g")
_OLD_LEAVES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclass(frozen=True)
class LayerTarget:
    """Where an update goes.

    Attributes:
        component: "unet", "transformer", "text_encoder", ...
        rows: whose rows the update's are, one below the other; mostly all those of one layer.
        is_norm: whether it is a norm, which takes changes of its weight and bias alone.
    """

    component: str
    rows: tuple[RowRange, ...]
    is_norm: bool = False


class LayerNameMap:
    """The names by which files may call a model's layers, for many files: making it takes a walk
    over all modules.

    Attributes:
        layers: component -> what :meth:`Family.layers` says of it.
        norms: component -> its modules with a weight vector -> their widths.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.layers = {component: family.layers(component) for component in family.adaptable}
        self.norms = {component: norm_widths(family, component) for component in family.adaptable}
        self.labels = DenoiserLabels(family)
        self._targets: dict[str, LayerTarget] = {}
        for component, layers in self.layers.items():
            if component in family.other_denoisers:  # they have the first one's names
                continue
            spelled = dict(_layer_aliases(family, component, layers))
            for name, place in _norm_aliases(family, component, self.norms[component]):
                spelled.setdefault(name, place)
            flat = {name.replace(".", "_"): place for name, place in spelled.items()}
            for prefix in _dotted_prefixes(family, component):
                self._add(prefix, spelled)
            for prefix in _flat_prefixes(family, component):
                self._add(prefix, flat)

    def resolve_group(self, group: TensorGroup) -> LayerTarget | None:
        """The place of a group's changes, or None: matrices have none in a norm."""
        place = self.resolve(group.path)
        return (
            None if place is not None and place.is_norm and not has_only_vectors(group) else place
        )

    def resolve(self, path: str) -> LayerTarget | None:
        """The place of what a file calls by this name, or None."""
        place = self._targets.get(path)
        if place is not None:
            return place
        label = self.labels.split(path)
        place = self._targets.get(label[1]) if label else None
        if label is None or place is None or place.component != self.family.denoiser_key:
            return None
        return self.move_to(place, label[0])

    def move_to(self, place: LayerTarget, component: str) -> LayerTarget | None:
        """The place of the same name in another denoiser, or None where that lacks the layer."""
        known = self.layers.get(component, {}).keys() | self.norms.get(component, {}).keys()
        if any(each.module not in known for each in place.rows):
            return None
        return replace(place, component=component)

    def _add(self, prefix: str, names: dict[str, LayerTarget]) -> None:
        for name, place in names.items():
            self._targets.setdefault(prefix + name, place)


def _norm_aliases(
    family: Family, component: str, norms: Mapping[str, int]
) -> Iterator[tuple[str, LayerTarget]]:
    def place(module: str) -> LayerTarget:
        return LayerTarget(component, (RowRange(module, 0, norms[module]),), is_norm=True)

    for module in norms:
        # CLIP's last norm lies outside of its encoder, to which file_name adds the prefix.
        prefixed = [f"text_model.{module}"] if component != family.denoiser_key else []
        for name in dict.fromkeys((module, saved_module_name(component, module), *prefixed)):
            yield name, place(module)
    for original, module in original_norm_names(family, component, norms):
        yield original, place(module)


def match_text_encoder(path: str) -> str | None:
    """What text encoder a name is about, in words; None where it is about none."""
    for pattern, what in (
        (r"lora_te3_|text_encoder_3\.|text_encoders\.t5xxl\.|t5xxl\.", "T5"),
        (r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.|clip_g\.", "second text encoder"),
        (r"lora_te1?_|text_encoder\.|text_encoders\.clip_l\.|clip_l\.", "text encoder"),
    ):
        if re.match(pattern, path):
            return what
    return None


def _layer_aliases(
    family: Family, component: str, layers: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, LayerTarget]]:
    for module, (out, _) in layers.items():
        place = LayerTarget(component, (RowRange(module, 0, out),))
        for name in dict.fromkeys((module, saved_module_name(component, module))):
            yield name, place
            old = _attention_processor_name(name)
            if old is not None:
                yield old, place
    if component == family.denoiser_key:
        for original, rows in family.original_names().items():
            yield original, LayerTarget(component, rows)


def _attention_processor_name(name: str) -> str | None:
    """The name in files of the time when attention processors held the LoRA."""
    parent, _, leaf = name.removesuffix(".0").rpartition(".")
    if parent.endswith(".self_attn"):  # CLIP's, whose processor is not named
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
