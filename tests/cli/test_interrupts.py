"""Ctrl-C in the middle of imports, and terminals that go away."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from customize.cli import interrupts
from customize.training import process
from customize.training.checkpoint import latest
from tests.cli.making import photos

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

# Sends the signal when a module is looked for; the import goes on, slowly if so wished.
PROGRAM = """
import os, signal, sys, time

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["MODULE"] and self in sys.meta_path:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(float(os.environ["SLOW"]))

sys.meta_path.insert(0, Finder())
from customize.cli import main
sys.exit(main())
"""


def interrupted_at(module, *arguments, slow=0.0):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env={**ENVIRONMENT, "MODULE": module, "SLOW": str(slow)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def check(result):
    assert result.returncode == 130, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("interrupted")


@pytest.mark.parametrize("slow", [0.0, 5.0])
@pytest.mark.parametrize(
    ("module", "command"),
    [("typer", "inspect"), ("typer.main", "--version"), ("numpy", "inspect")],
)
def test_ctrl_c_in_the_middle_of_an_import(module, command, slow, world):
    arguments = [command] if command.startswith("-") else [command, world.rex]
    check(interrupted_at(module, *arguments, slow=slow))


@pytest.mark.slow
@pytest.mark.parametrize("module", ["torch", "numpy", "diffusers", "transformers", "accelerate"])
def test_ctrl_c_while_training_imports(module, world, tmp_path):
    photos(tmp_path / "photos")
    given = ["--base", world.base, "--images", tmp_path / "photos", "--output", tmp_path / "out"]
    check(interrupted_at(module, "train", *given, "--name", "max", "--class-word", "dog"))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_second_ctrl_c_and_no_import():
    """In this process, as far as it can go on."""
    with interrupts.handled(to_the_end=False):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is interrupts.current
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_ignored_stays_ignored():
    """As in the background of a script, or under nohup."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    try:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        with interrupts.handled(to_the_end=False), process.stop_signals() as received:
            for number in before:
                signal.raise_signal(number)
        assert received == []
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_sighup_may_come_twice():
    before = signal.getsignal(signal.SIGHUP)
    with process.stop_signals() as received:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # the system's, and the shell's
        assert received == [signal.SIGHUP] * 2
    assert signal.getsignal(signal.SIGHUP) is before


@pytest.mark.slow
def test_a_closed_terminal_saves_and_the_run_goes_on(world, tmp_path):
    """The process' own terminal is closed, so that it gets SIGHUP and can't write any more."""
    photos(tmp_path / "photos")
    given = ["--base", world.base, "--images", tmp_path / "photos", "--output", tmp_path / "out"]
    given += ["--name", "max", "--class-word", "dog", "--steps", 100_000, "--checkpoint-every", 5]
    given += ["--preserve", "none", "--num-shared-directions", 0, "--no-record-inputs"]
    child, terminal = pty.fork()
    if child == 0:
        os.execve(
            sys.executable,
            [sys.executable, "-m", "customize", "train", *map(str, given), "--device", "cpu"],
            ENVIRONMENT,
        )
    end = time.monotonic() + 240
    os.set_blocking(terminal, False)
    while not list((tmp_path / "out").glob(".checkpoints/step-*")):
        assert time.monotonic() < end
        time.sleep(0.05)
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 65536)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    names = [path.name for path in (tmp_path / "out" / ".checkpoints").iterdir()]
    assert all(re.fullmatch(r"step-\d+\.safetensors", name) for name in names)
    assert latest(tmp_path / "out" / ".checkpoints").step >= 5


def test_a_reader_that_is_gone():
    command = f"{sys.executable} -m customize train 2>&1 | true; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(
        ["bash", "-c", command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.stdout.strip() == "2" and found.stderr == ""
