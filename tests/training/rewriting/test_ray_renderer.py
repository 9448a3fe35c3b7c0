"""Drawing and scoring by Ray: equal ratings, workers that die, errors of workers."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial

import pytest

from customize.errors import ConfigError, PipelineError
from customize.training.rewriting.picture_renderer import Job
from customize.training.rewriting.ray_renderer import MAX_DEATHS, RayRenderer, connect
from tests.training.rewriting.test_picture_renderer import make

slow = [pytest.mark.slow, pytest.mark.timeout(3000)]
TEXTS = ("a dog", "a cat", "a red hat", "a blue cup", "two cats on the beach")


class Deadly:
    """A renderer that kills its process for some texts, and notes that in a folder.

    It does so once for "a cat", always for "a striped car".
    """

    def __init__(self, renderer, notes):
        self.renderer, self.notes, self.digest = renderer, notes, renderer.digest

    def __call__(self, jobs):
        deadly = {"a cat": 1, "a striped car": 1000}
        for job in jobs:
            died = len(list(self.notes.glob(f"{job.text}*")))
            if died < deadly.get(job.text, 0):
                (self.notes / f"{job.text} {died}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return self.renderer(jobs)


def build_deadly(pictures, notes):
    return Deadly(make(pictures)[0], notes)


def build_picture_renderer(pictures):
    return make(pictures)[0]


def build_nothing():
    raise ConfigError("no such base", where="base", fix="give another")


@pytest.fixture(scope="module")
def cluster():
    with connect("local", 2) as ray:
        yield ray


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PipelineError, match=r"diffusers-customize\[cluster\]"):
        RayRenderer(build_nothing, 2, tmp_path)


class TestWithACluster:
    pytestmark = slow

    def test_killed_workers_lose_nothing(self, cluster, tmp_path):
        folders = [tmp_path / name for name in ("one", "ray", "notes")]
        for folder in folders:
            folder.mkdir()
        one, pictures, notes = folders
        local, _ = make(one)
        jobs = [
            *(Job("puppy", text) for text in TEXTS),
            Job("fail", "a dog"),
            Job("kitty", "a cup"),
        ]
        jobs.append(jobs[0])
        renderer = RayRenderer(partial(build_deadly, pictures, notes), 2, pictures)
        assert renderer.digest == local.digest
        deadly = Job("puppy", "a striped car")
        *ratings, failed = renderer([*jobs, deadly])
        deaths = [len(list(notes.glob(f"{text}*"))) for text in ("a cat", deadly.text)]
        assert deaths == [1, 1 + MAX_DEATHS]  # the first with the other jobs of the task
        assert failed.total is None and "3 workers died" in failed.failure
        for rating, expected in zip(ratings, local(jobs), strict=True):
            assert rating.total == pytest.approx(expected.total, rel=1e-3)
            assert rating.rewards == pytest.approx(expected.rewards, rel=1e-3)
            assert rating.passes == expected.passes
            assert rating.pictures == expected.pictures or "brightness" in rating.failure
        assert [rating.total is None for rating in ratings] == [
            job.prompt == "fail" for job in jobs
        ]
        assert {p.name for p in pictures.iterdir()} == {p.name for p in one.iterdir()}
        renderer.close()
        with pytest.raises(PipelineError, match="brightness"):  # by new workers
            renderer([Job("fail", "a dog")])
        renderer.close()

    def test_errors_of_workers_are_those_of_the_renderer(self, cluster, tmp_path):
        with pytest.raises(ConfigError, match="no such base"):
            RayRenderer(build_nothing, 1, tmp_path)
        with pytest.raises(ConfigError, match="workers is 0"):
            RayRenderer(build_nothing, 0, tmp_path)

    def test_machines_must_share_the_folder_of_the_pictures(self, cluster, tmp_path):
        there, here = tmp_path / "there", tmp_path / "here"
        there.mkdir()
        renderer = RayRenderer(partial(build_picture_renderer, there), 1, here)
        with pytest.raises(PipelineError, match="share"):
            renderer([Job("puppy", "a dog")])

    def test_a_cluster_without_room_is_an_error(self, cluster, tmp_path):
        build = partial(build_picture_renderer, tmp_path)
        with pytest.raises(PipelineError, match="no worker is ready"):
            RayRenderer(build, 1, tmp_path, num_gpus=1, start_timeout=2.0)
