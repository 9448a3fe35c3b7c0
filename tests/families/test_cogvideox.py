"""CogVideoX: truncated prompts, videos of many frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from customize.api.pipeline_methods import load_custom, unload_custom
from customize.families import family_of
from customize.families.cogvideox import MAX_SEQUENCE_LENGTH
from tests.pipeline.making import concept
from tests.tiny_video import tiny_cogvideox


def test_long_prompts_are_truncated_as_by_the_pipeline() -> None:
    pipe = tiny_cogvideox()
    encoded = family_of(pipe.components).encode_prompts(["dog " * 700])["prompt_embeds"]
    expected, _ = pipe.encode_prompt("dog " * 700, do_classifier_free_guidance=False)
    assert encoded.shape[1] == MAX_SEQUENCE_LENGTH
    assert torch.equal(encoded, expected)


def video(pipe: Any) -> np.ndarray:
    noise = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    return pipe("a photo of <rex>", num_frames=9, generator=noise, **call).frames[0]


def test_a_concept_changes_every_frame_of_a_video() -> None:
    pipe = tiny_cogvideox(rotary=True)
    bare = video(pipe)
    load_custom(pipe, concept(pipe))
    attached = video(pipe)
    assert attached.shape == (9, 32, 32, 3)
    assert (np.abs(attached - bare).max(axis=(1, 2, 3)) > 1e-3).all()
    unload_custom(pipe)
    assert np.array_equal(video(pipe), bare)
