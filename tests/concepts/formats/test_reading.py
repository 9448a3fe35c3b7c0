"""Files with all spellings of layers and factors, compared with dense float64 products."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from customize.concepts.formats.open_adaptation import open_adaptation
from customize.concepts.types import Lora
from customize.errors import ConceptError
from customize.families import Family, family_of
from tests.concepts.formats.adapter_files import (
    assert_close,
    dense_product,
    dense_updates,
    diffusers_name,
    kohya_names,
    lora_tensors,
    random_factors,
    write_file,
)
from tests.tiny import tiny_flux, tiny_qwen_image, tiny_sd, tiny_sd3, tiny_sdxl, tiny_z_image
from tests.tiny_llm import tiny_flux2
from tests.tiny_video import tiny_wan

MAKERS = {
    "sd": tiny_sd,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "qwen_image": tiny_qwen_image,
    "z_image": tiny_z_image,
}
WITH_ORIGINALS = MAKERS | {"flux2": tiny_flux2, "wan": tiny_wan}


@pytest.fixture(scope="module", params=MAKERS)
def family(request) -> Family:
    return family_of(MAKERS[request.param]().components)


def read(path: Path, family: Family) -> Lora:
    return open_adaptation(path).to_lora(family)


@pytest.mark.parametrize(
    "ends",
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
        (".lora_down.weight", ".lora_up.weight"),
        (".lora.down.weight", ".lora.up.weight"),
    ],
)
def test_diffusers_names_of_all_layers(family: Family, ends, tmp_path: Path) -> None:
    tensors, deltas = lora_tensors(family, diffusers_name, ends)
    actual = read(write_file(tmp_path / "some.safetensors", tensors), family)
    assert_close(dense_updates(actual), deltas)
    assert (actual.info.name, actual.info.rank) == ("some", 3)


def test_kohyas_names_of_all_layers(family: Family, tmp_path: Path) -> None:
    tensors, deltas = lora_tensors(
        family, kohya_names(family), (".lora_down.weight", ".lora_up.weight")
    )
    assert_close(
        dense_updates(read(write_file(tmp_path / "some.safetensors", tensors), family)), deltas
    )


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model.", ""])
def test_keys_without_a_component(family: Family, prefix: str, tmp_path: Path) -> None:
    tensors, deltas = lora_tensors(
        family,
        lambda component, module: prefix + module,
        (".lora_A.weight", ".lora_B.weight"),
        components=[family.denoiser_key],
    )
    assert_close(
        dense_updates(read(write_file(tmp_path / "some.safetensors", tensors), family)), deltas
    )


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_comfys_names_of_text_encoders(name: str, tmp_path: Path) -> None:
    family = family_of(MAKERS[name]().components)
    clips = dict(zip(family.text_encoders, ("clip_l", "clip_g"), strict=False))
    tensors, deltas = lora_tensors(
        family,
        lambda component, module: f"text_encoders.{clips[component]}.transformer.{module}",
        (".lora_down.weight", ".lora_up.weight"),
        components=list(clips),
    )
    assert_close(
        dense_updates(read(write_file(tmp_path / "some.safetensors", tensors), family)), deltas
    )


def test_old_diffusers_names_with_the_attention_processor(tmp_path: Path) -> None:
    family = family_of(tiny_sd().components)
    leaves = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

    def old(component: str, module: str) -> str:
        parent, _, leaf = module.removesuffix(".0").rpartition(".")
        if component == "unet":
            return f"unet.{parent}.processor.{leaf}_lora"
        return f"text_encoder.{parent}.{leaves[leaf]}_lora"

    targets = {key: family.adapter_targets(key) for key in ("unet", "text_encoder")}
    generator = torch.Generator().manual_seed(1)
    tensors, deltas = {}, {}
    for component, layers in targets.items():
        for module, shape in layers.items():
            named = f"text_model.{module}" if component == "text_encoder" else module
            up, down = random_factors(shape, 2, generator)
            path = old(component, named)
            tensors[f"{path}.up.weight"], tensors[f"{path}.down.weight"] = up, down
            deltas[component, named] = dense_product(up, down)
    assert any("processor.to_out_lora.down.weight" in key for key in tensors)
    assert_close(
        dense_updates(read(write_file(tmp_path / "old.safetensors", tensors), family)), deltas
    )


def test_old_names_of_text_encoders(tmp_path: Path) -> None:
    family = family_of(tiny_sd().components)
    tensors, deltas = lora_tensors(
        family,
        diffusers_name,
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        components=["text_encoder"],
    )
    assert_close(
        dense_updates(read(write_file(tmp_path / "old.safetensors", tensors), family)), deltas
    )


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "z_image", "flux2", "wan"])
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "model.diffusion_model."])
def test_original_names_are_split_exactly(name: str, prefix: str, tmp_path: Path) -> None:
    family = family_of(WITH_ORIGINALS[name]().components)
    key = family.denoiser_key
    shapes = family.weight_shapes(key)
    generator = torch.Generator().manual_seed(2)
    tensors, deltas = {}, {}
    for number, (original, rows) in enumerate(family.original_names().items()):
        if "processor" in original:
            continue
        rank = 1 + number % 3
        out = sum(row_range.stop - row_range.start for row_range in rows)
        up, down = random_factors((out, *shapes[rows[0].module][1:]), rank, generator)
        flat = original.replace(".", "_") if prefix.endswith("_") else original
        tensors[f"{prefix}{flat}.lora_up.weight"] = up
        tensors[f"{prefix}{flat}.lora_down.weight"] = down
        tensors[f"{prefix}{flat}.alpha"] = torch.tensor(2.0)
        whole, first = dense_product(up, down, 2.0 / rank), 0
        for row_range in rows:
            target = (key, row_range.module)
            count = row_range.stop - row_range.start
            layer = deltas.setdefault(
                target, torch.zeros(shapes[row_range.module][0], whole.shape[1]).double()
            )
            layer[row_range.start : row_range.stop] = whole[first : first + count]
            first += count
    assert_close(
        dense_updates(read(write_file(tmp_path / "a.safetensors", tensors), family)), deltas
    )


def test_xlabs_names(tmp_path: Path) -> None:
    family = family_of(tiny_flux().components)
    generator = torch.Generator().manual_seed(3)
    up, down = random_factors((96, 32), 4, generator)
    proj_up, proj_down = random_factors((32, 32), 2, generator)
    path = "double_blocks.1.processor"
    tensors = {
        f"{path}.qkv_lora2.down.weight": down,
        f"{path}.qkv_lora2.up.weight": up,
        f"{path}.proj_lora1.down.weight": proj_down,
        f"{path}.proj_lora1.up.weight": proj_up,
    }
    actual = dense_updates(read(write_file(tmp_path / "x.safetensors", tensors), family))
    block = "transformer_blocks.1.attn"
    expected = {
        ("transformer", f"{block}.add_{name}_proj"): part
        for name, part in zip("qkv", dense_product(up, down).split(32), strict=True)
    }
    expected["transformer", f"{block}.to_out.0"] = dense_product(proj_up, proj_down)
    assert_close(actual, expected)


def test_scales_from_peft_configuration(tmp_path: Path) -> None:
    """Alpha and rank by pattern, and rank-stabilized, in the configuration beside the file."""
    family = family_of(tiny_sd().components)
    tensors, _ = lora_tensors(
        family,
        lambda component, module: f"base_model.model.{module}",
        (".lora_A.weight", ".lora_B.weight"),
        components=["unet"],
        alphas="none",
    )
    special = "down_blocks.0.attentions.0.proj_in"
    config = {
        "r": 2,
        "lora_alpha": 6,
        "use_rslora": True,
        "alpha_pattern": {r"^down_blocks\.0\.attentions\.0\.proj_in": 10},
    }
    folder = tmp_path / "trained"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for source in (folder, folder / "adapter_model.safetensors"):
        actual = read(source, family).updates["unet"]
        assert all(
            update.scale == pytest.approx((10 if module == special else 6) / update.rank**0.5)
            for module, update in actual.items()
        )
    assert read(folder, family).info.name == "trained"


def test_scales_from_diffusers_header(tmp_path: Path) -> None:
    family = family_of(tiny_sd().components)
    tensors, _ = lora_tensors(
        family, diffusers_name, (".lora_A.weight", ".lora_B.weight"), alphas="none"
    )
    header = {"unet.r": 2, "unet.lora_alpha": 8, "text_encoder.r": 2, "text_encoder.lora_alpha": 1}
    path = write_file(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=json.dumps(header))
    actual = read(path, family)
    for component, alpha in (("unet", 8), ("text_encoder", 1)):
        assert all(u.scale == alpha / u.rank for u in actual.updates[component].values())


def test_missing_alpha_is_the_rank(tmp_path: Path) -> None:
    family = family_of(tiny_flux().components)
    tensors, deltas = lora_tensors(
        family, kohya_names(family), (".lora_down.weight", ".lora_up.weight"), alphas="none"
    )
    actual = read(write_file(tmp_path / "a.safetensors", tensors), family)
    assert {u.scale for layers in actual.updates.values() for u in layers.values()} == {1.0}
    assert_close(dense_updates(actual), deltas)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_low_precision_tensors_are_decoded_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    family = family_of(tiny_sd().components)
    up, down = random_factors((32, 16), 2, torch.Generator().manual_seed(4))
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    up, down = random_factors(
        family.weight_shapes("unet")[module], 2, torch.Generator().manual_seed(4)
    )
    up, down = up.to(dtype), down.to(dtype)
    path = f"unet.{module}"
    tensors = {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    actual = read(write_file(tmp_path / "a.safetensors", tensors), family)
    assert_close(
        dense_updates(actual), {("unet", module): dense_product(up.float(), down.float())}, 1e-7
    )


def test_keys_with_the_name_of_the_second_denoiser(tmp_path: Path) -> None:
    both = family_of(tiny_wan("2.2-14b").components)
    names = ["transformer", "transformer_2"]
    tensors, deltas = lora_tensors(
        both, diffusers_name, (".lora_A.weight", ".lora_B.weight"), every=3, components=names
    )
    path = write_file(tmp_path / "a.safetensors", tensors)
    assert_close(dense_updates(open_adaptation(path).to_lora(both)), deltas)
    one = family_of(tiny_wan().components)
    with pytest.raises(ConceptError, match=r"not in this wan model.*transformer_2\.blocks"):
        open_adaptation(path).to_lora(one)


def test_file_name_selects_one_of_two_denoisers(tmp_path: Path) -> None:
    both = family_of(tiny_wan("2.2-14b").components)
    tensors, deltas = lora_tensors(
        both,
        diffusers_name,
        (".lora_A.weight", ".lora_B.weight"),
        every=9,
        components=["transformer"],
    )
    low_deltas = {("transformer_2", module): delta for (_, module), delta in deltas.items()}
    path = write_file(tmp_path / "some.safetensors", tensors)
    with pytest.warns(UserWarning, match=r"some\.safetensors.*transformer takes it.*transformer_2"):
        assert_close(dense_updates(open_adaptation(path).to_lora(both)), deltas)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, expected in (("high", deltas), ("low", low_deltas)):
            path = write_file(tmp_path / f"{name}.safetensors", tensors)
            assert_close(dense_updates(open_adaptation(path).to_lora(both)), expected)


def test_trigger_words_from_the_header(tmp_path: Path) -> None:
    family = family_of(tiny_sd().components)
    tensors, _ = lora_tensors(family, diffusers_name, (".lora_A.weight", ".lora_B.weight"), every=9)
    path = write_file(
        tmp_path / "My Style v1.2.safetensors",
        tensors,
        **{"modelspec.trigger_phrase": "in mystyle\x1b[31m", "ss_base_model_version": "sd_v1"},
    )
    info = read(path, family).info
    assert (info.name, info.trigger_words, info.base) == (
        "my-style-v1-2",
        "in mystyle [31m",
        "sd_v1",
    )
