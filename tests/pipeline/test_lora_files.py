"""LoRA files of other programs on pipelines, against stock diffusers and against dense weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from customize.concepts.formats.open_adaptation import open_adaptation
from customize.errors import ConceptError, CustomizeError
from customize.families import Family, family_of
from tests.concepts.formats.adapter_files import (
    diffusers_name,
    kohya_names,
    lora_tensors,
    write_file,
)
from tests.pipeline.making import assert_same, concept, draw, everything
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl
from tests.tiny_video import tiny_wan

MAKERS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
ENDS = (".lora_down.weight", ".lora_up.weight")
PROMPT = "a photo of a dog"


def made(pipe: Any, path: Path, every: int = 2, alphas: Any = "some") -> Path:
    family = family_of(pipe.components)
    tensors, _ = lora_tensors(family, kohya_names(family), ENDS, every=every, alphas=alphas)
    small = {k: 0.3 * t if k.endswith(ENDS) else t for k, t in tensors.items()}
    return write_file(path, small, **{"modelspec.trigger_phrase": "in some style"})


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_outputs_equal_those_of_the_dense_product(name: str, fuse: bool, tmp_path: Path) -> None:
    """Every layer's output, or the fused weight, is that of the weight plus the dense product."""
    pipe = MAKERS[name]()
    before = everything(pipe)
    path = made(pipe, tmp_path / "style.safetensors", every=1)
    family = family_of(pipe.components)
    opened = open_adaptation(path).to_lora(family)
    pipe.load_custom(path, weights=[0.5], fuse=fuse)
    denoiser = family.denoiser
    for module, update in opened.updates[family.denoiser_key].items():
        layer = denoiser.get_submodule(module)
        base = getattr(layer, "base_layer", layer)
        delta = 0.5 * update.scale * (update.up.double() @ update.down.double())
        original = before[f"{family.denoiser_key} weights"][f"{module}.weight"].double()
        expected = original + delta.reshape(original.shape)
        if fuse:
            assert (base.weight.double() - expected).abs().max() <= 1e-5, module
            continue
        channels = (base.in_channels, 6, 6) if original.ndim == 4 else (original.shape[1],)
        inputs = torch.randn(2, *channels, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            answer = layer(inputs)
            base.weight.copy_(expected)
            assert (answer - base(inputs)).abs().max() <= 1e-4, module
            base.weight.copy_(original)
    pipe.unload_custom()
    assert_same(everything(pipe), before)


@pytest.mark.parametrize("every", [1, 3])
def test_kohya_files_draw_as_in_stock_diffusers(every: int, tmp_path: Path) -> None:
    """One alpha for all layers: others diffusers misreads."""
    ours, stock = tiny_sd(), tiny_sd()
    path = made(ours, tmp_path / "style.safetensors", every=every, alphas=1.0)
    ours.load_custom(path)
    stock.load_lora_weights(path)
    assert np.abs(draw(ours, PROMPT) - draw(tiny_sd(), PROMPT)).max() > 1e-3
    assert np.abs(draw(ours, PROMPT) - draw(stock, PROMPT)).max() <= 1e-4


def test_loras_are_reported_and_combine_with_concepts(tmp_path: Path) -> None:
    pipe = tiny_sd()
    before = everything(pipe)
    path = made(pipe, tmp_path / "My Style.safetensors")
    pipe.load_custom(path, concept(pipe), weights=[0.5, 1.0])
    text = repr(pipe.custom)
    assert "my-style" in text and "in some style" in text and "<rex>" in text
    both = draw(pipe)
    one = tiny_sd().load_custom(concept(tiny_sd()))
    one.load_custom(path, weights=[0.5])
    assert np.abs(draw(one) - both).max() <= 1e-5
    pipe.load_custom(weights={"my-style": 0.0})
    assert np.abs(draw(pipe) - draw(tiny_sd().load_custom(concept(pipe)))).max() <= 1e-5
    pipe.unload_custom("my-style")
    assert [row.name for row in pipe.custom.rows] == ["rex"]
    pipe.unload_custom()
    assert_same(everything(pipe), before)


def test_two_files_under_new_names(tmp_path: Path) -> None:
    pipe = tiny_sd()
    path = made(pipe, tmp_path / "style.safetensors")
    pipe.load_custom(path, names=["ink"])
    pipe.load_custom(path, names=["ink"], weights=[2.0])  # the same one again
    pipe.load_custom(path)
    assert [(row.name, row.weight) for row in pipe.custom.rows] == [("ink", 2.0), ("style", 1.0)]
    with pytest.raises(ConceptError, match="invalid concept name 'My ink'"):
        pipe.load_custom(path, names=["My ink"])


def test_layer_names_are_mapped_once_for_many_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk for each layer of each file takes minutes on a large model."""
    paths = [made(tiny_sd(), tmp_path / f"{name}.safetensors") for name in "abcd"]
    walks: list[str] = []
    walk = Family.weight_shapes

    def counted(self: Family, component: str) -> dict[str, tuple[int, ...]]:
        walks.append(component)
        return walk(self, component)

    monkeypatch.setattr(Family, "weight_shapes", counted)
    tiny_sd().load_custom(paths[0])
    one = len(walks)
    tiny_sd().load_custom(*paths)
    assert 0 < len(walks) - one <= one


@pytest.mark.parametrize("fuse", [False, True])
def test_dora_is_exact_at_full_weight(fuse: bool, tmp_path: Path) -> None:
    """On the base's own weights, also while something else is fused into them."""
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    pipe = tiny_sd()
    before = everything(pipe)
    weight = before["unet weights"][f"{module}.weight"]
    generator = torch.Generator().manual_seed(3)
    up = torch.randn(weight.shape[0], 2, generator=generator)
    down = torch.randn(2, weight.shape[1], generator=generator)
    length = 1 + torch.rand(weight.shape[0], 1, generator=generator)
    tensors = {
        f"unet.{module}.lora_A.weight": down,
        f"unet.{module}.lora_B.weight": up,
        f"unet.{module}.lora_magnitude_vector": length.flatten(),
    }
    path = write_file(tmp_path / "dora.safetensors", tensors)
    rex = concept(pipe)
    pipe.load_custom(rex, fuse=True)
    pipe.load_custom(path, fuse=fuse)
    pipe.unload_custom("rex")
    turned = weight + up @ down
    expected = length * turned / turned.norm(dim=1, keepdim=True)
    layer = pipe.unet.get_submodule(module)
    inputs = torch.randn(4, weight.shape[1], generator=generator)
    with torch.no_grad():
        assert (layer(inputs) - inputs @ expected.T).abs().max() <= 1e-4
    pipe.unload_custom()
    assert_same(everything(pipe), before)


def test_dora_of_a_second_denoiser_uses_its_weights(tmp_path: Path) -> None:
    module = "blocks.0.attn1.to_q"
    pipe = tiny_wan("2.2-14b")
    layer = pipe.transformer_2.get_submodule(module)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach()
    generator = torch.Generator().manual_seed(3)
    up = torch.randn(weight.shape[0], 2, generator=generator)
    down = torch.randn(2, weight.shape[1], generator=generator)
    length = 1 + torch.rand(weight.shape[0], 1, generator=generator)
    key = f"transformer_2.{module}"
    tensors = {
        f"{key}.lora_A.weight": down,
        f"{key}.lora_B.weight": up,
        f"{key}.lora_magnitude_vector": length.flatten(),
    }
    pipe.load_custom(write_file(tmp_path / "dora.safetensors", tensors))
    turned = weight + up @ down
    expected = length * turned / turned.norm(dim=1, keepdim=True)
    inputs = torch.randn(4, weight.shape[1], generator=generator)
    with torch.no_grad():
        outputs = pipe.transformer_2.get_submodule(module)(inputs)
    assert (outputs - inputs @ expected.T - bias).abs().max() <= 1e-4


def test_refused_files_change_nothing(tmp_path: Path) -> None:
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe))
    before = everything(pipe)
    path = made(tiny_flux(), tmp_path / "flux.safetensors", every=5)
    with pytest.raises(ConceptError, match="looks like a LoRA of flux"):
        pipe.load_custom(path)
    tensors, _ = lora_tensors(family_of(pipe.components), diffusers_name, ENDS, every=9)
    tensors["unet.conv_in.set_weight"] = torch.ones(16)
    write_file(tmp_path / "bias.safetensors", tensors)
    with pytest.raises(CustomizeError, match="a file is not loaded in part"):
        pipe.load_custom(tmp_path / "bias.safetensors")
    assert_same(everything(pipe), before)
