"""Running Python for which permissions hold: root's own may be given up in a child process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_unprivileged(program: str, *arguments: object) -> str:
    """What a program prints in a child process that no longer may read and write everywhere.

    The child is still the owner of root's files, so what it is to be refused needs a mode that
    refuses its owner. A failure of the program fails the test.
    """
    command = [sys.executable, "-c", program, *map(str, arguments)]
    if os.geteuid() == 0:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root may read everything, and there is no setpriv to give that up")
        dropped = "-dac_override,-dac_read_search,-fowner"
        command = [setpriv, "--inh-caps=-all", f"--bounding-set={dropped}", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
