"""Drawing and scoring by Ray: equal ratings, workers that die, errors of workers."""

from __future__ import annotations

import os
import signal
import socket
import sys
from functools import partial

import pytest

from customize.errors import ConfigError, PipelineError
from customize.training.rewriting.picture_renderer import Job, Rating
from customize.training.rewriting.ray_cluster import connect
from customize.training.rewriting.ray_renderer import MAX_DEATHS, RayRenderer

TEXTS = ("a dog", "a cat", "a red hat", "a blue cup", "two cats on the beach", "a cup")


def kill_worker(notes, deaths):
    """Kill this process, the first times that it is called with a folder of notes."""
    count = len(list(notes.iterdir()))
    if count < deaths:
        (notes / str(count)).touch()
        os.kill(os.getpid(), signal.SIGKILL)


class DiesOnce:
    """A renderer whose first process that draws "a cat" is killed."""

    def __init__(self, renderer, notes):
        self.renderer, self.notes = renderer, notes
        self.digest, self.token_limits = renderer.digest, renderer.token_limits

    def __call__(self, jobs):
        if any(job.text == "a cat" for job in jobs):
            kill_worker(self.notes, 1)
        return self.renderer(jobs)


class Plain:
    """A renderer without a pipeline; "deadly" kills each process that draws it."""

    digest, token_limits = "plain", ()

    def __init__(self, notes):
        self.notes = notes

    def __call__(self, jobs):
        texts = [job.text for job in jobs]
        if "deadly" in texts:
            kill_worker(self.notes, 1000)
        if texts == ["failing"]:
            raise PipelineError("no reward works", where="rewards", fix="choose others")
        pictures = ("lost.png",) if "lost" in texts else ()
        return [Rating(float(len(text)), {}, True, pictures) for text in texts]


def build_dying_renderer(pictures, notes):
    from tests.training.rewriting.test_picture_renderer import make

    return DiesOnce(make(pictures)[0], notes)


def build_nothing():
    raise ConfigError("no such base", where="base", fix="give another")


@pytest.fixture(scope="module")
def cluster():
    with connect("local", 2) as ray:
        yield ray


@pytest.mark.timeout(60)
def test_a_cluster_that_does_not_answer_is_an_error_at_once(monkeypatch):
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"  # that is closed below
    for given in (address, f"ray://{address}", "auto"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with (
            pytest.raises(PipelineError, match="cannot be reached: Connection refused") as caught,
            connect(given, 1),
        ):
            pass
        assert address in caught.value.where
    for given in ("10.0.0.1", "10.0.0.1:x", ":6379", ""):
        with (
            pytest.raises(ConfigError, match="is not the address of a Ray cluster"),
            connect(given, 1),
        ):
            pass


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PipelineError, match=r"diffusers-customize\[cluster\]"):
        RayRenderer(build_nothing, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestWithACluster:
    def test_a_killed_worker_loses_nothing(self, cluster, tmp_path):
        from tests.training.rewriting.test_picture_renderer import make

        one, pictures, notes = folders = [tmp_path / name for name in ("one", "ray", "notes")]
        for folder in folders:
            folder.mkdir()
        local, _ = make(one)
        jobs = [*(Job("puppy", text) for text in TEXTS), Job("fail", "a dog")]
        jobs.append(jobs[0])
        renderer = RayRenderer(partial(build_dying_renderer, pictures, notes), 2, pictures)
        ratings = renderer(jobs)
        renderer.close()
        assert renderer.digest == local.digest
        (limit,), (expected,) = renderer.token_limits, local.token_limits
        assert limit.tokens == expected.tokens and limit.count("a dog") == expected.count("a dog")
        assert len(list(notes.iterdir())) == 1
        for rating, expected in zip(ratings, local(jobs), strict=True):
            assert (rating.total is None) == (expected.total is None)
            assert rating.total is None or rating.total == pytest.approx(expected.total, rel=1e-3)
            assert rating.rewards == pytest.approx(expected.rewards, rel=1e-3)
            assert rating.passes == expected.passes
            assert rating.pictures == expected.pictures or "brightness" in rating.failure
        assert [r.total is None for r in ratings] == [job.prompt == "fail" for job in jobs]
        assert {p.name for p in pictures.iterdir()} == {p.name for p in one.iterdir()}

    def test_jobs_that_kill_or_fail_do_so_alone(self, cluster, tmp_path):
        notes = tmp_path / "notes"
        notes.mkdir()
        renderer = RayRenderer(partial(Plain, notes), 1, tmp_path)
        jobs = [Job("puppy", text) for text in ("a dog", "deadly", "a hat", "failing", "a red cup")]
        ratings = renderer(jobs)
        assert [rating.total for rating in ratings] == [5, None, 5, None, 9]
        assert "3 workers died" in ratings[1].failure and "no reward" in ratings[3].failure
        assert len(list(notes.iterdir())) == 1 + MAX_DEATHS  # once with the jobs of its task
        with pytest.raises(PipelineError, match="no reward works"):
            renderer([Job("puppy", "failing")])
        with pytest.raises(PipelineError, match="share"):
            renderer([Job("puppy", "lost")])

    def test_errors_of_workers_are_raised(self, cluster, tmp_path):
        with pytest.raises(ConfigError, match="no such base"):
            RayRenderer(build_nothing, 1, tmp_path)
        with pytest.raises(ConfigError, match="workers is 0"):
            RayRenderer(build_nothing, 0, tmp_path)
        with pytest.raises(PipelineError, match="no worker is ready"):
            RayRenderer(build_nothing, 1, tmp_path, num_gpus=1, start_timeout=2.0)
