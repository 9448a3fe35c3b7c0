"""Records of layer inputs on disk."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from customize.concepts.input_statistics import (
    HEADER,
    LayerInputs,
    digest_updates,
    layer_inputs_path,
    load_recorded_inputs,
)
from customize.concepts.io.write_concept import save_concept
from customize.concepts.merge.merge_concepts import merge_concepts
from customize.core.lowrank import distance, norm, weighted_sum
from customize.errors import ConceptError, ConfigError, StorageError
from tests.concepts.making import small

KEY = "own.unet.mid.attn1.to_q"


def record(concept, rows: int = 3, seed: int = 0) -> LayerInputs:
    generator = torch.Generator().manual_seed(seed)

    def factors():
        return {
            component: {
                module: torch.randn(rows, update.shape[1], generator=generator) / 10
                for module, update in updates.items()
            }
            for component, updates in concept.updates.items()
        }

    return LayerInputs(digest_updates(concept.updates), factors(), factors())


def test_round_trip(tmp_path):
    before = record(small())
    shared = before.concept["unet"]["mid.attn1.to_q"]
    before.concept["unet"]["mid.attn1.to_k"] = shared  # two layers that read the same tensor
    path = before.save(tmp_path / "layer_inputs.safetensors")
    after = LayerInputs.load(path)
    assert after.digest == before.digest
    for kind in ("concept", "generic"):
        old, new = getattr(before, kind), getattr(after, kind)
        assert {c: set(m) for c, m in old.items()} == {c: set(m) for c, m in new.items()}
        for component, layers in old.items():
            for module, rows in layers.items():
                read = new[component][module]
                assert read.dtype == torch.float32
                torch.testing.assert_close(read, rows, atol=1e-4, rtol=1e-3)
    assert after.concept["unet"]["mid.attn1.to_k"] is after.concept["unet"]["mid.attn1.to_q"]
    size = path.stat().st_size
    assert size < 2 * sum(rows.numel() for _, _, rows in flatten_factors(before)) + 3000
    before.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_size == size


def flatten_factors(inputs):
    return [
        (component, module, rows)
        for factors in (inputs.concept, inputs.generic)
        for component, layers in factors.items()
        for module, rows in layers.items()
    ]


def test_path_of_the_record(tmp_path):
    folder = save_concept(small(), tmp_path / "rex")
    single = save_concept(small(), tmp_path / "tom.v2.safetensors")
    assert layer_inputs_path(folder) == folder / "layer_inputs.safetensors"
    assert layer_inputs_path(single) == tmp_path / "tom.v2.layer_inputs.safetensors"
    with pytest.raises(ConceptError):
        layer_inputs_path(tmp_path / "nobody.safetensors")
    with pytest.raises(StorageError):
        record(small()).save(tmp_path / "missing" / "x.safetensors")


def test_digest_depends_only_on_the_updates():
    assert digest_updates(small().updates) == digest_updates(small(name="tom").updates)
    assert digest_updates(small().updates) != digest_updates(small(seed=1).updates)
    assert digest_updates(small().updates) != digest_updates(small(alpha=4.0).updates)


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({KEY: torch.ones(2, 8)}, None, "not a record of layer inputs"),
        (
            {KEY: torch.ones(2, 8)},
            {"version": 1, "of": "x"},
            "header of the record of layer inputs",
        ),
        ({KEY: torch.ones(2, 8)}, {"version": 2, "of": "x", "same": {}}, "version '2'"),
        ({KEY: torch.ones(2)}, {}, "key 'own.unet.mid.attn1.to_q' is invalid"),
        ({"some.unet.a": torch.ones(2, 8)}, {}, "key 'some.unet.a' is invalid"),
        ({"own.unet": torch.ones(2, 8)}, {}, "key 'own.unet' is invalid"),
        ({"x" * 200: torch.ones(2, 8)}, {}, "key 'x{80}' is invalid"),
        ({KEY: torch.full((2, 8), torch.inf)}, {}, "is not finite"),
        (
            {KEY: torch.ones(2, 8)},
            {"same": {"own.unet.a": "own.unet.b"}},
            "'own.unet.a' is invalid",
        ),
        ({KEY: torch.ones(2, 8)}, {"same": {KEY: KEY}}, "to_q' is invalid"),
        ({KEY: torch.ones(2, 8)}, {"same": 3}, "header of the record of layer inputs"),
        ({KEY: torch.ones(2, 8)}, {"same": {"own.unet.a": []}}, "invalid at 'same.own.unet.a'"),
        (
            {KEY: torch.ones(2, 8)},
            {"same": [["own.unet.a", KEY]]},
            "header of the record of layer inputs",
        ),
        ({KEY: torch.ones(2, 8, dtype=torch.int64)}, {}, "type torch.int64 is not a floating"),
        (
            {KEY: torch.ones(2, 8, dtype=torch.complex64)},
            {},
            "type torch.complex64 is not a floating",
        ),
        ({KEY: torch.ones(2, 0)}, {}, "is not a floating-point matrix"),
        ({KEY: torch.full((2, 8), 1e30)}, {}, "energy 1.6e"),
        ({KEY: torch.full((2, 8), 1e300, dtype=torch.float64)}, {}, "not finite"),
    ],
)
def test_invalid_records_are_refused(tmp_path, tensors, header, message):
    path = tmp_path / "x.safetensors"
    whole = None
    if header is not None:
        defaults = {"version": 1, "of": "x", "same": {}} if set(header) <= {"same"} else {}
        whole = {HEADER: json.dumps(defaults | header)}
    save_file(tensors, path, whole)
    with pytest.raises(ConceptError, match=message):
        LayerInputs.load(path)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("inputs") / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ConceptError):
        LayerInputs.load(path)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text",
    [
        '{"version": 1, "of": "x", "same": ' + DEEP + "}",
        '{"version": 1, "of": "x", "same": {}, "more": ' + DEEP + "}",
        DEEP,
        '{"version": ' + "9" * 5000 + ', "of": "x", "same": {}}',
        '{"version": 1e999, "of": "x", "same": {}}',
        '{"version": NaN, "of": "x", "same": {}}',
        '{"version": true, "of": "x", "same": {}}',
        '{"version": 1, "of": {"a": 1}, "same": {}}',
        '{"version": 1, "of": "\\ud800", "same": {}}',
        "null",
        "",
    ],
)
def test_invalid_headers_are_refused(tmp_path, text):
    path = tmp_path / "x.safetensors"
    save_file({KEY: torch.ones(2, 8)}, path, {HEADER: text})
    with pytest.raises(ConceptError, match=r"x\.safetensors.*customize record") as caught:
        LayerInputs.load(path)
    assert len(str(caught.value)) < 1000


# Arbitrary values of a field.
odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.bool]


@st.composite
def mutated(draw):
    """The tensors and the header of a record with arbitrary values."""
    tensors = {}
    for key in draw(
        st.lists(st.sampled_from(["own.unet.a", "generic.unet.a", "own.", "x.y.z", "own"]))
    ):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        rows = torch.full(shape, draw(st.sampled_from([0.1, 0.0, 1e30, float("nan")])))
        tensors[key] = rows.to(draw(st.sampled_from(DTYPES)))
    header = {"version": 1, "of": "x", "same": {}}
    for key in draw(st.lists(st.sampled_from([*header, "more"]), max_size=2)):
        header[key] = draw(odd | st.just({"own.unet.b": "own.unet.a"}))
    for key in draw(st.lists(st.sampled_from(sorted(header)), max_size=1)):
        del header[key]
    return tensors, draw(st.just(header) | odd)


@settings(deadline=None, max_examples=200)
@given(mutated())
def test_arbitrary_record_is_valid_or_refused(tmp_path_factory, tensors_and_header):
    tensors, header = tensors_and_header
    path = tmp_path_factory.mktemp("inputs") / "x.safetensors"
    save_file(tensors, path, {HEADER: json.dumps(header)})
    try:
        loaded = LayerInputs.load(path)
    except ConceptError as error:
        assert error.where and str(path) in error.where and error.fix
        return
    for _, _, rows in flatten_factors(loaded):
        assert rows.dtype == torch.float32 and rows.ndim == 2 and bool(torch.isfinite(rows).all())


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_mutated_record_is_valid_or_refused(tmp_path_factory, data):
    path = record(small()).save(tmp_path_factory.mktemp("inputs") / "x.safetensors")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 8))
    path.write_bytes(bytes(content[: len(content) - cut]))
    try:
        loaded = LayerInputs.load(path)
    except ConceptError as error:
        assert error.where and error.fix
        return
    for _, _, rows in flatten_factors(loaded):
        assert rows.ndim == 2 and bool(torch.isfinite(rows).all())


def test_record_of_other_widths_is_refused_with_the_layer(tmp_path):
    rex = small()
    for kind in ("concept", "generic"):
        odd_one = record(rex)
        layers = getattr(odd_one, kind)["unet"]
        layers["mid.attn1.to_q"] = layers["mid.attn1.to_q"].repeat(1, 2)
        folder = save_concept(rex, tmp_path / kind)
        odd_one.save(folder / "layer_inputs.safetensors")
        with pytest.raises(ConceptError, match=r"inputs of width 16 for a layer of width 8.*to_q"):
            load_recorded_inputs("rex", rex.updates, folder)
        tom = small(seed=1, name="tom", trigger="<tom>")
        with pytest.raises(ConceptError, match="inputs of width 16, and the layer has width 8"):
            merge_concepts([rex, tom], [1.0, 1.0], "fusion", [odd_one, record(tom, seed=1)])


def test_fusion_needs_a_record_per_concept():
    rex, tom = small(), small(seed=1, name="tom", trigger="<tom>")
    with pytest.raises(
        ConfigError,
        match="the merge fusion of 2 concepts needs as many records of layer inputs, not 1",
    ):
        merge_concepts([rex, tom], [1.0, 1.0], "fusion", [record(rex)])


def test_layers_without_a_record_are_summed():
    rex, tom = small(), small(seed=1, name="tom", trigger="<tom>")
    records = [record(rex), record(tom, seed=1)]
    del records[1].concept["unet"]["mid.attn1.to_q"]
    fused = merge_concepts([rex, tom], [1.0, 0.5], "fusion", records)
    updates = [c.updates["unet"]["mid.attn2.to_out.0"] for c in (rex, tom)]
    merged = fused["unet"]["mid.attn2.to_out.0"]
    assert distance(merged, weighted_sum(updates, [1.0, 0.5])) > 0.1 * norm(merged)
    # The inputs of tom's layer are unknown, so its update is added to the fused update of rex.
    half = fused["unet"]["mid.attn1.to_q"]
    only = merge_concepts([rex], [1.0], "fusion", records[:1], records[1:])["unet"][
        "mid.attn1.to_q"
    ]
    added = tom.updates["unet"]["mid.attn1.to_q"]
    assert distance(half, weighted_sum([only, added], [1.0, 0.5])) < 1e-5 * norm(half)
