"""Damaged files are read unchanged or refused by the package's errors, in limited time."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.concepts.io.write_concept import save_concept
from tests.hostile.damaged_files import KINDS, attempt, damage
from tests.pipeline.making import assert_same, concept, everything
from tests.tiny import tiny_sd

#: How many files of each kind `make test-hostile` damages.
TRIES = int(os.environ.get("HOSTILE_TRIES", "700"))
_SECONDS = 20.0


@pytest.mark.parametrize("name", KINDS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=12, deadline=None)
def test_damaged_file_is_read_unchanged_or_refused(name: str, seed: int) -> None:
    with TemporaryDirectory() as folder:
        attempt(KINDS[name], Path(folder) / "files", seed)


@pytest.mark.hostile
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files(name: str, tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    for seed in range(TRIES):
        started = time.monotonic()
        try:
            counts[attempt(KINDS[name], tmp_path / "files", seed)] += 1
        except Exception as error:
            raise AssertionError(f"{name}, damaged by seed {seed}: {error!r}") from error
        assert time.monotonic() - started < _SECONDS, f"{name}, damaged by seed {seed}"
    print(f"\n{name}: {TRIES} damaged, {counts['refused']} refused, {counts['read']} read")


@pytest.mark.hostile
def test_many_damaged_concepts_leave_a_pipeline_unchanged(tmp_path: Path) -> None:
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe, "tom", index=1))
    made = concept(pipe)
    before = everything(pipe)
    names = ("concept.json", "pytorch_lora_weights.safetensors", "learned_embeds.safetensors")
    from customize.errors import CustomizeError

    counts: Counter[str] = Counter()
    for seed in range(TRIES // 5):
        folder = save_concept(made, tmp_path / f"{seed}" / "rex")
        damage(folder / names[seed % 3], seed)
        try:
            pipe.load_custom(folder)
            pipe.unload_custom("rex")
            counts["loaded"] += 1
        except CustomizeError:
            counts["refused"] += 1
        assert_same(before, everything(pipe))
    print(f"\npipelines: {counts['refused']} refused, {counts['loaded']} loaded and unloaded")
