"""Running Python in a child process without root's privileges."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_unprivileged(program: str, *arguments: object) -> str:
    """Run a program in a child process that is subject to file permissions.

    The child owns root's files, so tests must revoke the owner's permissions. A failure of the
    program fails the test.

    Returns:
        The output of the program.
    """
    command = [sys.executable, "-c", program, *map(str, arguments)]
    if os.geteuid() == 0:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root may read everything, and setpriv is missing")
        dropped = "-dac_override,-dac_read_search,-fowner"
        command = [setpriv, "--inh-caps=-all", f"--bounding-set={dropped}", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
