"""Registering a format of updates is enough to support it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from customize.concepts.formats import decoders
from customize.concepts.formats.decoders import FORMATS, UpdateFormat
from customize.concepts.formats.decoders.update_format import LayerTensors
from customize.concepts.formats.open_adaptation import open_adaptation
from customize.core.lowrank import LowRank, from_dense, to_dense
from customize.errors import ConceptError
from customize.families import family_of
from tests.concepts.formats.adapter_files import write_file
from tests.tiny import tiny_sd

MODULE = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def decode_gain(layer: LayerTensors) -> LowRank:
    """``dW = gain * W``, with a gain for each row."""
    layer.check_parts({"row_gain"})
    return from_dense(layer.parts["row_gain"][:, None] * layer.weight())


GAIN = UpdateFormat(
    name="row gain",
    key_suffixes={"row_gain": (".row_gain", ".row_gain.*")},
    matches=lambda parts: "row_gain" in parts,
    decode=decode_gain,
    vector_parts=frozenset({"row_gain"}),
    needs_base_weight=True,
)


def test_registered_format_needs_no_other_change(tmp_path: Path, monkeypatch) -> None:
    pipe = tiny_sd()
    family = family_of(pipe.components)
    weight = pipe.unet.get_submodule(MODULE).weight.detach()
    gain = torch.linspace(-1, 1, len(weight))
    path = write_file(tmp_path / "gain.safetensors", {f"unet.{MODULE}.row_gain.default": gain})
    with pytest.raises(ConceptError, match="1 of 1 keys are not supported"):
        open_adaptation(path)

    monkeypatch.setattr(decoders, "FORMATS", (*FORMATS, GAIN))
    file = open_adaptation(path)
    assert file.needs_base_weights  # type: ignore[union-attr]
    lora = file.to_lora(family, lambda component, module: weight)  # type: ignore[union-attr]
    update = to_dense(lora.updates["unet"][MODULE])
    torch.testing.assert_close(update, gain[:, None] * weight)
    pipe.load_custom(path)
    assert "gain" in repr(pipe.custom)

    surplus = {f"unet.{MODULE}.row_gain": gain, f"unet.{MODULE}.lora_A.weight": torch.ones(1, 2)}
    file = open_adaptation(write_file(tmp_path / "surplus.safetensors", surplus))
    with pytest.raises(ConceptError, match="down-projection"):
        file.to_lora(family, lambda component, module: weight)  # type: ignore[union-attr]


def test_no_two_formats_share_a_part_or_suffix() -> None:
    parts = [part for entry in FORMATS for part in entry.key_suffixes]
    suffixes = [s for entry in FORMATS for group in entry.key_suffixes.values() for s in group]
    assert len(set(parts)) == len(parts) and len(set(suffixes)) == len(suffixes)
    assert all(part.isidentifier() for part in parts)
    for entry in FORMATS:
        assert entry.vector_parts | entry.scalar_parts | {*entry.rank_parts} <= {
            *entry.key_suffixes
        }
