"""Writing kohya's keys: exact, shown by user interfaces, and read by stock diffusers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from customize.concepts.adapter import saved_module_name
from customize.concepts.formats.lora_file import parse_lora_file
from customize.concepts.formats.open_adaptation import open_adaptation, open_without_pipeline
from customize.concepts.formats.write_kohya import kohya_tensors
from customize.concepts.merge.merge_concepts import merge_concepts
from customize.concepts.merge.write_merged_lora import write_merged
from customize.concepts.types import Lora, LoraInfo
from customize.core.lowrank import LowRank
from customize.errors import ConceptError, StorageError
from customize.families import Family, family_of
from tests.concepts.formats.adapter_files import (
    assert_close,
    dense_updates,
    diffusers_name,
    lora_tensors,
    write_file,
)
from tests.concepts.making import small
from tests.pipeline.making import concept, draw
from tests.tiny import tiny_flux, tiny_qwen_image, tiny_sd, tiny_sd3, tiny_sdxl, tiny_z_image

MAKERS = {
    "sd": tiny_sd,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "qwen_image": tiny_qwen_image,
    "z_image": tiny_z_image,
}
ENDS = (".lora_A.weight", ".lora_B.weight")


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("name", MAKERS)
def test_written_tensors_are_parsed_again(name: str, every: int, tmp_path: Path) -> None:
    """Also if only some layers of a fused layer of the original code change."""
    family = family_of(MAKERS[name]().components)
    tensors, deltas = lora_tensors(family, diffusers_name, ENDS, every=every)
    actual = open_adaptation(write_file(tmp_path / "a.safetensors", tensors)).to_lora(family)
    back = kohya_tensors(actual.updates, family)
    assert all(key.startswith(("lora_unet_", "lora_te")) for key in back)
    again = dense_updates(parse_lora_file("b", "b", back, {}).to_lora(family))
    # The layers left alone that are one with others in the file come back as zeros.
    zeros = {target: delta for target, delta in again.items() if target not in deltas}
    assert not any(bool(delta.any()) for delta in zeros.values())
    assert bool(zeros) <= (family.kohya_uses_original_names and every > 1)
    assert_close({target: again[target] for target in deltas}, deltas, 1e-6)


def test_a_shared_slice_keeps_its_rank_in_a_fused_layer() -> None:
    pipe = tiny_flux()
    tensors = kohya_tensors(concept(pipe).updates, family_of(pipe.components))
    fused = {k: t for k, t in tensors.items() if k.endswith("qkv.lora_down.weight")}
    assert len(fused) == 4 and all(tensor.shape[0] == 2 for tensor in fused.values())
    assert "lora_unet_single_blocks_0_linear1.lora_up.weight" in tensors
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha" in tensors


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "qwen_image", "z_image"])
def test_diffusers_gives_the_same_image(name: str, tmp_path: Path) -> None:
    ours, stock = MAKERS[name](), MAKERS[name]()
    plain = draw(stock, "a photo of a dog")
    made = concept(ours)
    if name == "flux":
        # Stock diffusers asks that FLUX's single blocks be of the published width.
        updates = made.updates["transformer"]
        double = {m: update for m, update in updates.items() if not m.startswith("single_")}
        made = replace(made, updates={**made.updates, "transformer": double})
    bare = replace(made, info=made.info.model_copy(update={"num_tokens": 0}), embeddings={})
    family = family_of(ours.components)
    write_merged([bare], [0.7], tmp_path / "out", layout="kohya", family=family)
    stock.load_lora_weights(tmp_path / "out", weight_name="out.safetensors")
    ours.load_custom(tmp_path / "out" / "out.safetensors")
    picture = draw(ours, "a photo of a dog")
    assert np.abs(picture - plain).max() > 1e-3
    assert np.abs(picture - draw(stock, "a photo of a dog")).max() <= 1e-4
    ours.unload_custom()
    ours.load_custom(bare, weights=[0.7])
    assert np.abs(picture - draw(ours, "a photo of a dog")).max() <= 1e-4


def test_header_has_the_fields_that_user_interfaces_show(tmp_path: Path) -> None:
    pipe = tiny_sdxl()
    concepts = [concept(pipe, "rex"), concept(pipe, "tom", index=1)]
    family = family_of(pipe.components)
    write_merged(concepts, [1.0, 0.5], tmp_path / "duo", layout="kohya", family=family)
    path = tmp_path / "duo" / "duo.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["ss_network_module"] == "networks.lora"
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "4"
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert json.loads(header["ss_tag_frequency"]) == {"rex": {"rex": 1}, "tom": {"tom": 1}}
    assert header["modelspec.trigger_phrase"] == "rex, tom"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert json.loads(header["customize_merged"])["concepts"][1]["weight"] == 0.5
    data = path.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert header["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert len(header["sshs_legacy_hash"]) == 8
    assert any(key.startswith("lora_unet_input_blocks_") for key in load_file(path))
    # User interfaces name a token after its file.
    rows = load_file(tmp_path / "duo" / "embeddings" / "tom.safetensors")
    assert set(rows) == {"clip_l", "clip_g"}
    card = (tmp_path / "duo" / "README.md").read_text()
    assert "`embedding:rex` in ComfyUI" in card


def test_the_same_merge_gives_the_same_files(tmp_path: Path) -> None:
    family = family_of(tiny_sd().components)
    made = [concept(tiny_sd())]
    for _ in range(2):
        write_merged(made, [1.0], tmp_path / "one", layout="kohya", family=family)
    assert sorted(p.name for p in (tmp_path / "one").rglob("*") if p.is_file()) == sorted(
        ["one.safetensors", "rex.safetensors", "merged.json", "README.md"]
    )


def test_the_same_merge_is_kept_with_a_model_card_of_another_version(tmp_path: Path) -> None:
    family = family_of(tiny_sd().components)
    made = [concept(tiny_sd())]
    for layout in ("kohya", "diffusers"):
        folder = tmp_path / layout
        write_merged(made, [1.0], folder, layout=layout, family=family)
        card = folder / "README.md"
        card.write_text("another wording")
        write_merged(made, [1.0], folder, layout=layout, family=family)
        assert card.read_text() == "another wording"
        with pytest.raises(StorageError, match="exists already"):
            write_merged(made, [0.5], folder, layout=layout, family=family)


def test_the_order_of_layers_does_not_change_the_merge(tmp_path: Path) -> None:
    family = family_of(tiny_sd().components)
    made = [concept(tiny_sd()), concept(tiny_sd(), "tom", index=1)]
    reverse = [
        replace(
            each,
            updates={
                component: dict(reversed(own.items()))
                for component, own in reversed(each.updates.items())
            },
        )
        for each in made
    ]
    for concepts in (made, reverse):
        write_merged(concepts, [1.0, 0.7], tmp_path / "duo", rank=1, family=family)


def test_model_of_an_unpublished_size(tmp_path: Path) -> None:
    """Stable Diffusion of any size can be written; other families need the model.

    The kohya names of Stable Diffusion's layers are those of diffusers.
    """
    made = small()
    write_merged([made], [1.0], tmp_path / "a", layout="kohya")
    with safe_open(tmp_path / "a" / "a.safetensors", "pt") as file:
        assert "ss_base_model_version" not in file.metadata()
        assert "lora_unet_mid_attn1_to_q.lora_up.weight" in file.keys()  # noqa: SIM118
    flux = concept(tiny_flux())
    with pytest.raises(ConceptError, match="no published model of family flux"):
        write_merged([flux], [1.0], tmp_path / "b", layout="kohya")
    assert not (tmp_path / "b").exists()


def convolutions(rank: int = 2) -> Lora:
    """A LoRA on layers of Stable Diffusion 1.x, including a convolution."""
    generator = torch.Generator().manual_seed(0)

    def update(out: int, width: int) -> LowRank:
        up = torch.randn(out, rank, generator=generator)
        return LowRank(up, torch.randn(rank, width, generator=generator), 0.5)

    products = {
        "unet": {
            "conv_in": update(320, 4 * 9),
            "down_blocks.0.attentions.0.proj_in": update(320, 320),
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": update(1280, 768),
        }
    }
    return Lora(LoraInfo("style", "sd", "", rank), products)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_convolutions_keep_their_shape(layout: str, tmp_path: Path) -> None:
    made = convolutions()
    write_merged([made], [2.0], tmp_path / "a", layout=layout)
    name = "a" if layout == "kohya" else "pytorch_lora_weights"
    path = tmp_path / "a" / f"{name}.safetensors"
    shapes = {tuple(tensor.shape) for tensor in load_file(path).values()}
    assert {(2, 4, 3, 3), (320, 2, 1, 1), (2, 320, 1, 1)} <= shapes
    expected = {k: 2 * v for k, v in dense_updates(made).items()}
    assert_close(dense_updates(open_without_pipeline(path)), expected)


def test_diffusers_loads_a_merged_convolution(tmp_path: Path) -> None:
    pipe: StableDiffusionPipeline = tiny_sd()
    family: Family = family_of(pipe.components)
    tensors, _ = lora_tensors(family, diffusers_name, ENDS, every=3)
    actual = open_adaptation(write_file(tmp_path / "s.safetensors", tensors)).to_lora(family)
    write_merged([actual], [0.5], tmp_path / "out", family=family)
    pipe.load_lora_weights(tmp_path / "out")
    ours = tiny_sd().load_custom(tmp_path / "s.safetensors", weights=[0.5])
    prompt = "a photo of a dog"
    assert np.abs(draw(pipe, prompt) - draw(tiny_sd(), prompt)).max() > 1e-3
    assert np.abs(draw(pipe, prompt) - draw(ours, prompt)).max() <= 1e-4


def test_lora_and_concept_are_merged_by_the_same_sum(tmp_path: Path) -> None:
    pipe = tiny_sd()
    family = family_of(pipe.components)
    tensors, deltas = lora_tensors(family, diffusers_name, ENDS, every=2)
    style = open_adaptation(write_file(tmp_path / "style.safetensors", tensors)).to_lora(family)
    rex = concept(pipe)
    summed = Lora(style.info, merge_concepts([rex, style], [0.5, 2.0]))
    expected = {target: 2.0 * delta for target, delta in deltas.items()}
    for (component, module), delta in dense_updates(rex).items():
        target = (component, saved_module_name(component, module))
        expected[target] = expected.get(target, 0.0) + 0.5 * delta
    assert_close(dense_updates(summed), expected)
