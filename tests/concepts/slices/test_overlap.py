"""Overlaps of slices, measured from their columns."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from customize.concepts.concept_info import BasisInfo
from customize.concepts.io.write_concept import save_concept
from customize.concepts.library.library_check import check_library
from customize.concepts.slices.allocation import slice_columns
from customize.concepts.slices.overlap import down_projections, find_overlaps
from customize.concepts.types import Concept
from customize.core.avoiding_slices import scaled_down_projection
from customize.core.bases import BASES
from customize.core.input_moment import InputMoment
from customize.core.lowrank import LowRank
from tests.concepts.making import facts

AVOID, RANK, WIDTHS = 4, 4, (64, 96)


def directions(noise: float = 0.0, *, seed: int = 0) -> dict[int, Tensor]:
    """The leading directions of inputs, with noise like the rounding of another machine.

    Args:
        noise: Standard deviation of the noise, relative to the inputs.
        seed: Seed of the inputs.
    """
    factors = {}
    for width in WIDTHS:
        generator = torch.Generator().manual_seed(width + 1000 * seed)
        strengths = torch.linspace(8, 2, 6)
        strengths = torch.cat([strengths, torch.full((width - 6,), 0.1)])
        axes, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
        rows = torch.randn(500, width, generator=generator) * strengths @ axes
        other = torch.Generator().manual_seed(99)
        rows = rows * (1 + noise * torch.randn(rows.shape, generator=other))
        moment = InputMoment(width)
        moment.add(rows)
        factors[width] = moment.factor(32)
    return factors


def sliced(
    name: str, index: int, inputs: dict[int, Tensor], shared: str, avoid: int = AVOID, **basis
) -> Concept:
    """A concept of two layers per width that avoids the shared directions."""
    info = BasisInfo(num_shared_directions=avoid, shared_directions=shared, **basis)
    columns = slice_columns(WIDTHS, RANK, index=index, name=name, avoid=avoid)
    downs = {
        width: scaled_down_projection(
            BASES[info.kind], inputs[width], numbers, info.seed, avoid=avoid
        )
        for width, numbers in columns.items()
    }
    generator = torch.Generator().manual_seed(sum(name.encode()))
    products = {
        "unet": {
            f"mid.{number}.w{width}.to_q": LowRank(
                torch.randn(8, RANK, generator=generator), downs[width], 1.0
            )
            for number, width in product(range(2), WIDTHS)
        }
    }
    values = facts(
        name=name,
        trigger=f"<{name}>",
        basis=info,
        rank=RANK,
        alpha=float(RANK),
        slices={str(width): list(numbers) for width, numbers in columns.items()},
        num_tokens=0,
    )
    return Concept(values, products, {})


A, B = "a" * 16, "b" * 16


@pytest.mark.parametrize("noise", [1e-6, 1e-5, 1e-4])
def test_equal_columns_of_two_recordings_collide(noise) -> None:
    rex = sliced("rex", 0, directions(), A)
    zig = sliced("zig", 0, directions(noise), B)
    assert not torch.equal(*(next(iter(c.updates["unet"].values())).down for c in (rex, zig)))
    (collision,) = find_overlaps([rex, zig])
    assert collision.columns == {64: (0, 1, 2, 3), 96: (0, 1, 2, 3)}
    assert "4 of 4 columns at width 64" in collision.problem and "--library" in collision.fix


@pytest.mark.parametrize("noise", [1e-6, 1e-5, 1e-4])
def test_different_columns_of_two_recordings_do_not_collide(noise) -> None:
    rex = sliced("rex", 0, directions(), A)
    assert find_overlaps([rex, sliced("zig", 1, directions(noise), B)]) == []


def test_rotated_directions_make_columns_overlap() -> None:
    rex = sliced("rex", 0, directions(), A, avoid=8)
    turned = {width: rows.flip(0) for width, rows in directions(seed=1).items()}
    for shared, why in ((B, "recorded separately"), (A, "differ from their facts")):
        (collision,) = find_overlaps([rex, sliced("zig", 1, turned, shared, avoid=8)])
        assert collision.columns == {} and why in collision.problem
        assert "times as much as slices drawn at random" in collision.problem


def test_columns_take_precedence_over_facts() -> None:
    inputs = directions()
    rex, zig = sliced("rex", 0, inputs, A), sliced("zig", 1, inputs, A)
    columns = rex.info.slices
    info = zig.info.model_copy(update={"slices": columns})
    assert find_overlaps([rex, Concept(info, zig.updates, {})]) == []
    info = rex.info.model_copy(update={"name": "max", "slices": zig.info.slices})
    (collision,) = find_overlaps([rex, Concept(info, rex.updates, {})])
    assert collision.columns == {64: (0, 1, 2, 3), 96: (0, 1, 2, 3)}


def test_collision_of_different_matrices_names_them() -> None:
    inputs = directions()
    rex = sliced("rex", 0, inputs, A)
    (collision,) = find_overlaps([rex, sliced("zig", 1, inputs, A, seed=9)])
    assert (
        "different orthogonal matrices (cosine with seed 0, cosine with seed 9)"
        in collision.problem
    )
    assert "--orthogonal-matrix cosine, --matrix-seed 0" in collision.fix


def test_partially_shared_columns_and_disjoint_layers() -> None:
    inputs = directions()
    rex = sliced("rex", 0, inputs, A)
    zig = sliced("zig", 1, inputs, A)
    layers = list(zig.updates["unet"])
    mixed = {
        layer: LowRank(
            update.up,
            torch.cat([rex.updates["unet"][layer].down[:1], update.down[1:]])
            if layer == layers[0]
            else update.down,
            1.0,
        )
        for layer, update in zig.updates["unet"].items()
    }
    (collision,) = find_overlaps([rex, Concept(zig.info, {"unet": mixed}, {})])
    assert collision.columns == {64: (0,)}
    elsewhere = {f"other.{layer}": update for layer, update in rex.updates["unet"].items()}
    info = rex.info.model_copy(update={"name": "max"})
    assert find_overlaps([rex, Concept(info, {"unet": elsewhere}, {})]) == []


def test_library_check_reports_overlaps(tmp_path) -> None:
    save_concept(sliced("rex", 0, directions(), A), tmp_path / "rex")
    save_concept(sliced("zig", 0, directions(1e-5), B), tmp_path / "zig")
    save_concept(sliced("tom", 1, directions(1e-5), B), tmp_path / "tom")
    errors = [error for error in check_library(tmp_path).errors if "share" in error]
    assert len(errors) == 1 and "rex and zig share 4 of 4 columns at width 64" in errors[0]
    save_concept(sliced("far", 2, directions(), "c" * 16, seed=5), tmp_path / "far")
    notes = [note for note in check_library(tmp_path).notes if "drawn at random" in note]
    assert len(notes) == 1 and "far and rex" in notes[0] and "and 2 others" in notes[0]


def test_number_of_compared_layers_per_component_and_width() -> None:
    concept = sliced("rex", 0, directions(), A)
    assert len(down_projections(concept)) == 4
    one = down_projections(concept, 1)
    assert sorted(down.shape[1] for down in one.values()) == [64, 96]


def test_default_dtype_and_autocast_do_not_matter() -> None:
    concepts = [
        sliced("rex", 0, directions(), A),
        sliced("zig", 1, directions(1e-5), B),
        sliced("max", 0, directions(1e-5), B),
    ]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            collisions = find_overlaps(concepts)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [(collision.first, collision.second) for collision in collisions] == [("rex", "max")]
