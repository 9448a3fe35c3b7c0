"""A run stopped at any moment is completed by the next run with the same settings."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from customize.atomic import is_partial
from customize.concepts.io.file_layout import LAYER_INPUTS_FILE, RESERVATION_FILE
from customize.concepts.io.read_concept import load_concept
from customize.concepts.library.library_check import check_library
from customize.concepts.slices.shared_directions import find_direction_files
from customize.concepts.slices.slice_reservations import read_reservations
from customize.training.recipe import train
from tests.tiny import tiny_sd
from tests.training.runs import same, settings, tensors

pytestmark = pytest.mark.usefixtures("quick_recordings")

#: Events of Python's audit hooks for files.
WRITES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}

Moment = Callable[[int, str, str], bool]


def config_in(folder: Path, **changes):
    library = folder / "library"
    return settings(
        folder,
        library=library,
        output=library / "rex",
        **{
            "steps": 3,
            "checkpoint_every": 2,
            "num_shared_directions": 2,
            "record_inputs": True,
            "validation_prompts": ("a photo of <rex>",),
            "validation_steps": 2,
        }
        | changes,
    )


def _run(folder: Path, number: int, moment: Moment, changes) -> None:
    """Train in a separate process that sends itself a signal."""
    config = config_in(folder, **changes)
    count = 0

    def hook(event: str, args) -> None:
        nonlocal count
        if event not in WRITES:
            return
        path = str(args[1] if event == "os.rename" else args[0])
        if str(folder / "library") in path or (event == "os.rename" and ".rex" in str(args[0])):
            if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            count += 1
            if moment(count, event, path):
                os.kill(os.getpid(), number)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.addaudithook(hook)
    try:
        train(config, tiny_sd().components, progress=False)
    except BaseException:
        os._exit(1)
    os._exit(0)


def stopped(folder: Path, number: int, moment: Moment, **changes) -> int | None:
    """Return the exit code of a run that got a signal."""
    config_in(folder)  # creates the images
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_run, args=(folder, number, moment, changes))
    process.start()
    process.join(timeout=300)
    for path in folder.rglob("*.partial"):  # as if the next run were later
        os.utime(path, (0, 0))
    return process.exitcode


def names(folder: Path) -> set[str]:
    """Return the files of a concept's folder except those for resuming."""
    return {path.name for path in folder.iterdir()} - {".checkpoints"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train(config_in(folder), tiny_sd().components, progress=False)
    return folder / "library" / "rex"


def begin(folder: Path, whole: Path) -> Path:
    """A library with shared directions, which take most of a small run's time."""
    (folder / "library").mkdir(parents=True)
    for path in find_direction_files(whole.parent):
        shutil.copy(path, folder / "library")
    return folder


def assert_whole(folder: Path, whole: Path, **changes) -> None:
    """Assert that the next run with the same settings completes all files."""
    config = config_in(folder, **changes)
    train(config, tiny_sd().components, progress=False)
    made = config.output
    assert same(tensors(load_concept(made)), tensors(load_concept(whole)))
    assert names(made) == names(whole)
    for name in (LAYER_INPUTS_FILE, "sample-1.png"):
        assert (made / name).read_bytes() == (whole / name).read_bytes(), name
    check = check_library(config.library)
    assert check.errors == [] and read_reservations(config.library) == []
    # Later writers delete partial files.
    assert all(is_partial(path.name) for path in config.library.rglob("*.partial"))


MOMENTS: dict[str, Moment] = {
    "the record is written": lambda n, event, path: LAYER_INPUTS_FILE in path,
    "the claim is withdrawn": lambda n, event, path: (
        event == "os.remove" and Path(path).name == RESERVATION_FILE
    ),
}


@pytest.mark.parametrize("checkpoint_every", [2, 0], ids=["with checkpoints", "without"])
@pytest.mark.parametrize("name", MOMENTS)
def test_missing_outputs_of_a_finished_run_are_made_by_the_next(
    name, checkpoint_every, whole, tmp_path
):
    changes = {"checkpoint_every": checkpoint_every}
    code = stopped(begin(tmp_path, whole), signal.SIGKILL, MOMENTS[name], **changes)
    assert code == -signal.SIGKILL
    rex = tmp_path / "library" / "rex"
    learned = load_concept(rex)
    assert (rex / RESERVATION_FILE).is_file()
    # The slice stays reserved meanwhile.
    assert read_reservations(tmp_path / "library") == []
    assert not [fault for fault in check_library(rex.parent).errors if "share" in fault]
    assert_whole(tmp_path, whole, **changes)
    assert load_concept(rex).info == learned.info  # it was not trained or saved again


def test_a_damaged_or_deleted_recording_is_repeated(whole, tmp_path):
    config = config_in(begin(tmp_path, whole))
    train(config, tiny_sd().components, progress=False)
    path = config.output / LAYER_INPUTS_FILE
    for spoil in (path.unlink, lambda: path.write_bytes(b"damaged")):
        spoil()
        assert_whole(tmp_path, whole)


def test_ctrl_c_after_saving_leaves_no_reservation(whole, tmp_path):
    folder = begin(tmp_path, whole)
    assert stopped(folder, signal.SIGINT, MOMENTS["the record is written"]) == 1
    assert not (tmp_path / "library" / "rex" / RESERVATION_FILE).exists()
    assert_whole(tmp_path, whole)


@pytest.mark.hostile
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_killed_at_any_written_file_resumes(number, whole, tmp_path):
    for moment in range(1, 200):
        folder = begin(tmp_path / str(moment), whole)
        reached = tmp_path / f"{moment}.reached"

        def at(count, event, path, moment=moment, reached=reached):
            if count == moment:
                os.close(os.open(reached, os.O_CREAT))
            return count == moment

        stopped(folder, number, at)
        assert_whole(folder, whole)
        if not reached.exists():
            break
    assert 20 < moment < 199


@pytest.mark.hostile
def test_a_run_killed_while_writing_shared_directions_resumes(whole, tmp_path):
    code = stopped(tmp_path, signal.SIGKILL, lambda n, event, path: event == "os.link")
    assert code == -signal.SIGKILL
    assert_whole(tmp_path, whole)
