"""Decoding LyCORIS and DoRA files, compared with the formulas in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model
from torch import Tensor

from customize.concepts.formats.open_adaptation import open_adaptation, open_without_pipeline
from customize.concepts.types import Lora
from customize.errors import ConceptError
from customize.families import family_of
from tests.concepts.formats.adapter_files import (
    assert_close,
    dense_product,
    dense_updates,
    random_factors,
    write_file,
)
from tests.tiny import tiny_flux, tiny_sd

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_sd()


def random(*shape: int, seed: int = 0) -> Tensor:
    return 0.4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def read(tmp_path: Path, pipe: Any, tensors: dict[str, Tensor]) -> Lora:
    models = {
        "unet": getattr(pipe, "unet", None),
        "transformer": getattr(pipe, "transformer", None),
    }

    def weight(component: str, module: str) -> Tensor:
        return models[component].get_submodule(module).weight

    path = write_file(tmp_path / "made.safetensors", tensors)
    return open_adaptation(path).to_lora(family_of(pipe.components), weight)


def path(module: str) -> str:
    return f"lora_unet_{module.replace('.', '_')}"


def weight_of(pipe: Any, module: str) -> Tensor:
    return pipe.unet.get_submodule(module).weight.detach().double()


@pytest.mark.parametrize("module", [LINEAR, CONV])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_loha(module: str, alpha: float | None, pipe, tmp_path: Path) -> None:
    out, *input_sides = weight_of(pipe, module).shape
    width = int(torch.tensor(input_sides).prod())
    parts = {
        "hada_w1_a": random(out, 3),
        "hada_w1_b": random(3, width),
        "hada_w2_a": random(out, 3, seed=1),
        "hada_w2_b": random(3, width, seed=1),
    }
    one = parts["hada_w1_a"].double() @ parts["hada_w1_b"].double()
    two = parts["hada_w2_a"].double() @ parts["hada_w2_b"].double()
    tensors = {f"{path(module)}.{key}": value for key, value in parts.items()}
    if alpha is not None:
        tensors[f"{path(module)}.alpha"] = torch.tensor(alpha)
    actual = read(tmp_path, pipe, tensors)
    assert actual.info.rank == 9
    scale = 1.0 if alpha is None else alpha / 3
    assert_close(dense_updates(actual), {("unet", module): scale * one * two}, 1e-5)


PEFTS: dict[str, Any] = {
    "loha": LoHaConfig(r=4, alpha=8),
    "loha, cores": LoHaConfig(r=4, alpha=8, use_effective_conv2d=True),
    "loha, patterns": LoHaConfig(alpha=5, rank_pattern={"to_q": 2}, alpha_pattern={"to_k": 1.5}),
    "lokr": LoKrConfig(r=2, alpha=8),
    "lokr, cores": LoKrConfig(r=2, alpha=8, use_effective_conv2d=True, decompose_both=True),
    "lokr, factor": LoKrConfig(r=2, alpha=3, decompose_factor=4, rank_pattern={"to_q": 3}),
    # A rank so large that both factors stay whole matrices, which peft scales nevertheless.
    "lokr, whole": LoKrConfig(r=64, alpha=8),
}


@pytest.mark.parametrize("kind", PEFTS)
def test_saved_peft_adapters_agree_with_peft(kind: str, tmp_path: Path) -> None:
    layers = ["to_q", "to_k", "ff.net.2", "conv1", "conv_in"]
    config = replace(PEFTS[kind], target_modules=layers)
    model: Any = get_peft_model(tiny_sd().unet, config)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "hada_" in name or "lokr_" in name:
            parameter.data = 0.3 * random(*parameter.shape, seed=number)
    expected = {
        ("unet", name): module.get_delta_weight("default").detach().double()
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    model.save_pretrained(tmp_path)
    assert len(expected) > 20
    assert_close(
        dense_updates(open_adaptation(tmp_path).to_lora(family_of(tiny_sd().components))), expected
    )


def test_loha_with_tucker_cores(pipe, tmp_path: Path) -> None:
    out, channels, *_ = weight_of(pipe, CONV).shape
    parts = {"hada_t1": random(2, 2, 3, 3), "hada_t2": random(2, 2, 3, 3, seed=1)}
    for n in "12":
        parts[f"hada_w{n}_a"] = random(2, out, seed=int(n))
        parts[f"hada_w{n}_b"] = random(2, channels, seed=int(n) + 5)
    sides = [
        torch.einsum(
            "rshw,ro,si->oihw",
            parts[f"hada_t{n}"].double(),
            parts[f"hada_w{n}_a"].double(),
            parts[f"hada_w{n}_b"].double(),
        )
        for n in "12"
    ]
    tensors = {f"{path(CONV)}.{key}": value for key, value in parts.items()}
    tensors[f"{path(CONV)}.alpha"] = torch.tensor(1.0)
    actual = read(tmp_path, pipe, tensors)
    assert_close(dense_updates(actual), {("unet", CONV): 0.5 * sides[0] * sides[1]}, 1e-5)


@pytest.mark.parametrize("first", ["whole", "factors"])
@pytest.mark.parametrize("second", ["whole", "factors", "tucker"])
def test_lokr(first: str, second: str, pipe, tmp_path: Path) -> None:
    module = CONV if second == "tucker" else LINEAR
    out, channels, *kernel = weight_of(pipe, module).shape
    parts = {}
    if first == "whole":
        parts["lokr_w1"] = random(4, 4)
        one = parts["lokr_w1"].double()
    else:
        parts |= {"lokr_w1_a": random(4, 2), "lokr_w1_b": random(2, 4, seed=1)}
        one = parts["lokr_w1_a"].double() @ parts["lokr_w1_b"].double()
    c, d = out // 4, channels // 4
    if second == "whole":
        parts["lokr_w2"] = random(c, d, *kernel)
        two = parts["lokr_w2"].double()
    elif second == "factors":
        parts |= {"lokr_w2_a": random(c, 2), "lokr_w2_b": random(2, d, seed=2)}
        two = parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double()
    else:
        parts["lokr_t2"] = random(2, 2, *kernel)
        parts |= {"lokr_w2_a": random(2, c), "lokr_w2_b": random(2, d, seed=2)}
        two = torch.einsum(
            "rshw,ro,si->oihw", *(parts[f"lokr_{k}"].double() for k in ("t2", "w2_a", "w2_b"))
        )
    scale = 1.0 if (first, second) == ("whole", "whole") else 5.0 / 2
    tensors = {f"{path(module)}.{key}": value for key, value in parts.items()}
    tensors[f"{path(module)}.alpha"] = torch.tensor(5.0)
    expected = scale * torch.kron(one, two.flatten(1))
    assert_close(dense_updates(read(tmp_path, pipe, tensors)), {("unet", module): expected}, 1e-5)


def test_locon_with_a_core(pipe, tmp_path: Path) -> None:
    out, channels, *_ = weight_of(pipe, CONV).shape
    up, down, mid = random(out, 2, 1, 1), random(2, channels, 1, 1), random(2, 2, 3, 3)
    tensors = {
        f"{path(CONV)}.lora_up.weight": up,
        f"{path(CONV)}.lora_down.weight": down,
        f"{path(CONV)}.lora_mid.weight": mid,
        f"{path(CONV)}.alpha": torch.tensor(3.0),
    }
    expected = 1.5 * torch.einsum(
        "or,rshw,si->oihw", up[:, :, 0, 0].double(), mid.double(), down[:, :, 0, 0].double()
    )
    assert_close(dense_updates(read(tmp_path, pipe, tensors)), {("unet", CONV): expected}, 1e-5)


@pytest.mark.parametrize("module", [LINEAR, CONV])
def test_full_difference(module: str, pipe, tmp_path: Path) -> None:
    change = random(*weight_of(pipe, module).shape)
    actual = read(tmp_path, pipe, {f"{path(module)}.diff": change})
    assert_close(dense_updates(actual), {("unet", module): change.double()}, 0.0)


@pytest.mark.parametrize("module", [LINEAR, CONV])
@pytest.mark.parametrize("kind", ["rows", "columns", "peft"])
def test_dora(module: str, kind: str, pipe, tmp_path: Path) -> None:
    weight = weight_of(pipe, module)
    up, down = random_factors(tuple(weight.shape), 2, torch.Generator().manual_seed(3))
    changed = weight + dense_product(up, down, 2.0).reshape(weight.shape)
    magnitude_dim = 1 if kind == "columns" else 0
    dims = [dim for dim in range(weight.ndim) if dim != magnitude_dim]
    lengths = changed.square().sum(dims, keepdim=True).sqrt()
    magnitude = (1 + 0.3 * random(*lengths.shape).abs()).double() * lengths
    if kind == "peft":
        config = "lora_magnitude_vector"
        stored = magnitude.flatten() if weight.ndim == 2 else magnitude.reshape(1, -1, 1, 1)
    else:
        config, stored = "dora_scale", magnitude
    tensors = {
        f"{path(module)}.lora_up.weight": up,
        f"{path(module)}.lora_down.weight": down,
        f"{path(module)}.alpha": torch.tensor(4.0),
        f"{path(module)}.{config}": stored.float(),
    }
    expected = magnitude * changed / lengths - weight
    assert_close(dense_updates(read(tmp_path, pipe, tensors)), {("unet", module): expected}, 1e-5)


def test_oft(pipe, tmp_path: Path) -> None:
    weight = weight_of(pipe, LINEAR)
    blocks = random(weight.shape[0] // 4, 4, 4)
    skew = (blocks - blocks.mT).double()
    eye = torch.eye(4, dtype=torch.float64)
    whole = torch.block_diag(*((eye + q) @ torch.linalg.inv(eye - q) for q in skew))
    tensors = {f"{path(LINEAR)}.oft_blocks": blocks, f"{path(LINEAR)}.alpha": torch.tensor(0.0)}
    expected = whole.T @ weight - weight
    assert_close(dense_updates(read(tmp_path, pipe, tensors)), {("unet", LINEAR): expected}, 1e-5)


def test_oft_of_a_joined_layer(tmp_path: Path) -> None:
    """DoRA on kohya's qkv layer of FLUX: the concatenated magnitudes of three layers."""
    pipe = tiny_flux()
    block = "transformer_blocks.0.attn"
    modules = [f"{block}.to_{x}" for x in "qkv"]
    weights = [pipe.transformer.get_submodule(m).weight.detach().double() for m in modules]
    weight = torch.cat(weights)
    up, down = random_factors(tuple(weight.shape), 2, torch.Generator().manual_seed(5))
    changed = weight + dense_product(up, down)
    magnitude = 2 * changed.norm(dim=1, keepdim=True)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{name}.lora_up.weight": up,
        f"{name}.lora_down.weight": down,
        f"{name}.dora_scale": magnitude.float(),
    }
    whole = 2 * changed - weight
    expected = {
        ("transformer", module): part
        for module, part in zip(modules, whole.split(weights[0].shape[0]), strict=True)
    }
    assert_close(dense_updates(read(tmp_path, pipe, tensors)), expected, 1e-5)


@pytest.mark.parametrize("part", ["dora_scale", "oft_blocks"])
def test_missing_base_weights_are_refused(part: str, tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.oft_blocks": random(80, 4, 4)}
    if part == "dora_scale":
        tensors = {
            f"{name}.lora_up.weight": random(320, 1),
            f"{name}.lora_down.weight": random(1, 768),
            f"{name}.dora_scale": torch.ones(320, 1),
        }
    with pytest.raises(
        ConceptError, match=r"depends on the base model's weights.*--fuse and --base"
    ):
        open_without_pipeline(write_file(tmp_path / "made.safetensors", tensors))
