"""Concepts on the pipeline of every family: attached, merged, fused, gone without a trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from customize.hosts.binding import load_custom, unload_custom
from tests.hosts.making import assert_same, concept, draw, everything
from tests.tiny import (
    tiny_flux,
    tiny_qwen_image,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
    tiny_z_image,
)
from tests.tiny_llm import tiny_flux2, tiny_flux2_klein, tiny_krea2, tiny_qwen_image_21
from tests.tiny_video import tiny_animatediff, tiny_cogvideox, tiny_ltx2, tiny_wan

MAKERS = {
    "sd": tiny_sd,
    "animatediff": tiny_animatediff,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "flux2-dev": tiny_flux2,
    "flux2-klein": tiny_flux2_klein,
    "qwen_image": tiny_qwen_image,
    "qwen_image_21": tiny_qwen_image_21,
    "z_image": tiny_z_image,
    "krea2": tiny_krea2,
    "wan": tiny_wan,
    "wan-14b": lambda: tiny_wan("2.2-14b"),
    "cogvideox": tiny_cogvideox,
    "ltx2": tiny_ltx2,
}
PROMPT = "a photo of <rex> and <tom> on the beach"


@pytest.fixture(params=MAKERS)
def pipe(request: pytest.FixtureRequest) -> Any:
    return MAKERS[request.param]()


def test_concepts_merge_and_leave_nothing_behind(pipe: Any) -> None:
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
