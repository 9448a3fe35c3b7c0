"""A library has one set of shared directions, independent of the first run's settings."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from customize.concepts.io.read_concept import load_concept
from customize.concepts.slices.overlap import find_overlaps
from customize.concepts.slices.shared_directions import (
    SharedDirections,
    directions_path,
    find_direction_files,
)
from customize.concepts.types import Concept
from customize.families import family_of
from customize.training import base_fingerprint
from customize.training.library_directions import _legacy_name
from customize.training.recipe import train
from tests.tiny import tiny_sd
from tests.training.runs import settings

pytestmark = pytest.mark.usefixtures("quick_recordings")


def learn(folder, name, pipe=None, **changes) -> Concept:
    library = folder / "library"
    config = settings(folder, name=name, library=library, output=library / name, **changes)
    pipe = pipe or tiny_sd()
    train(config, pipe.components, progress=False)
    return load_concept(config.output)


def assert_apart(*concepts: Concept) -> None:
    """Whether the down-projections of all pairs of updates are orthogonal."""
    assert len({concept.info.basis.shared_directions for concept in concepts}) == 1
    first, *others = concepts
    for other in others:
        for component, updates in first.updates.items():
            for module, update in updates.items():
                a, b = update.down.double(), other.updates[component][module].down.double()
                assert (a @ b.T).abs().max() < 1e-5 * a.norm() * b.norm()
    assert find_overlaps(concepts) == []


def test_runs_of_other_precision_and_resolution_use_the_same_directions(tmp_path) -> None:
    short = {"num_shared_directions": 2, "steps": 1, "rank": 2}
    rex = learn(tmp_path, "rex", **short)
    bf16 = learn(tmp_path, "tom", mixed_precision="bf16", **short)
    larger = learn(tmp_path, "zig", resolution=64, **short)
    (path,) = find_direction_files(tmp_path / "library")
    # Rounded weights have another digest, and nearly the same directions.
    rounded = tiny_sd()
    rounded.unet.to(torch.float16).to(torch.float32)
    half = learn(tmp_path, "max", rounded, **short)
    assert len(find_direction_files(tmp_path / "library")) == 2
    assert_apart(rex, bf16, larger, half)
    # Another model has other directions.
    other = tiny_sd()
    with torch.no_grad():
        for parameter in other.text_encoder.parameters():
            parameter.add_(torch.randn(parameter.shape))
    far = learn(tmp_path, "far", other, **short)
    assert far.info.basis.shared_directions != rex.info.basis.shared_directions
    assert path in find_direction_files(tmp_path / "library")


@pytest.mark.slow  # threads that wait for each other on a busy machine
def test_the_name_does_not_depend_on_the_number_of_threads(tmp_path) -> None:
    concepts = []
    for threads, name in ((1, "rex"), (2, "tom")):
        torch.set_num_threads(threads)
        try:
            number = {"slice": threads - 1}
            concepts.append(
                learn(tmp_path / name, name, num_shared_directions=2, steps=1, **number)
            )
        finally:
            torch.set_num_threads(1)
    names = {concept.info.basis.shared_directions for concept in concepts}
    assert len(names) == 1
    assert find_overlaps(concepts) == []


def test_directions_of_an_earlier_version_are_used(tmp_path) -> None:
    rex = learn(tmp_path, "rex", num_shared_directions=2, steps=1)
    library = tmp_path / "library"
    (path,) = find_direction_files(library)
    pipe = tiny_sd()
    family = family_of(pipe.components)
    config = settings(
        tmp_path, name="tom", library=library, output=library / "tom", num_shared_directions=2
    )
    weights = base_fingerprint.weight_digests("", pipe.components)
    earlier = directions_path(library, _legacy_name(config, family, weights, 32))
    assert len(earlier.stem.rpartition("-")[2]) == 8
    from customize.concepts.input_statistics import LayerInputs

    LayerInputs("generic prompts", {}, SharedDirections.load(path).factors).save(earlier)
    path.unlink()
    tom = learn(tmp_path, "tom", num_shared_directions=2, steps=1)
    assert find_direction_files(library) == [earlier]
    assert tom.info.basis.shared_directions == SharedDirections.load(earlier).name
    # Rex has the same directions under another name: index and columns are disjoint.
    assert tom.info.slices["32"] != rex.info.slices["32"]
    assert find_overlaps([rex, tom]) == []


def _learn(folder, name, barrier):
    torch.set_num_threads(1)
    config = settings(
        folder, name=name, library=folder / "library", num_shared_directions=2, steps=1
    )
    config = config.model_copy(update={"output": folder / "library" / name})
    barrier.wait()
    train(config, tiny_sd().components, progress=False)


@pytest.mark.slow
def test_simultaneous_runs_record_one_file(tmp_path) -> None:
    settings(tmp_path)  # creates the images
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    names = ("rex", "tom", "zig")
    started = [context.Process(target=_learn, args=(tmp_path, name, barrier)) for name in names]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=500)
        assert process.exitcode == 0
    assert len(find_direction_files(tmp_path / "library")) == 1
    assert_apart(*(load_concept(tmp_path / "library" / name) for name in names))
