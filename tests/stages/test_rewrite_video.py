"""Videos that are drawn from better prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from customize.stages.rewrite import Rewriter
from tests.tiny_rewriter import ScriptedModel
from tests.tiny_video import tiny_animatediff, tiny_cogvideox, tiny_wan

USERS, BETTER = "puppy at the seaside", "a video of a dog that runs on the beach"
TOO_LONG = " ".join(f"a dog that runs at place number{chr(97 + k)}," for k in range(20))


def draw(pipe, prompt, **call):
    settings = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    noise = torch.Generator().manual_seed(1)
    return pipe(prompt, num_frames=5, generator=noise, **settings | call)


@pytest.mark.parametrize("make", [tiny_wan, tiny_cogvideox, tiny_animatediff])
def test_a_video_is_drawn_from_the_better_prompt(make):
    pipe = make()
    expected, plain = draw(pipe, [BETTER]).frames, draw(pipe, [USERS]).frames
    assert not np.array_equal(plain, expected)
    pipe.load_custom(Rewriter(ScriptedModel({USERS: [BETTER]})))
    output = draw(pipe, [USERS], rewrite=True)
    assert np.array_equal(output.frames, expected)
    assert output.prompts == [BETTER]
    assert output.rewritings[0].prompt == USERS
    assert np.array_equal(draw(pipe, [USERS]).frames, plain)


@pytest.mark.parametrize(
    ("make", "call"),
    [(tiny_wan, {"max_sequence_length": 64}), (tiny_animatediff, {})],
    ids=["wan", "animatediff"],
)
def test_a_rewriting_that_the_text_encoder_truncates_is_asked_again(make, call):
    pipe = make()
    model = ScriptedModel({USERS: [TOO_LONG, BETTER]})
    pipe.load_custom(Rewriter(model))
    assert draw(pipe, USERS, rewrite=True, **call).prompts == [BETTER]
    assert "it is too long" in model.chats[1].messages[-1].content
