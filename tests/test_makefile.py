"""The environment that make creates, with interpreters that only log their arguments."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Replaces an interpreter; it also creates the interpreter of an environment.
INTERPRETER = """#!/bin/sh
echo "$(basename $0) $*" >> {log}
case "$*" in
    *"sys.exit"*) exit {too_old} ;;
    *"print("*) echo "{version}" ;;
    "-m venv --clear "*)
        rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python"
        [ ! -e {folder}/cut-off ] || exit 1 ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def interpreter(folder, name, version, too_old=0):
    path = folder / name
    text = INTERPRETER.format(log=folder / "log", folder=folder, version=version, too_old=too_old)
    path.write_text(text)
    path.chmod(0o755)
    return path


def make(folder, *arguments):
    """Update the environment; returns the exit code, stderr and the log of the interpreters."""
    environment = {key: text for key, text in os.environ.items() if key != "PYTHON"}
    environment["PATH"] = f"{folder}{os.pathsep}{environment['PATH']}"
    (folder / "log").write_text("")
    done = subprocess.run(
        ["make", ".venv/.installed", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr, (folder / "log").read_text()


@pytest.fixture
def checkout(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1, 1))
    interpreter(tmp_path, "python3", "3.11.1 /usr")
    interpreter(tmp_path, "python3.99", "3.99.0 /usr")
    interpreter(tmp_path, "python2", "2.7.0 /usr", too_old=1)
    return tmp_path


def test_environment_is_created_once(checkout):
    code, _, log = make(checkout)
    assert code == 0 and "python3 -m venv --clear .venv" in log and "pip install" in log
    assert make(checkout) == (0, "", "")
    (checkout / "pyproject.toml").touch()
    os.utime(checkout / "pyproject.toml", (2**33, 2**33))
    assert "venv" not in (log := make(checkout)[2]) and "pip install" in log


def test_incomplete_environment_is_recreated(checkout):
    (checkout / "cut-off").touch()
    assert make(checkout)[0] != 0
    assert (checkout / ".venv" / "bin" / "python").exists()
    (checkout / "cut-off").unlink()
    code, _, log = make(checkout)
    assert code == 0 and "venv --clear" in log and "pip install" in log


def test_named_interpreter_is_used(checkout):
    make(checkout)
    code, _, log = make(checkout, "PYTHON=python3.99")
    assert code == 0 and "python3.99 -m venv --clear .venv" in log and "pip install" in log
    assert "venv" not in make(checkout, "PYTHON=python3.99")[2]
    assert make(checkout) == (
        0,
        "",
        "",
    )  # without PYTHON, any environment is used
    for name in ("python2", "python3.98"):
        code, err, _ = make(checkout, f"PYTHON={name}")
        assert code == 2 and f"Python 3.11 or newer, and '{name}' is not" in err
    assert (checkout / ".venv" / ".installed").exists()


def test_environment_without_a_marker_file_is_reused(checkout):
    make(checkout)
    (checkout / ".venv" / ".made").unlink()
    code, _, log = make(checkout)
    assert code == 0 and "venv" not in log and "pip" not in log
