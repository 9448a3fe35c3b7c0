"""Ctrl-C during imports, and closed terminals."""

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
from customize.training import distributed
from customize.training.checkpoint import load_latest_checkpoint
from tests.cli.making import photos

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

# Sends the signal when a module is imported; the import continues, slowly if requested.
PROGRAM = """
import os, signal, sys, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background

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
def test_ctrl_c_during_an_import(module, command, slow, world):
    arguments = [command] if command.startswith("-") else [command, world.rex]
    check(interrupted_at(module, *arguments, slow=slow))


@pytest.mark.slow
@pytest.mark.parametrize("module", ["torch", "numpy", "diffusers", "transformers", "accelerate"])
def test_ctrl_c_during_the_imports_of_training(module, world, tmp_path):
    photos(tmp_path / "photos")
    flags = ["--base", world.base, "--images", tmp_path / "photos", "--output", tmp_path / "out"]
    check(interrupted_at(module, "train", *flags, "--name", "max", "--class-word", "dog"))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_ctrl_c_outside_imports_is_a_keyboard_interrupt():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupts.handle_interrupts(exit_afterwards=False):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is interrupts.handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.stop_signals() as received:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sighup_may_come_twice():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with distributed.stop_signals() as received:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # the system's, and the shell's
        assert received == [signal.SIGHUP] * 2
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_DFL


@pytest.mark.slow
def test_training_resumes_after_its_terminal_was_closed(world, tmp_path):
    """The terminal is closed, so the process gets SIGHUP and cannot write."""
    photos(tmp_path / "photos")
    flags = ["--base", world.base, "--images", tmp_path / "photos", "--output", tmp_path / "out"]
    flags += ["--name", "max", "--class-word", "dog", "--steps", 100_000, "--checkpoint-every", 5]
    flags += ["--preserve", "none", "--num-shared-directions", 0, "--no-record-inputs"]
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        os.execve(
            sys.executable,
            [sys.executable, "-m", "customize", "train", *map(str, flags), "--device", "cpu"],
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
    assert load_latest_checkpoint(tmp_path / "out" / ".checkpoints").step >= 5


def test_closed_output_pipe():
    command = f"{sys.executable} -m customize train 2>&1 | true; echo ${{PIPESTATUS[0]}}"
    actual = subprocess.run(
        ["bash", "-c", command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert actual.stdout.strip() == "2" and actual.stderr == ""
