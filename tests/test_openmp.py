"""Settings of the OpenMP runtime for small models."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from customize.openmp import SPIN_COUNT, limit_spinning


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, str(SPIN_COUNT)),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_limit_spinning_keeps_the_users_settings(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str | None
) -> None:
    monkeypatch.setattr(os, "environ", dict(variables))
    limit_spinning()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_torch_is_imported_after_limit_spinning() -> None:
    code = "import sys, customize.openmp, customize.cli.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
