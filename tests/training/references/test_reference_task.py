"""What a sample loses, and the noise and order of samples."""

from __future__ import annotations

from random import Random

import pytest

from customize.training.references.config import ReferenceTrainConfig
from customize.training.references.reference_task import choose_drop

NEEDED = {"base": "base", "output": "out", "stage": "single"}


def test_rates_of_dropping():
    rng, config = Random(0), ReferenceTrainConfig(**NEEDED)
    drawn = [choose_drop(config, rng) for _ in range(20_000)]
    for name, rate in (("images", 0.05), ("text", 0.05), ("both", 0.05), ("nothing", 0.85)):
        assert drawn.count(name) / 20_000 == pytest.approx(rate, abs=0.006)


@pytest.mark.parametrize("drop", ["images", "text", "both"])
def test_dropping_always_and_never(drop):
    values = {"drop_images": 0, "drop_text": 0, "drop_both": 0}
    never = ReferenceTrainConfig(**NEEDED, **values)
    always = ReferenceTrainConfig(**NEEDED, **{**values, f"drop_{drop}": 1})
    rng = Random(0)
    assert {choose_drop(never, rng) for _ in range(100)} == {"nothing"}
    assert {choose_drop(always, rng) for _ in range(100)} == {drop}
