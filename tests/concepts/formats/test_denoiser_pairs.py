"""Folders of merges for two denoisers, and base detection by published sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from customize.concepts.formats.open_adaptation import open_adaptation, open_without_pipeline
from customize.concepts.io.write_concept import save_concept
from customize.concepts.merge.write_merged_lora import write_merged
from customize.core.lowrank import to_dense
from customize.errors import ConceptError
from customize.families import family_of
from tests.concepts.formats.adapter_files import assert_close, dense_updates, write_file
from tests.pipeline.making import concept, draw
from tests.tiny import tiny_sd
from tests.tiny_video import tiny_wan

ENDS = (".lora_A.weight", ".lora_B.weight")


def layer(name: str, out: int, width: int) -> dict[str, torch.Tensor]:
    return {f"{name}{ENDS[0]}": torch.ones(1, width), f"{name}{ENDS[1]}": torch.ones(out, 1)}


def test_merge_for_two_denoisers_equals_its_concepts(tmp_path: Path) -> None:
    pipe = tiny_wan("2.2-14b")
    two = [concept(pipe, "rex", index=0), concept(pipe, "tom", index=1)]
    write_merged(two, [1.0, 0.8], tmp_path / "duo")
    plain = draw(pipe)
    pipe.load_custom(tmp_path / "duo")
    assert [row.name for row in pipe.custom.rows] == ["duo"]
    actual = draw(pipe)
    pipe.unload_custom()
    expected = draw(pipe.load_custom(*two, weights=[1.0, 0.8]))
    assert np.abs(actual - expected).max() <= 1e-5 < np.abs(actual - plain).max()


def test_files_of_a_pair_keep_their_scales(tmp_path: Path) -> None:
    """The scale alpha / rank in the header of these files is 2."""
    pipe = tiny_wan("2.2-14b")
    rex = concept(pipe)
    save_concept(rex, tmp_path / "rex")
    (tmp_path / "rex" / "concept.json").unlink()
    actual = open_adaptation(tmp_path / "rex").to_lora(family_of(pipe.components))
    assert set(actual.updates) == {"transformer", "transformer_2"}
    assert_close(dense_updates(actual), dense_updates(rex))


def test_foreign_second_file_is_refused(tmp_path: Path) -> None:
    pipe = tiny_wan("2.2-14b")
    write_merged([concept(pipe)], [1.0], tmp_path / "duo")
    second = tmp_path / "duo" / "pytorch_lora_weights_2.safetensors"
    save_file({f"unet.{key}": value for key, value in load_file(second).items()}, second)
    with pytest.raises(ConceptError, match=r"must begin with transformer, not unet\.transformer"):
        open_adaptation(tmp_path / "duo").to_lora(family_of(pipe.components))  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_old_merge_without_tokens_is_refused(layout: str, tmp_path: Path) -> None:
    """Merges of earlier versions have no tokens in their headers."""
    pipe = tiny_sd()
    family = family_of(pipe.components)
    write_merged([concept(pipe)], [1.0], tmp_path / "duo", layout=layout, family=family)
    path = tmp_path / "duo" / ("duo" if layout == "kohya" else "pytorch_lora_weights")
    path = path.with_suffix(".safetensors")
    save_file(load_file(path), path)
    with pytest.raises(ConceptError, match=r"tokens would be left out.*merge the concepts again"):
        open_adaptation(tmp_path / "duo")


#: A file's layers, at their published sizes -> whose they are.
KNOWN = {
    "flux2 dev": ("diffusion_model.single_blocks.47.linear1", 9 * 6144, 6144, "flux2"),
    "flux2 klein": ("diffusion_model.single_blocks.19.linear1", 9 * 3072, 3072, "flux2"),
    "flux": ("transformer.transformer_blocks.18.attn.add_q_proj", 3072, 3072, "flux or qwen_image"),
    "flux3": ("transformer.mode_blocks.image.0.attn.to_q", 3072, 3072, "flux3"),
    "krea2": ("transformer.text_fusion.refiner_blocks.0.attn.to_gate", 2560, 2560, "krea2"),
    "qwen_image_21": ("transformer.transformer_blocks.31.attn.to_q", 4096, 4096, "qwen_image_21"),
    "wan 1.3b": ("diffusion_model.blocks.0.self_attn.q", 1536, 1536, "wan"),
    "wan 5b": ("transformer.blocks.29.attn1.to_q", 3072, 3072, "wan"),
    "wan 14b": ("transformer_2.blocks.39.attn2.to_v", 5120, 5120, "wan"),
    "wan, animating": ("diffusion_model.blocks.0.cross_attn.k_img", 5120, 5120, "wan"),
    "cogvideox": ("transformer.transformer_blocks.41.attn1.to_q", 3072, 3072, "cogvideox"),
    "ltx2": ("transformer.transformer_blocks.0.audio_attn1.to_q", 2048, 2048, "ltx2"),
    # FLUX.2 klein 4B is as wide as FLUX.1, and its few blocks have the same names.
    "either": ("transformer.transformer_blocks.0.attn.to_q", 3072, 3072, "flux or flux2"),
    "either original": ("diffusion_model.double_blocks.0.img_attn.qkv", 9216, 3072, "flux or"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_base_is_detected_from_layers_or_refused_as_ambiguous(name: str, tmp_path: Path) -> None:
    path, out, width, family = KNOWN[name]
    file = write_file(tmp_path / "a.safetensors", layer(path, out, width))
    if " or" in family:
        with pytest.raises(ConceptError, match=f"may belong to {family}"):
            open_without_pipeline(file)
        return
    actual = open_without_pipeline(file)
    assert actual.info.family == family
    (update,) = (
        update
        for component_updates in actual.updates.values()
        for update in component_updates.values()
    )
    assert to_dense(update).shape[1] == width


def test_inspect_opens_a_pair(tmp_path: Path) -> None:
    tensors = layer("transformer.blocks.0.attn1.to_q", 5120, 5120)
    write_file(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    write_file(tmp_path / "pytorch_lora_weights_2.safetensors", tensors)
    actual = open_without_pipeline(tmp_path)
    assert actual.info.family == "wan"
    assert set(actual.updates) == {"transformer", "transformer_2"}
