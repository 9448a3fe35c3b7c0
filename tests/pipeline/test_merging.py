"""load_custom(merge=) by the methods that take all concepts together, on real, tiny pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from customize.concepts.merge.merge_concepts import merge_concepts
from customize.core.lowrank import to_dense
from customize.errors import ConfigError
from tests.pipeline.making import assert_same, concept, draw, everything
from tests.tiny import tiny_sd

NAME = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
TOGETHER = ("average", "truncate", "magnitude", "dare", "ties")
together = pytest.mark.parametrize("method", TOGETHER)


@pytest.fixture
def pair():
    """A pipeline, and two concepts."""
    pipe = tiny_sd()
    return pipe, concept(pipe), concept(pipe, "tom", index=1)


def change_of(pipe, before):
    """What the concepts do to one layer's weight."""
    layer = pipe.unet.get_submodule(NAME)
    if "customize" in getattr(layer, "scaling", {}):
        return layer.get_delta_weight("customize")
    return layer.weight - before["unet weights"][f"{NAME}.weight"]


@together
def test_fused_merges_are_exact_and_removed_bit_for_bit(pair, method):
    pipe, rex, tom = pair
    before = everything(pipe)
    pipe.load_custom(rex, tom, weights=[1.0, 0.5], merge=method, fuse=True)
    expected = to_dense(merge_concepts([rex, tom], [1.0, 0.5], method)["unet"][NAME])
    torch.testing.assert_close(change_of(pipe, before), expected, atol=1e-5, rtol=1e-4)
    assert f"merged by {method}" in repr(pipe.custom)
    pipe.load_custom(weights={"tom": 1.5})  # by the same method
    expected = to_dense(merge_concepts([rex, tom], [1.0, 1.5], method)["unet"][NAME])
    torch.testing.assert_close(change_of(pipe, before), expected, atol=1e-5, rtol=1e-4)
    pipe.unload_custom("tom")
    alone = to_dense(rex.updates["unet"][NAME])
    torch.testing.assert_close(change_of(pipe, before), alone, atol=1e-5, rtol=1e-4)
    pipe.unload_custom()
    assert_same(before, everything(pipe))


@together
def test_adapter_merges_are_the_best_approximation_at_the_rank_sum(pair, method):
    pipe, rex, tom = pair
    before, base = everything(pipe), draw(pipe)
    pipe.load_custom(rex, tom, merge=method)
    exact = to_dense(merge_concepts([rex, tom], [1.0, 1.0], method)["unet"][NAME])
    rank = rex.info.rank + tom.info.rank
    best = float(torch.linalg.svdvals(exact)[rank:].square().sum().sqrt())
    error = float(torch.linalg.matrix_norm(change_of(pipe, before) - exact))
    assert error <= 1.01 * best + 1e-4
    pruned = method in ("magnitude", "dare", "ties")
    assert (error > 1e-2) == pruned
    assert pipe.unet.get_submodule(NAME).lora_A["customize"].weight.shape[0] <= rank
    assert np.abs(draw(pipe) - base).max() > 1e-3
    pipe.unload_custom()
    assert_same(before, everything(pipe))


def test_settings_persist_with_the_method(pair):
    pipe, rex, tom = pair
    before = everything(pipe)
    pipe.load_custom(rex, tom, merge={"method": "dare", "density": 0.3, "seed": 5}, fuse=True)

    def expected(weight, **settings):
        return to_dense(merge_concepts([rex, tom], [1.0, weight], "dare", **settings)["unet"][NAME])

    first = change_of(pipe, before)
    torch.testing.assert_close(first, expected(1.0, density=0.3, seed=5), atol=1e-5, rtol=1e-4)
    pipe.load_custom(weights={"tom": 0.5})
    again = change_of(pipe, before)
    torch.testing.assert_close(again, expected(0.5, density=0.3, seed=5), atol=1e-5, rtol=1e-4)
    pipe.load_custom(merge="dare")  # its defaults again
    last = change_of(pipe, before)
    torch.testing.assert_close(last, expected(0.5), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ("slerp", "unknown merge method 'slerp'"),
        ({"density": 0.3}, "the merge has settings and no method.*one of auto, sum"),
        ({"method": "ties", "seed": 1}, "no setting seed"),
        ({"method": "auto", "seed": 1}, "no setting seed"),
        ({"method": "ties", "density": 2}, "invalid density 2"),
        ({"method": "truncate", "rank": 0}, "invalid rank 0"),
    ],
)
def test_invalid_merges_change_nothing(pair, merge, message):
    pipe, rex, tom = pair
    pipe.load_custom(rex)
    before = everything(pipe)
    with pytest.raises(ConfigError, match=message):
        pipe.load_custom(tom, merge=merge)
    assert_same(before, everything(pipe))


def test_joint_merges_need_one_mode(pair):
    pipe, rex, tom = pair
    pipe.load_custom(rex, fuse=True, merge="ties")
    before = everything(pipe)
    with pytest.raises(ConfigError, match="tom would be beside the weights"):
        pipe.load_custom(tom)
    assert_same(before, everything(pipe))
    pipe.load_custom(tom, fuse=True)
    assert "merged by ties" in repr(pipe.custom)
