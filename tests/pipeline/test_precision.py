"""Concepts on pipelines whose callers have set something of torch: the same, undone whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import customize
from customize.training.recipe import train
from tests.contexts import CONTEXTS
from tests.pipeline.making import assert_same, concept, everything
from tests.tiny import drawn, tiny_sd
from tests.training.runs import settings

pytestmark = pytest.mark.usefixtures("quick_recordings")

PROMPT = "a photo of <rex> and a red car on the beach"
#: How concepts are merged, and whether into the weights.
MERGES = {
    "fusion": {"merge": "fusion"},
    "ties": {"merge": "ties"},
    "dare-fused": {"merge": "dare", "fuse": True},
    "sum-fused": {"merge": "sum", "fuse": True},
}
CALLS = {
    "plain": {},
    "regions": {"regions": {"<rex>": (0, 0, 0.5, 1), "red car": (0.5, 0, 1, 1)}},
    "avoid": {"avoid": ["grass"]},
    "library": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two concepts with records beside them."""
    folder = tmp_path_factory.mktemp("concepts")
    for seed, name in enumerate(("rex", "tom")):
        config = settings(folder, name, name=name, seed=seed, steps=2, record_inputs=True)
        train(config, tiny_sd().components, progress=False)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    """What a pipeline is made of after each merge, loaded outside of any context."""
    facts = {}
    for name, options in MERGES.items():
        facts[name] = everything(tiny_sd().load_custom(folder / "rex", folder / "tom", **options))
    return facts


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("merge", MERGES)
def test_loading_is_bitwise_independent_of_precision_contexts(merge, context, folder, loaded):
    pipe = tiny_sd()
    before = everything(pipe)
    with CONTEXTS[context]():
        pipe.load_custom(folder / "rex", folder / "tom", **MERGES[merge])
    assert_same(loaded[merge], everything(pipe))
    with CONTEXTS[context]():
        pipe.unload_custom()
    assert_same(before, everything(pipe))


def draw(pipe, call):
    noise = torch.Generator().manual_seed(1)
    size = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    return np.asarray(drawn(pipe, PROMPT, generator=noise, **size, **call)[0], dtype=np.float64)


def customized(call, folder):
    pipe = tiny_sd()
    if call == "library":
        return pipe.load_custom(library=folder)
    for index, name in enumerate(("rex", "tom")):
        pipe.load_custom(concept(pipe, name, index=index), merge="sum")
    return pipe


@pytest.fixture(scope="module")
def pipes(folder):
    """A customized pipeline for each kind of call."""
    return {name: customized(name, folder) for name in CALLS}


@pytest.fixture(scope="module")
def pictures(pipes):
    return {name: draw(pipes[name], call) for name, call in CALLS.items()}


#: Nothing is drawn by plain diffusers on the meta device.
@pytest.mark.parametrize("context", [name for name in CONTEXTS if name != "meta-device"])
@pytest.mark.parametrize("call", CALLS)
def test_calls_draw_the_same_in_precision_contexts(call, context, pipes, pictures):
    pipe = pipes[call]
    with CONTEXTS[context]():
        drawn = draw(pipe, CALLS[call])
    # Of an interval of 1: what rounding to 8 and to 11 bits makes of it in two steps. CPUs with
    # bfloat16 products use them for float32 if TF32 is allowed.
    allowed = {"autocast-bf16": 0.1, "autocast-fp16": 0.015, "tf32": 0.1}.get(context, 0.0)
    assert np.abs(drawn - pictures[call]).max() <= allowed
    assert np.array_equal(draw(pipe, CALLS[call]), pictures[call])


@pytest.mark.parametrize("fuse", [False, True])
def test_models_created_in_inference_mode_are_customized_and_restored(fuse):
    with torch.inference_mode():
        pipe = tiny_sd()
    before, plain = everything(pipe), draw(pipe, {})
    pipe.load_custom(concept(pipe), fuse=fuse)
    with torch.inference_mode():
        pipe.load_custom(concept(pipe, "tom", index=1), fuse=fuse, merge="sum")
    assert not np.array_equal(draw(pipe, {}), plain)
    pipe.unload_custom()
    assert_same(before, everything(pipe))


def test_weights_changed_within_autocast_are_not_cached():
    pipe = tiny_sd()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = draw(pipe, {})
        pipe.load_custom(concept(pipe), fuse=True)
        inside = draw(pipe, {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(draw(pipe, {}), inside)
    assert not np.array_equal(before, inside)


@pytest.fixture(scope="module")
def recorded(folder):
    """Layer inputs that are recorded outside of any context."""
    return customize.record_inputs(tiny_sd(), folder / "rex")


@pytest.mark.parametrize("context", ["autocast-bf16", "inference", "float64", "tf32"])
def test_recorded_inputs_are_independent_of_precision_contexts(context, folder, recorded):
    pipe = tiny_sd()
    allowed = 1e-2 if context == "tf32" else 1e-4  # the model runs with the caller's setting
    with CONTEXTS[context]():
        two = customize.record_inputs(pipe, folder / "rex")
    for kind in ("concept", "generic"):
        for component, layers in getattr(recorded, kind).items():
            for module, rows in layers.items():
                again = getattr(two, kind)[component][module]
                assert again.dtype == torch.float32 and not again.is_inference()
                torch.testing.assert_close(rows.T @ rows, again.T @ again, atol=allowed, rtol=0)
