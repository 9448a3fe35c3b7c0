"""Drawing and scoring of rewritings: pictures once, scores against the user's prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from customize.errors import ConfigError, DataError
from customize.evaluation.rewards.weighted_sum import WeightedSum
from customize.training.rewriting.picture_renderer import Job, PictureRenderer
from tests.tiny import tiny_sd
from tests.tiny_video import tiny_wan

CALL = {"num_inference_steps": 2, "height": 32, "width": 32}


class Brightness:
    """Mean of the pictures; it fails for the prompt "fail"."""

    name, digest = "brightness", "brightness"

    def __init__(self):
        self.prompts, self.frames = [], []

    def __call__(self, pictures, prompts):
        self.prompts += prompts
        self.frames += [len(p) if isinstance(p, list) else 1 for p in pictures]
        values = [np.mean(np.asarray(p[0] if isinstance(p, list) else p)) for p in pictures]
        return torch.tensor(
            [
                float("nan") if prompt == "fail" else float(value)
                for value, prompt in zip(values, prompts, strict=True)
            ]
        )


def make(folder, pipe=None, floors=None, **settings):
    reward = Brightness()
    weighted = WeightedSum({"brightness": 2.0}, floors, {"brightness": reward})
    settings = {"call": CALL, "base": "tiny", **settings}
    return PictureRenderer(pipe or tiny_sd(), weighted, folder, **settings), reward


def test_rewritings_are_drawn_and_scored_for_the_users_prompt(tmp_path):
    renderer, reward = make(tmp_path)
    jobs = [Job("puppy", "a dog"), Job("kitty", "a cat on the beach"), Job("puppy", "a dog")]
    first, second, again = renderer(jobs)
    assert reward.prompts == [job.prompt for job in jobs for _ in range(2)]
    assert first == again
    files = [Image.open(tmp_path / name) for name in first.pictures]
    means = [float(np.mean(np.asarray(file))) for file in files]
    assert first.rewards["brightness"] == pytest.approx(np.mean(means))
    assert first.total == pytest.approx(2 * np.mean(means))
    assert len(list(tmp_path.iterdir())) == 4
    expected = tiny_sd()(
        "a dog", generator=torch.Generator().manual_seed(1), output_type="pil", **CALL
    ).images[0]
    # A batch rounds differently, by one of 255 levels.
    shown, wanted = (np.asarray(image, dtype=int) for image in (files[1], expected))
    assert np.abs(shown - wanted).max() <= 1
    assert second.pictures != first.pictures


def test_a_picture_is_drawn_once(tmp_path):
    renderer, _ = make(tmp_path)
    before = renderer([Job("puppy", "a dog")])
    renderer.pipe = None
    assert renderer([Job("puppy", "a dog")]) == before
    with pytest.raises(TypeError):
        renderer([Job("puppy", "a cat")])


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-200], lambda data: b"x"])
def test_a_damaged_picture_is_drawn_again(tmp_path, damage):
    renderer, _ = make(tmp_path, seeds=(0,))
    before = renderer([Job("puppy", "a dog")])
    path = tmp_path / before[0].pictures[0]
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert renderer([Job("puppy", "a dog")]) == before
    assert path.read_bytes() == whole
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"a folder.*Fix: delete it"):
        renderer([Job("puppy", "a dog")])


def test_floors_and_failures(tmp_path):
    renderer, _ = make(tmp_path, floors={"brightness": 300.0})
    assert not renderer([Job("puppy", "a dog")])[0].passes
    good, failed = renderer([Job("puppy", "a dog"), Job("fail", "a dog")])
    assert good.total is not None
    assert failed.total is None and "brightness" in failed.failure


def test_videos_are_kept_with_all_frames(tmp_path):
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "num_frames": 5}
    renderer, reward = make(tmp_path, tiny_wan(), call=call, seeds=(0,))
    before = renderer([Job("puppy", "a dog")])
    assert reward.frames == [5]
    assert renderer([Job("puppy", "a dog")]) == before
    assert reward.frames == [5, 5]


def test_the_digest_names_all_that_ratings_depend_on(tmp_path):
    renderers = [
        make(tmp_path)[0],
        make(tmp_path, seeds=(3,))[0],
        make(tmp_path, base="other")[0],
        make(tmp_path, call={})[0],
        make(tmp_path, floors={"brightness": 1.0})[0],
    ]
    assert len({renderer.digest for renderer in renderers}) == 5
    assert make(tmp_path)[0].digest == renderers[0].digest
    with pytest.raises(ConfigError, match="no seeds"):
        make(tmp_path, seeds=())
