"""The owners of the ranks of merged adapters."""

from __future__ import annotations

import pytest
import torch

from customize.errors import PipelineError
from customize.families import family_of
from customize.pipeline.rank_channels import rank_channels
from customize.pipeline.state import get_state
from tests.pipeline.making import concept
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
