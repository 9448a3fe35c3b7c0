"""Concept folders that are damaged: refused, and the pipeline is as before."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from customize.concepts.io.write_concept import save_concept
from customize.errors import ConceptError
from tests.pipeline.making import assert_same, concept, everything
from tests.tiny import tiny_sd


def _cut(folder):
    whole = (folder / "pytorch_lora_weights.safetensors").read_bytes()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(whole[: len(whole) // 2])


def _with_slice_edited(folder):
    facts = json.loads((folder / "concept.json").read_text())
    facts["slices"] = {
        width: [c + 2 for c in columns] for width, columns in facts["slices"].items()
    }
    (folder / "concept.json").write_text(json.dumps(facts))


def _with(name, change):
    def damage(folder):
        tensors = load_file(folder / name)
        with safe_open(folder / name, "pt") as file:
            metadata = file.metadata()
        key = next(key for key in sorted(tensors) if "lora_B" in key or "embeds" in name)
        change(tensors, key)
        save_file(tensors, folder / name, metadata)

    return damage


DAMAGE = {
    "cut short": _cut,
    "slice edited": _with_slice_edited,
    "json missing": lambda folder: (folder / "concept.json").unlink(),
    "tokens missing": lambda folder: (folder / "learned_embeds.safetensors").unlink(),
    **{
        f"{kind} in {name}": _with(f"{name}.safetensors", change)
        for name in ("pytorch_lora_weights", "learned_embeds")
        for kind, change in {
            "nan": lambda t, key: t[key].view(-1)[:1].fill_(float("nan")),
            "key too many": lambda t, key: t.update({f"{key}.x": torch.ones(1)}),
            "key missing": lambda t, key: t.pop(key),
            "wrong shape": lambda t, key: t.update({key: t[key][:1, :5].clone()}),
        }.items()
    },
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders_change_nothing(damage, tmp_path):
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe, "tom", index=1))
    before, rows = everything(pipe), pipe.custom.rows
    folder = save_concept(concept(pipe), tmp_path / "rex")
    damage(folder)
    with pytest.raises(ConceptError, match="rex"):
        pipe.load_custom(concept(pipe, "ann", index=2), folder)
    assert_same(before, everything(pipe))
    assert pipe.custom.rows == rows
