"""Concepts on the pipeline of every family: attached, merged, fused, gone without a trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from customize.api.pipeline_methods import load_custom, unload_custom
from tests.pipeline.making import assert_same, concept, draw, everything
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_video import tiny_animatediff

MAKERS = TINY_FAMILIES | {"animatediff": tiny_animatediff}
PROMPT = "a photo of <rex> and <tom> on the beach"


@pytest.fixture(params=MAKERS)
def pipe(request: pytest.FixtureRequest) -> Any:
    return MAKERS[request.param]()


def test_concepts_merge_and_unload_completely(pipe: Any) -> None:
    rex, tom = concept(pipe, "rex", index=0), concept(pipe, "tom", index=1)
    bare = draw(pipe, PROMPT)  # the first call leaves notes of the libraries' own
    before = everything(pipe)
    load_custom(pipe, rex, tom, weights=[1.0, 0.5])
    attached = draw(pipe, PROMPT)
    assert np.abs(attached - bare).max() > 0.01
    unload_custom(pipe, "tom")
    alone = draw(pipe, PROMPT)
    assert np.abs(alone - attached).max() > 1e-3
    unload_custom(pipe)
    assert_same(before, everything(pipe))
    assert np.array_equal(draw(pipe, PROMPT), bare)

    load_custom(pipe, rex, tom, weights=[1.0, 0.5], fuse=True)
    np.testing.assert_allclose(draw(pipe, PROMPT), attached, atol=2e-4)
    unload_custom(pipe)
    assert_same(before, everything(pipe))
