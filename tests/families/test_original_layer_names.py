"""Original layer names compared with diffusers' converters of checkpoints."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as converters

from customize.concepts.formats.layer_names import LayerNameMap
from customize.families import FAMILIES, Family, published_families

#: Families whose checkpoints have names of their own.
NAMED = ("sd", "sdxl", "sd3", "flux", "flux2", "wan", "z_image")


def published(name: str) -> list[Family]:
    """The published sizes of a family, which take seconds to make."""
    return [family for family in published_families() if family.name == name]


def checkpoint(family: Family) -> dict[str, torch.Tensor]:
    """Return original layers with weights whose rows contain their indices."""
    tensors = {}
    for original, rows in family.original_names().items():
        if "processor" in original:
            continue
        count = sum(span.stop - span.start for span in rows)
        tensors[f"{original}.weight"] = torch.arange(count)[:, None].float()
        tensors[f"{original}.bias"] = torch.zeros(count)
    return tensors


def converted(family: Family, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if family.name == "flux":
        for name in [name for name in tensors if name.endswith("_attn.qkv.weight")]:
            block = name.removesuffix(".qkv.weight")
            tensors |= {f"{block}.norm.{x}_norm.scale": torch.ones(1) for x in ("query", "key")}
        for name in [name for name in tensors if name.endswith(".linear1.weight")]:
            block = name.removesuffix(".linear1.weight")
            tensors |= {f"{block}.norm.{x}_norm.scale": torch.ones(1) for x in ("query", "key")}
        return converters.convert_flux_transformer_checkpoint_to_diffusers(tensors)
    if family.name == "sd3":
        tensors["pos_embed"] = torch.zeros(1)
        # The converter detects the model's size by this weight.
        return converters.convert_sd3_transformer_checkpoint_to_diffusers(tensors)
    if family.name == "flux2":
        return converters.convert_flux2_transformer_checkpoint_to_diffusers(tensors)
    if family.name == "wan":
        return converters.convert_wan_transformer_to_diffusers(tensors)
    if family.name == "z_image":
        return converters.convert_z_image_transformer_checkpoint_to_diffusers(tensors)
    config = dict(family.denoiser.config)
    return converters.convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{key}": value for key, value in _with_norms(tensors).items()},
        config,
    )


def _with_norms(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors["out.0.weight"] = tensors["out.0.bias"] = torch.zeros(1)
    return tensors


def test_families_with_original_names() -> None:
    assert {family.name for family in published_families()} == FAMILIES.keys()
    for family in published_families():
        assert bool(family.original_names()) == (family.name in NAMED), family.name


@pytest.mark.parametrize("name", NAMED)
def test_row_ranges_match_diffusers_conversion(name: str) -> None:
    for family in published(name):
        assert_row_ranges_match(family)


def assert_row_ranges_match(family: Family) -> None:
    tensors = converted(family, checkpoint(family))
    checked = 0
    for original, rows in family.original_names().items():
        if "processor" in original:
            continue
        first = 0
        for span in rows:
            count = span.stop - span.start
            weight = tensors[f"{span.module}.weight"][span.start : span.stop, 0]
            assert torch.equal(weight, torch.arange(first, first + count).float()), original
            first += count
            checked += 1
    layers = family.layers(family.denoiser_key)
    named = {span.module for rows in family.original_names().values() for span in rows}
    # Layers without an original name have the same name in both.
    assert all(f"{layer}.weight" not in tensors or layer in named for layer in layers)
    assert checked >= len(named)


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_names_with_underscores_are_unambiguous(name: str) -> None:
    """Names with underscores instead of dots could collide."""
    for family in published(name):
        assert_names_are_unambiguous(family)


def assert_names_are_unambiguous(family: Family) -> None:
    for component in (family.denoiser_key, *family.text_encoders):
        layers = [*family.layers(component)]
        flat = Counter(layer.replace(".", "_") for layer in layers)
        assert max(flat.values()) == 1
        if component == family.denoiser_key:
            originals = Counter(name.replace(".", "_") for name in family.original_names())
            assert not originals or max(originals.values()) == 1
            known = LayerNameMap(family)
            for layer in layers:
                for path in (f"lora_unet_{layer.replace('.', '_')}", f"diffusion_model.{layer}"):
                    resolved = known.resolve(path)
                    assert resolved is not None and resolved.rows[0].module == layer
