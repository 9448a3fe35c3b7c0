"""Training with compiled blocks. torch's own backend takes a minute here, and is left to the slow
tests; aot_eager traces and splits forward and backward passes as it does, and compiles nothing."""

import pytest
import torch

from customize.base.quantization import quantize_model
from customize.errors import ConfigError
from customize.families import family_of
from customize.training import compile_blocks
from customize.training.compile_blocks import compiled_blocks, repeated_blocks
from customize.training.recipe import train
from tests.base.test_quantization import kind_param
from tests.tiny import tiny_flux, tiny_sd
from tests.tiny_families import TINY_FAMILIES
from tests.training.runs import (
    assert_unchanged,
    make_various,
    settings,
    snapshot,
    tensors,
)

pytestmark = pytest.mark.usefixtures("short_padding")

SLOW = pytest.mark.slow
BACKENDS = [pytest.param("inductor", marks=SLOW), "aot_eager"]
#: Other families use the same code and are slower.
ALL = [pytest.param(m, id=k, marks=[SLOW] * (k != "flux")) for k, m in TINY_FAMILIES.items()]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def almost_equal(a, b, tolerance=0.01):
    """Whether two concepts are the same to rounding, layer by layer in the Frobenius norm.

    Not number by number: Adam makes a whole step of a gradient near zero, whose sign is rounding's.
    """
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all((a[k] - b[k]).norm() <= tolerance * a[k].norm() for k in a)


@pytest.mark.parametrize("make", TINY_FAMILIES.values(), ids=TINY_FAMILIES)
def test_repeated_blocks_contain_most_adapter_layers_in_every_family(make):
    pipe = make()
    family = family_of(pipe.components, pipe.config)
    for key, denoiser in family.denoisers.items():
        inside = {id(part) for block in repeated_blocks(denoiser) for part in block.modules()}
        layers = [denoiser.get_submodule(name) for name in family.adapter_targets(key)]
        assert sum(id(layer) in inside for layer in layers) >= 0.5 * len(layers)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", ALL)
def test_compilation_gives_the_same_concept_and_restores_the_model(
    make, backend, tmp_path, monkeypatch
):
    monkeypatch.setattr(compile_blocks, "_BACKEND", backend)
    pipe = make()
    blocks = repeated_blocks(family_of(pipe.components, pipe.config).denoiser)
    before = snapshot(pipe.components, pipe.config), [sorted(vars(block)) for block in blocks]
    arguments = {"progress": False, "pipeline_config": pipe.config}
    plain = train(settings(tmp_path, "a", steps=3), pipe.components, **arguments)
    assert not torch._dynamo.utils.counters["stats"]
    config = settings(tmp_path, "b", steps=3, compile=True, gradient_checkpointing=True)
    fast = train(config, pipe.components, **arguments)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert almost_equal(plain, fast)
    assert_unchanged(before[0], pipe.components, pipe.config)
    assert [sorted(vars(block)) for block in blocks] == before[1]


@SLOW
def test_all_bucket_sizes_use_one_compiled_block(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_blocks, "_BACKEND", "aot_eager")
    make_various(tmp_path)
    changes = {"buckets": True, "steps": 8}
    plain = train(settings(tmp_path, "a", **changes), tiny_flux().components, progress=False)
    config = settings(tmp_path, "b", compile=True, **changes)
    assert almost_equal(plain, train(config, tiny_flux().components, progress=False))


@SLOW
@pytest.mark.parametrize("kind", [kind_param("nf4"), kind_param("int8")])
def test_quantized_blocks_are_compiled(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_blocks, "_BACKEND", "aot_eager")
    pipe = tiny_flux()
    quantize_model(pipe.transformer, kind, torch.float32, torch.device("cpu"))
    plain = train(settings(tmp_path, "a", steps=3), pipe.components, progress=False)
    config = settings(tmp_path, "b", steps=3, compile=True)
    assert almost_equal(plain, train(config, pipe.components, progress=False))


def test_models_compiled_by_the_user_stay_compiled():
    pipe = tiny_flux()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    blocks = repeated_blocks(pipe.transformer)
    theirs = [block._compiled_call_impl for block in blocks]
    with compiled_blocks([pipe.transformer]):
        assert all(
            block._compiled_call_impl is not call
            for block, call in zip(blocks, theirs, strict=True)
        )
    assert [block._compiled_call_impl for block in blocks] == theirs


def test_a_missing_compiler_is_reported_before_loading(tmp_path, monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("No working C++ compiler found\nin many lines")

    monkeypatch.setattr(compile_blocks, "_BACKEND", no_compiler)
    pipe = tiny_sd()
    before = snapshot(pipe.components)
    with pytest.raises(ConfigError, match=r"cannot compile for the device cpu: .*C\+\+ compiler"):
        train(settings(tmp_path, compile=True), pipe.components, progress=False)
    assert_unchanged(before, pipe.components)
