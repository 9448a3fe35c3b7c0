"""One thread for all tests and their child processes.

Sums over threads round differently, so results are equal bit for bit only for the same number of
threads; tiny models are not faster on more threads.
"""

import gc
import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# Tests assert no time, so a busy machine fails none.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")
# For scripts/mutants.py: few examples, the same for every mutant.
settings.register_profile("mutants", max_examples=8, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module")
def quick_recordings() -> Iterator[None]:
    """All tests of a module record layer inputs in one step."""
    from tests.recording import record_in_one_step

    with pytest.MonkeyPatch.context() as patch:
        record_in_one_step(patch)
        yield


@pytest.fixture(scope="module")
def short_padding() -> Iterator[None]:
    """Families pad prompts to 128 tokens, not to up to 1024, in all tests of a module.

    Padding takes most of the time of a tiny transformer; tests/families has it at full length.
    """
    with pytest.MonkeyPatch.context() as patch:
        for family in ("flux", "flux2", "krea2", "ltx2", "sd3", "wan"):
            patch.setattr(f"customize.families.{family}.MAX_SEQUENCE_LENGTH", 128)
        yield


def pytest_collection_finish() -> None:
    """Exempt what is imported from garbage collection, which takes 7 % of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
