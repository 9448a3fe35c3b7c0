"""The owners of the ranks of merged adapters."""

from __future__ import annotations

import pytest
import torch

from customize.concepts.types import Lora, LoraInfo
from customize.core.lowrank import LowRank
from customize.errors import PipelineError
from customize.families import family_of
from customize.pipeline.rank_channels import rank_channels
from customize.pipeline.state import get_state
from tests.pipeline.making import concept
from tests.recording import recorded_concepts
from tests.tiny import tiny_sd, tiny_sdxl


def channels(pipe):
    return rank_channels(family_of(pipe.components), get_state(pipe))


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_adapted_layer_has_the_ranks_of_both(make, dtype):
    pipe = make().to(dtype)
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1), weights=[0.5, 1.2], merge="sum")
    found = channels(pipe)
    family = family_of(pipe.components)
    expected = {
        (component, module)
        for component in family.adaptable
        for module in family.adapter_targets(component)
    }
    assert {(each.component, each.module) for each in found} == expected
    assert {each.owners for each in found} == {(0, 0, 1, 1)}


def test_layers_of_one_concept_and_weights_by_block():
    pipe = tiny_sd()
    off = {"unet": {"down": 0.0}}
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1), weights=[1.0, off], merge="sum")
    for each in channels(pipe):
        is_off = each.module.startswith("down_blocks")
        assert each.owners == ((0, 0) if is_off else (0, 0, 1, 1)), each.module


def test_channels_are_found_once_for_what_is_attached():
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1), merge="sum")
    first = channels(pipe)
    assert channels(pipe) is first
    for change in (
        lambda: pipe.load_custom(weights={"tom": 0.5}),
        lambda: pipe.load_custom(concept(pipe, "kit", index=2)),
        lambda: pipe.unload_custom("rex"),
    ):
        change()
        second = channels(pipe)
        assert second is not first
        first = second
    assert {each.owners for each in first} == {(0, 0, 1, 1)}


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_concepts_in_the_weights_have_channels_of_their_own(make):
    pipe = make()
    pipe.load_custom(concept(pipe), fuse=True)
    pipe.load_custom(concept(pipe, "tom", index=1))
    found = channels(pipe)
    fused = [each for each in found if each.fused is not None]
    assert 2 * len(fused) == len(found)
    assert {each.owners for each in fused} == {(0, 0)}
    assert {each.owners for each in found if each.fused is None} == {(1, 1)}


@pytest.mark.parametrize("fuse", [False, True])
def test_a_mask_multiplies_the_ranks_of_linear_layers_and_convolutions(fuse):
    pipe, generator = tiny_sd(), torch.Generator().manual_seed(3)
    layers = family_of(pipe.components).layers("unet")
    modules = ("down_blocks.0.downsamplers.0.conv", "mid_block.attentions.0.proj_in", "conv_in")
    updates = {
        module: LowRank(
            torch.randn(layers[module][0], 2, generator=generator),
            torch.randn(2, layers[module][1], generator=generator),
            0.5,
        )
        for module in modules
    }
    stock = pipe.unet.get_submodule(modules[0])
    inputs = torch.randn(2, stock.in_channels, 8, 8, generator=generator)
    base = stock(inputs)
    info = LoraInfo("mine", "sd", "", 2, trigger_words="red hat")
    pipe.load_custom(Lora(info, {"unet": updates}), fuse=fuse)
    layer = pipe.unet.get_submodule(modules[0])
    plain = layer(inputs)
    (channel,) = (each for each in channels(pipe) if each.module == modules[0])
    for mask, expected in ((1.0, plain), (0.0, base), (0.25, 0.25 * plain + 0.75 * base)):
        handle = channel.mask(lambda middle, mask=mask: torch.full_like(middle, mask))
        assert torch.allclose(layer(inputs), expected, atol=1e-4)
        handle.remove()
    handle = channel.mask(lambda middle: None)
    assert torch.equal(layer(inputs), plain)
    handle.remove()


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("method", ["fusion", "average"])
def test_entries_of_their_own_get_each_concept_as_it_is_alone(tmp_path, monkeypatch, method, fuse):
    pipe = tiny_sd()
    folders = recorded_concepts(pipe, tmp_path, monkeypatch)
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    inputs = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(3))
    alone = []
    for folder in folders:
        pipe.load_custom(folder)
        alone.append(pipe.unet.get_submodule(module)(inputs))
        pipe.unload_custom()
    stock = pipe.unet.get_submodule(module)(inputs)
    pipe.load_custom(*folders, merge=method, fuse=fuse)
    layer = pipe.unet.get_submodule(module)
    merged = layer(inputs)
    (channel,) = (each for each in channels(pipe) if each.module == module)
    entries = torch.tensor([True, False, True, False])
    for index, expected in enumerate(alone):
        mask = torch.tensor([float(owner == index) for owner in channel.owners])
        mask = torch.stack([mask, torch.ones(len(mask))] * 2)[:, None]
        handle = channel.mask(lambda middle, mask=mask: mask, lambda middle: entries)
        output = layer(inputs)
        handle.remove()
        assert torch.allclose(output[entries], expected[entries], atol=1e-5)
        assert torch.allclose(output[~entries], merged[~entries], atol=1e-6)
        assert not torch.allclose(expected, stock, atol=1e-3)
        assert not torch.allclose(merged - stock, sum(alone) - 2 * stock, atol=1e-3)
    assert torch.equal(layer(inputs), merged)


def test_a_sum_has_the_concepts_as_they_are():
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1), merge="sum")
    assert {each.own for each in channels(pipe)} == {None}


def test_concepts_of_one_slice_and_removed_adapters_are_refused():
    pipe = tiny_sd()
    with pytest.warns(UserWarning, match="share"):
        pipe.load_custom(concept(pipe), concept(pipe, "tom", index=0), merge="sum")
    with pytest.raises(PipelineError, match="the merge sum has mixed the concepts"):
        channels(pipe)
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1), merge="sum")
    pipe.unet.delete_adapters("customize")
    with pytest.raises(PipelineError, match="removed by someone else"):
        channels(pipe)
