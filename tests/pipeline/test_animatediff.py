"""What was learned on Stable Diffusion, in the videos of AnimateDiff."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import export_to_gif
from PIL import Image

from customize.api.pipeline_methods import load_custom, unload_custom
from customize.concepts.merge.write_merged_lora import write_merged
from customize.training.recipe import train
from tests.pipeline.making import PROMPT, assert_same, everything
from tests.tiny import tiny_sd
from tests.tiny_video import tiny_animatediff
from tests.training.runs import settings


def video(pipe: Any) -> np.ndarray:
    noise = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    return pipe(PROMPT, num_frames=4, generator=noise, **call).frames[0]


@pytest.mark.parametrize("layerwise", [False, True])
def test_videos_show_concepts_trained_on_images(tmp_path: Path, layerwise: bool) -> None:
    config = settings(tmp_path, steps=4, layerwise_tokens=layerwise)
    learned = train(config, tiny_sd().components, progress=False)
    assert (learned.info.token_layers > 0) is layerwise

    pipe = tiny_animatediff()
    bare = video(pipe)
    before = everything(pipe)
    load_custom(pipe, config.output)
    attached = video(pipe)
    assert attached.shape == (4, 32, 32, 3)
    assert (np.abs(attached - bare).max(axis=(1, 2, 3)) > 1e-3).all()
    carrying = {name for name, module in pipe.unet.named_modules() if hasattr(module, "lora_A")}
    assert len(carrying) == len(learned.updates["unet"])
    assert not any("motion_modules" in name for name in carrying)
    unload_custom(pipe)
    assert_same(before, everything(pipe))
    assert np.array_equal(video(pipe), bare)

    if not layerwise:
        load_custom(pipe, config.output, fuse=True)
        np.testing.assert_allclose(video(pipe), attached, atol=2e-4)
        unload_custom(pipe)
        assert_same(before, everything(pipe))


def test_videos_are_exported(tmp_path: Path) -> None:
    """As the frames come, in the order drawn: a GIF, by diffusers' own helper."""
    config = settings(tmp_path, steps=2, preserve={"class_text": 1.0})
    train(config, tiny_sd().components, progress=False)
    pipe = tiny_animatediff()
    load_custom(pipe, config.output)
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "num_frames": 4}
    frames = pipe(PROMPT, generator=torch.Generator().manual_seed(1), **call).frames[0]
    path = export_to_gif(frames, str(tmp_path / "rex.gif"), fps=4)
    with Image.open(path) as video:
        assert (video.n_frames, video.size, video.info["duration"]) == (4, (32, 32), 250)
        for number, frame in enumerate(frames):
            video.seek(number)
            # A GIF has 256 colours a frame.
            shown = np.asarray(video.convert("RGB"), np.float32)
            assert np.abs(shown - np.asarray(frame, np.float32)).mean() < 12
    unload_custom(pipe)


@pytest.mark.parametrize(("make", "output"), [(tiny_sd, "images"), (tiny_animatediff, "frames")])
def test_model_cards_name_the_output_of_the_training_base(
    make: Callable[[], Any], output: str, tmp_path: Path
) -> None:
    config = settings(tmp_path, steps=1)
    concept = train(config, make().components, progress=False)
    write_merged([concept], [1.0], tmp_path / "merged")
    for folder, count in ((config.output, 2), (tmp_path / "merged", 1)):
        card = (folder / "README.md").read_text()
        assert [card.count(f").{kind}[0]") for kind in ("images", "frames")].count(0) == 1
        assert card.count(f").{output}[0]") == count
        assert ("text-to-video" in card) is (output == "frames")
