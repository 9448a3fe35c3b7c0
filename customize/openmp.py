"""Settings of the OpenMP runtime for small models."""

from __future__ import annotations

import os

#: Iterations that a waiting thread spins before it sleeps. libgomp's default is 300,000, with which
#: steps beside busy processes took almost twice as long, and no less on an idle machine; with 1000
#: idle steps took 1.3 times as long (scripts/bench/busy_neighbour.py).
SPIN_COUNT = 10_000


def limit_spinning() -> None:
    """Let waiting OpenMP threads sleep early, so that they do not slow down other threads.

    It has no effect after torch has been imported, and none if the user has set GOMP_SPINCOUNT or
    OMP_WAIT_POLICY. The number of threads stays the same, and so do all results. For small models,
    whose steps wait often; large models on an idle machine gain from spinning.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
