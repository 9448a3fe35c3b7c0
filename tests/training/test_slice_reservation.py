import multiprocessing
import os
import warnings

import pytest

from customize.concepts.concept_info import BasisInfo
from customize.concepts.io.file_layout import RESERVATION_FILE
from customize.concepts.slices.allocation import free_index, slice_owners
from customize.concepts.slices.slice_reservations import read_reservations
from customize.errors import ConceptError, SettingsError, StorageError
from customize.families import family_of
from customize.training.recipe import train
from customize.training.slice_reservation import reserve_slices
from tests.tiny import tiny_sd
from tests.training.runs import Stop, crash_at, make_run, settings


@pytest.fixture
def pipe():
    return tiny_sd()


def in_library(folder, name, **changes):
    """Return settings of one concept in a library."""
    library = folder / "library"
    return settings(folder, name=name, library=library, output=library / name, **changes)


def test_the_slice_of_an_interrupted_run_stays_reserved(pipe, tmp_path):
    rex = in_library(tmp_path, "rex", checkpoint_every=4)
    with pytest.raises(Stop):
        train(rex, pipe.components, progress=False, on_step=crash_at(5))
    (claim,) = read_reservations(tmp_path / "library")
    assert (claim.name, claim.index, claim.rank) == ("rex", 0, 4)
    tom = train(in_library(tmp_path, "tom", steps=1), pipe.components, progress=False)
    rex = train(rex, pipe.components, progress=False)
    for width in ("16", "32"):
        assert rex.info.slices[width] == claim.slices[width] == [0, 1, 2, 3]
        assert tom.info.slices[width] == [4, 5, 6, 7]
    assert read_reservations(tmp_path / "library") == []


def test_a_slice_taken_by_another_concept_is_refused(pipe, tmp_path):
    rex = in_library(tmp_path, "rex", checkpoint_every=4)
    with pytest.raises(Stop):
        train(rex, pipe.components, progress=False, on_step=crash_at(5))
    (rex.output / RESERVATION_FILE).unlink()  # as in a library of an older version
    tom = train(in_library(tmp_path, "tom", steps=1), pipe.components, progress=False)
    with pytest.raises(SettingsError, match=r"slice 0, in which rex .* now belongs to tom"):
        train(rex, pipe.components, progress=False)
    anew = in_library(tmp_path, "rex", checkpoint_every=4, resume=False)
    slices = train(anew, pipe.components, progress=False).info.slices
    assert not set(slices["32"]) & set(tom.info.slices["32"])


def test_sharing_columns_in_a_full_library_is_warned_of(pipe, tmp_path):
    for number in range(4):  # width 16 has four slices
        train(in_library(tmp_path, f"c{number}", steps=1), pipe.components, progress=False)
    late = in_library(tmp_path, "late", checkpoint_every=4)
    with pytest.raises(Stop), pytest.warns(UserWarning, match="late share 4 of 4 columns"):
        train(late, pipe.components, progress=False, on_step=crash_at(5))
    with pytest.warns(UserWarning, match="late share 4 of 4 columns"):
        train(late, pipe.components, progress=False)  # no other slice would be better


def test_a_slice_beyond_the_capacity_of_a_width_is_warned_of(pipe, tmp_path):
    with pytest.warns(UserWarning, match=r"width 16 holds 4 .*columns 4 to 7 of slice 1"):
        train(settings(tmp_path, slice=5, steps=1), pipe.components, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(settings(tmp_path, "fits", slice=3, steps=1), pipe.components, progress=False)


def test_an_output_outside_of_the_library_is_warned_of(pipe, tmp_path):
    library = tmp_path / "library"
    outside = settings(tmp_path, library=library, output=tmp_path / "elsewhere", steps=1)
    with pytest.warns(UserWarning, match="elsewhere is not in the library .*customize library add"):
        train(outside, pipe.components, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(in_library(tmp_path, "inside", steps=1), pipe.components, progress=False)


def test_a_run_without_a_checkpoint_leaves_no_reservation(pipe, tmp_path):
    rex = in_library(tmp_path, "rex", checkpoint_every=4)
    with pytest.raises(Stop):
        train(rex, pipe.components, progress=False, on_step=crash_at(2))
    assert not rex.output.exists()
    assert free_index(slice_owners(tmp_path / "library"), 4, BasisInfo()) == 0


def test_reservations_that_cannot_be_read_or_written_are_reported(pipe, tmp_path):
    folder = tmp_path / "library" / "old"
    folder.mkdir(parents=True)
    (folder / RESERVATION_FILE).write_text('{"name": "old"}')
    with pytest.raises(
        ConceptError, match=r"reservation .* cannot be read .*old.*delete its folder"
    ):
        train(in_library(tmp_path, "rex"), pipe.components, progress=False)
    (tmp_path / "file").write_text("")
    config = settings(tmp_path, library=tmp_path / "file")
    with pytest.raises(StorageError, match="file"):
        train(config, pipe.components, progress=False)


def test_simultaneous_processes_get_different_slices(pipe, tmp_path):
    family = family_of(pipe.components)
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(2)

    def choose(names):
        # Many reservations each, so that some would collide without a lock.
        configs = [in_library(tmp_path, name, rank=1) for name in names]
        ready.wait()
        reservations = [
            reserve_slices(make_run([config], family), BasisInfo(), None) for config in configs
        ]
        for reservation in reservations:
            reservation.__enter__()
        os._exit(0)  # as if killed: the reservations remain

    in_library(tmp_path, "first")  # creates the images
    groups = [[f"{letter}{number}" for number in range(8)] for letter in "ab"]
    processes = [context.Process(target=choose, args=(names,)) for names in groups]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0
    claims = read_reservations(tmp_path / "library")
    assert sorted(claim.index for claim in claims) == list(range(16))
