"""Crosstalk measures agree with their dense definitions and vanish for disjoint slices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.core.bases import block, cosine, down_projection
from customize.core.crosstalk import (
    overlap_matrix,
    relative_responses,
    response_norms,
    row_overlap,
    update_overlap,
)
from customize.core.lowrank import LowRank, to_dense
from customize.errors import ConceptError


@st.composite
def pairs(draw):
    """Two updates of one layer, and recorded inputs of it, in float64."""
    out, width = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    p, q = (
        LowRank(normal(out, rank), normal(rank, width), draw(st.sampled_from([0.5, -1.0, 3.0])))
        for rank in (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    )
    return p, q, normal(draw(st.integers(1, 6)), width)


def ratio(p, q):
    dense_p, dense_q = to_dense(p), to_dense(q)
    return (
        torch.linalg.matrix_norm(dense_p @ dense_q.T) / (dense_p.norm() * dense_q.norm())
    ).item()


@settings(deadline=None)
@given(pairs())
def test_measures_match_their_definitions(case):
    p, q, inputs = case
    assert update_overlap(p, q) == pytest.approx(ratio(p, q), rel=1e-9, abs=1e-12)
    assert update_overlap(p, q) == pytest.approx(update_overlap(q, p))
    assert 0 <= update_overlap(p, q) <= 1 + 1e-9
    dense = [(to_dense(update) @ inputs.T).norm().item() for update in (p, q)]
    assert relative_response(p, q, inputs) == pytest.approx(dense[1] / dense[0], rel=1e-6)
    # Orthogonal rows of unit length, by their projectors.
    orthonormal = [torch.linalg.qr(update.down.T).Q.T for update in (p, q)]
    projectors = [rows.T @ rows for rows in orthonormal]
    lengths = [((rows @ m).norm(dim=1) ** 2) for rows in orthonormal for m in projectors]
    expected = torch.stack([torch.cat(lengths[::2]), torch.cat(lengths[1::2])], dim=1)
    found = row_overlap([3.0 * orthonormal[0], orthonormal[1]])
    assert torch.allclose(found.double(), expected, atol=1e-5)


@settings(deadline=None)
@given(pairs(), st.sampled_from([0.5, -3.0, 1e-3, 1e4]))
def test_overlaps_do_not_depend_on_scales(case, factor):
    p, q, _ = case
    larger = LowRank(p.up, p.down, p.scale * factor)
    assert update_overlap(larger, q) == pytest.approx(update_overlap(p, q), abs=1e-9)
    half = [torch.linalg.qr(update.down.T).Q.T for update in (p, q)]
    assert torch.allclose(row_overlap([half[0] * factor, half[1]]), row_overlap(half), atol=1e-5)


def relative_response(p, q, inputs):
    """The response of q to inputs of p, divided by that of p."""
    inputs = {name: {"layer": inputs} for name in "pq"}
    norms = response_norms({"p": {"layer": p}, "q": {"layer": q}}, inputs)
    return relative_responses(norms)[0, 1].item()


def concept(index, rank=4, width=32, out=16, seed=0):
    generator = torch.Generator().manual_seed(seed + index)
    down = down_projection(cosine, width, block(index, width, rank), 0)
    return LowRank(torch.randn(out, rank, generator=generator), down)


def test_disjoint_slices_have_no_overlap_but_respond_to_each_others_inputs():
    p, q = concept(0), concept(1)
    assert row_overlap([p.down, q.down])[:4, 1].max() < 1e-10
    assert update_overlap(p, q) < 1e-6
    generator = torch.Generator().manual_seed(5)
    anything = torch.randn(64, 32, generator=generator)
    assert relative_response(p, q, anything) > 0.5
    beside = anything - anything @ q.down.T @ q.down  # the assumption of the paper's section 3.3
    assert relative_response(p, q, beside) < 1e-5


def test_row_overlap_of_shared_columns():
    a, b = (down_projection(cosine, 32, columns, 0) for columns in ((0, 1, 4, 5), range(4)))
    found = row_overlap([a, b, torch.zeros(2, 32)])
    assert found.shape == (10, 3) and found.dtype == torch.float32
    expected = torch.zeros(10, 3)
    expected[:4, 0] = expected[4:8, 1] = expected[:2, 1] = expected[4:6, 0] = 1.0
    assert torch.allclose(found, expected, atol=1e-6)
    assert found.max() <= 1.0


def test_updates_of_zeros_have_no_crosstalk():
    p, zero = concept(0), LowRank(torch.zeros(16, 4), torch.zeros(4, 32))
    inputs = torch.ones(3, 32)
    assert row_overlap([p.down, zero.down])[:, 1].abs().max() == 0.0
    assert update_overlap(p, zero) == update_overlap(zero, zero) == 0.0
    assert relative_response(p, zero, inputs) == 0.0
    assert relative_response(zero, zero, inputs) == 0.0
    assert relative_response(zero, p, inputs) == math.inf


def test_overlap_matrix_is_the_energy_weighted_root_mean_square():
    torch.manual_seed(0)

    def update(out, rank, width, scale):
        up, down = torch.randn(out, rank).double(), torch.randn(rank, width).double()
        return LowRank(up, down, scale)

    concepts = {
        "rex": {"a": update(6, 2, 8, 1.0), "b": update(4, 3, 5, 0.1), "own": update(3, 1, 3, 9.0)},
        "tom": {"b": update(4, 1, 5, 2.0), "a": update(6, 4, 8, 0.5)},
        "bob": {"b": update(4, 9, 5, 1.0)},  # a rank above the layer's
    }
    table = overlap_matrix(concepts)
    assert table.shape == (3, 3)
    assert table.dtype == torch.float64
    for i, first in enumerate(concepts.values()):
        for j, second in enumerate(concepts.values()):
            crossed = energy = 0.0
            for layer in first.keys() & second.keys():
                dense = to_dense(first[layer]), to_dense(second[layer])
                crossed += (dense[0] @ dense[1].T).norm().item() ** 2
                energy += (dense[0].norm() * dense[1].norm()).item() ** 2
            assert table[i, j].item() == pytest.approx(math.sqrt(crossed / energy), rel=1e-9)


def test_overlap_matrix_without_common_layers():
    assert overlap_matrix({}).shape == (0, 0)
    apart = {"rex": {"a": concept(0)}, "tom": {"b": concept(0)}, "new": {}}
    assert overlap_matrix(apart).fill_diagonal_(0).abs().max() == 0
    disjoint = {f"c{i}": {"a": concept(i), "b": concept(i, seed=9)} for i in range(4)}
    table = overlap_matrix(disjoint)
    assert (table.diagonal() >= 0.5 - 1e-9).all()  # at least 1 / sqrt(rank)
    assert table.fill_diagonal_(0).max() < 1e-6


def test_mismatched_shapes_are_refused():
    p, q = concept(0), concept(0, width=40)
    with pytest.raises(ConceptError, match="same input"):
        row_overlap([p.down, q.down])
    with pytest.raises(ConceptError, match="same input"):
        row_overlap([p.down, p.down[0]])
    with pytest.raises(ConceptError, match="one weight"):
        update_overlap(p, q)
    with pytest.raises(ConceptError, match="width 32"):
        relative_response(p, p, torch.zeros(3, 40))
    with pytest.raises(ConceptError, match="width 32"):
        relative_response(p, p, torch.zeros(32))
    with pytest.raises(ConceptError, match="one weight"):
        overlap_matrix({"rex": {"a": p}, "tom": {"a": q}})


def test_response_norms_match_dense_products():
    generator = torch.Generator().manual_seed(4)
    products = {
        name: {
            layer: LowRank(
                torch.randn(5, 2, generator=generator), torch.randn(2, 7, generator=generator), 0.5
            )
            for layer in layers
        }
        for name, layers in (("a", ("x", "y", "z")), ("b", ("x", "y")), ("c", ("y", "x", "w")))
    }
    inputs = {
        name: {layer: torch.randn(3, 7, generator=generator) for layer in layers}
        for name, layers in products.items()
    }
    del inputs["b"]["y"]
    found = response_norms(products, inputs)
    assert list(found) == ["x"]  # the only one that all change, with inputs of each
    names = list(products)
    for i, name in enumerate(names):
        for j, other in enumerate(names):
            p = products[other]["x"]
            expected = (0.5 * p.up @ p.down @ inputs[name]["x"].T).norm()
            assert found["x"][i, j].item() == pytest.approx(float(expected), rel=1e-5)
            ratio = relative_response(products[name]["x"], p, inputs[name]["x"])
            assert relative_responses(found)[i, j].item() == pytest.approx(ratio, rel=1e-5)
    with pytest.raises(ConceptError, match="do not enter a layer of width 7"):
        response_norms(products, inputs | {"a": {"x": torch.ones(2, 3)}})


def test_relative_responses_over_layers():
    layers = {
        "x": torch.tensor([[3.0, 4.0], [0.0, 0.0]]),
        "y": torch.tensor([[4.0, 3.0], [2.0, 0.0]]),
    }
    found = relative_responses(layers)
    assert found[0].tolist() == [1.0, 1.0]
    assert found[1].tolist() == [math.inf, 1.0]  # b itself does nothing, and a does
    assert relative_responses({}).shape == (0, 0)


def test_results_are_float64_in_the_order_of_concepts():
    assert relative_responses({}).dtype == torch.float64
    p, inputs = concept(0), torch.ones(2, 32)
    products = {"a": {"x": p}, "b": {"x": concept(1), "y": p}}
    norms = response_norms(products, {"a": {"x": inputs}, "b": {"x": inputs, "y": inputs}})
    assert list(norms) == ["x"] and norms["x"].dtype == torch.float64
    assert response_norms(products, {"a": {"x": inputs}}) == {}  # no inputs of b at all
    swapped = response_norms(
        dict(reversed(products.items())), {"a": {"x": inputs}, "b": {"x": inputs}}
    )
    assert list(swapped) == ["x"] and torch.equal(swapped["x"].flip(0, 1), norms["x"])


def test_layers_that_a_concept_lacks_are_skipped_and_later_ones_counted():
    p, q, inputs = concept(0), concept(1), torch.ones(2, 32)
    products = {"a": {"x": p, "y": p}, "b": {"y": q}}
    records = {name: {"x": inputs, "y": inputs} for name in "ab"}
    assert list(response_norms(products, records)) == ["y"]


def test_small_responses_are_divided_too():
    layers = {"x": torch.tensor([[0.25, 0.125], [0.0, 0.5]], dtype=torch.float64)}
    assert relative_responses(layers).tolist() == [[1.0, 0.5], [0.0, 1.0]]
    small = {name: {"a": LowRank(0.01 * concept(0).up, concept(0).down)} for name in ("c", "d")}
    table = overlap_matrix(small)
    assert table[0, 1] == pytest.approx(update_overlap(small["c"]["a"], small["d"]["a"]))


def test_the_shapes_that_do_not_match_are_named():
    with pytest.raises(ConceptError, match=r"shapes \(4, 32\), \(2, 40\) do not read"):
        row_overlap([torch.zeros(4, 32), torch.zeros(2, 40)])


def test_one_concept_responds_to_its_own_inputs():
    p, inputs = concept(0), torch.eye(32)[:3]
    norms = response_norms({"a": {"x": p}}, {"a": {"x": inputs}})
    expected = (to_dense(p) @ inputs.T).norm().item()
    assert norms["x"].tolist() == [[pytest.approx(expected)]]
    assert relative_responses(norms).tolist() == [[1.0]]


def test_overlaps_of_a_layer_that_the_first_concept_lacks():
    concepts = {"a": {"x": concept(0)}, "b": {"y": concept(1)}, "c": {"y": concept(1, seed=9)}}
    table = overlap_matrix(concepts)
    overlap = ratio(concepts["b"]["y"], concepts["c"]["y"])
    assert table[1, 2].item() == pytest.approx(overlap, rel=1e-5) and overlap > 0.1
    assert table[0, 1] == table[0, 2] == 0.0
