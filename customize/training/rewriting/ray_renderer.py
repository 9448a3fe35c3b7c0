"""Drawing and scoring of rewritings in several processes, on one machine or many, with Ray.

Each worker is a process that builds a renderer: a pipeline with the rewards beside it. A task is
a few jobs, and a worker has one task at a time. A worker that dies is replaced, and its jobs are
drawn by others.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from customize.base.device import choose_device
from customize.concepts.tokens.token_limit import TokenLimit
from customize.errors import ConfigError, PipelineError, first_line
from customize.text import plural
from customize.training.rewriting.load_renderer import RendererSettings, load_renderer
from customize.training.rewriting.picture_renderer import Job, PictureRenderer, Rating, Renderer
from customize.training.rewriting.ray_cluster import connect, import_ray

#: Number of deaths in sequence, of workers with the same single job or of one that loads.
MAX_DEATHS = 3
#: Most jobs of a task; with two seeds each they fill a batch of the pipeline.
MAX_JOBS = 4


class PipelineRenderer(Renderer, Protocol):
    """A renderer that knows what the text encoders of its base read.

    Attributes:
        token_limits: What each text encoder reads of a prompt.
    """

    @property
    def token_limits(self) -> list[TokenLimit]: ...  # noqa: D102


class RenderWorker:
    """What runs in the process of a worker."""

    def load(
        self, build: Callable[[], PipelineRenderer], folder: str
    ) -> tuple[str, list[TokenLimit]]:
        """Build the renderer and return its digest and token limits.

        Args:
            build: Returns the renderer.
            folder: Folder that relative paths start from, where the machine has it.
        """
        with suppress(OSError):
            os.chdir(folder)
        self.renderer = build()
        return self.renderer.digest, self.renderer.token_limits

    def rate(self, jobs: Sequence[Job]) -> list[Rating] | PipelineError:
        """Return the ratings of jobs, or the error if none was rated."""
        try:
            return self.renderer(jobs)
        except PipelineError as error:
            return error


@dataclass(frozen=True)
class _Task:
    """Jobs of one call of a worker.

    Attributes:
        jobs: The jobs.
        deaths: Number of workers that died during this task, which then has a single job.
    """

    jobs: tuple[Job, ...]
    deaths: int = 0


@dataclass(eq=False)
class _Worker:
    """A worker and its call.

    Attributes:
        actor: Handle of its process.
        call: Reference to the result of its call; None: it is idle.
        task: The task of the call; None: it is loading or idle.
        deaths: Number of predecessors that died in sequence while they loaded.
    """

    actor: Any
    call: Any
    task: _Task | None = None
    deaths: int = 0


@dataclass(frozen=True)
class _Death:
    """The result of a call that killed its worker, with what Ray reports."""

    reason: str


class RayRenderer:
    """Draws and scores rewritings by several workers.

    Ratings are those of the renderer that each worker builds. They differ by rounding, as batches
    of the pipeline have other prompts, and ratings without a total may lack their pictures.

    If a worker dies, another is started, and each of its jobs becomes a task. A job during which
    :data:`MAX_DEATHS` workers die gets a rating without a total. Workers that still load, or that
    the cluster has no room for, get no tasks.

    Args:
        build: Returns the renderer; it is pickled and called in each worker.
        workers: Number of workers, 1 or more.
        folder: Folder of the pictures, which all machines share.
        num_gpus: GPUs of each worker.
        start_timeout: Most seconds in which no worker is ready.

    Raises:
        ConfigError: ``workers`` is below 1.
        CustomizeError: The renderer cannot be built.
        PipelineError: Ray is missing or has no cluster, or no worker starts.
    """

    def __init__(
        self,
        build: Callable[[], PipelineRenderer],
        workers: int,
        folder: Path,
        num_gpus: int = 0,
        start_timeout: float = 1800.0,
    ) -> None:
        if workers < 1:
            raise ConfigError(f"workers is {workers}", where="workers", fix="give 1 or more")
        self._ray = import_ray()
        if not self._ray.is_initialized():
            raise PipelineError(
                "Ray is not connected to a cluster", where="RayRenderer", fix="call ray.init()"
            )
        self._build, self._size, self._folder = build, workers, folder
        self._start_timeout, self._digest = start_timeout, ""
        self._token_limits: list[TokenLimit] = []
        self._actor_class = self._ray.remote(RenderWorker).options(num_cpus=1, num_gpus=num_gpus)
        self._workers: list[_Worker] = []
        with self._close_after_errors():
            self._start_workers()
            while not self._digest:
                self._finish_call()

    @property
    def digest(self) -> str:
        """The digest of the workers' renderers."""
        return self._digest

    @property
    def token_limits(self) -> list[TokenLimit]:
        """What each text encoder of the base reads of a prompt."""
        return self._token_limits

    def __call__(self, jobs: Sequence[Job]) -> list[Rating]:
        """Return the rating of each job; equal jobs are rated once.

        Raises:
            PipelineError: No job was rated, a picture is missing in the folder, or Ray failed.
        """
        distinct = tuple(dict.fromkeys(jobs))
        size = max(1, min(MAX_JOBS, len(distinct) // self._size))
        tasks = deque(_Task(distinct[k : k + size]) for k in range(0, len(distinct), size))
        ratings: dict[Job, Rating] = {}
        errors: list[PipelineError] = []
        failed = 0
        with self._close_after_errors():
            self._start_workers()
            while len(ratings) < len(distinct):
                self._assign(tasks)
                finished = self._finish_call()
                if finished is None:
                    continue
                task, result = finished
                if isinstance(result, _Death):
                    retries = _retry(task)
                    tasks += retries
                    if retries:
                        continue
                    result = _job_error(task.jobs[0], result.reason)
                if isinstance(result, PipelineError):
                    errors.append(result)
                    failed += len(task.jobs)
                    result = [Rating(None, {}, False, failure=str(result))] * len(task.jobs)
                self._check_pictures(result)
                ratings.update(zip(task.jobs, result, strict=True))
        if errors and failed == len(distinct):
            raise errors[0]
        return [ratings[job] for job in jobs]

    def close(self) -> None:
        """End the workers; the next call starts others."""
        for worker in self._workers:
            with suppress(Exception):  # those of a lost cluster
                self._ray.kill(worker.actor)
        self._workers = []

    @contextmanager
    def _close_after_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _start_workers(self) -> None:
        """Start the workers that are missing."""
        while len(self._workers) < self._size:
            self._workers.append(self._start_worker())

    def _start_worker(self, deaths: int = 0) -> _Worker:
        actor = self._actor_class.remote()
        return _Worker(actor, actor.load.remote(self._build, os.getcwd()), deaths=deaths)

    def _assign(self, tasks: deque[_Task]) -> None:
        """Give tasks to idle workers."""
        for worker in self._workers:
            if worker.call is None and tasks:
                worker.task = tasks.popleft()
                worker.call = worker.actor.rate.remote(worker.task.jobs)

    def _finish_call(self) -> tuple[_Task, list[Rating] | PipelineError | _Death] | None:
        """Wait until a call is finished, whose worker is idle or replaced then.

        Returns:
            The task and its result; None if the worker loaded.

        Raises:
            PipelineError: No worker starts, digests differ, or Ray failed.
            Exception: What the renderer raised.
        """
        failures = self._ray.exceptions
        calls = {worker.call: worker for worker in self._workers if worker.call is not None}
        is_drawing = any(worker.task is not None for worker in calls.values())
        timeout = None if is_drawing else self._start_timeout
        done, _ = self._ray.wait(list(calls), timeout=timeout)
        if not done:
            raise PipelineError(
                f"no worker is ready after {self._start_timeout:g} seconds",
                where="Ray",
                fix="see whether the cluster has a free CPU, and GPU, for each worker",
            )
        worker = calls[done[0]]
        task, worker.call, worker.task = worker.task, None, None
        try:
            result = self._ray.get(done[0])
        except (failures.RayActorError, failures.OutOfMemoryError) as error:
            self._replace(worker, is_loading=task is None, reason=first_line(error))
            return None if task is None else (task, _Death(first_line(error)))
        except failures.RayTaskError as error:
            raise error.cause from error
        except failures.RayError as error:
            raise PipelineError(
                f"Ray failed: {first_line(error)}",
                where="Ray",
                fix="check the cluster, and run the same command again to go on",
            ) from error
        if task is not None:
            return task, result
        worker.deaths = 0
        self._check_digest(*result)
        return None

    def _replace(self, worker: _Worker, is_loading: bool, reason: str) -> None:
        """Start another worker in place of one that died."""
        deaths = worker.deaths + 1 if is_loading else 0
        if deaths == MAX_DEATHS:
            raise PipelineError(
                f"{deaths} workers died in sequence while they loaded the models: {reason}",
                where="Ray",
                fix="see whether the machines have memory for all workers, or start fewer",
            )
        with suppress(Exception):
            self._ray.kill(worker.actor)  # one that is only out of reach
        self._workers[self._workers.index(worker)] = self._start_worker(deaths)

    def _check_digest(self, digest: str, limits: list[TokenLimit]) -> None:
        if not self._digest:
            self._digest, self._token_limits = digest, limits
        if digest != self._digest:
            raise PipelineError(
                "the workers have different models, dtypes or settings",
                where="Ray",
                fix="give --dtype, and install the same versions on all machines",
            )

    def _check_pictures(self, ratings: Sequence[Rating]) -> None:
        for name in (name for rating in ratings for name in rating.pictures):
            if not (self._folder / name).is_file():
                raise PipelineError(
                    f"a worker drew {name}, and the folder of the pictures does not have it",
                    where=self._folder,
                    fix="choose an output folder that all machines of the cluster share",
                )


def _retry(task: _Task) -> list[_Task]:
    """Return the tasks that replace one during which a worker died: each has a single job."""
    if len(task.jobs) > 1:
        return [_Task((job,)) for job in task.jobs]
    return [_Task(task.jobs, task.deaths + 1)] if task.deaths + 1 < MAX_DEATHS else []


def _job_error(job: Job, reason: str) -> PipelineError:
    return PipelineError(
        f"{MAX_DEATHS} workers died during this rewriting: {reason}",
        where=job.text,
        fix="see whether the machines have enough memory",
    )


@contextmanager
def open_ray_renderer(
    settings: RendererSettings, folder: Path, device: str | None, address: str, workers: int = 2
) -> Iterator[RayRenderer]:
    """Connect to a cluster and load a renderer in each worker; both end with the context.

    Args:
        settings: How rewritings are drawn and scored.
        folder: Folder of the pictures, which all machines share.
        device: Device of base and rewards; None: a GPU for each worker if the cluster has GPUs.
        address: As in :func:`connect`.
        workers: Number of workers.

    Raises:
        ConfigError: The cluster has too few CPUs or GPUs, or a setting is invalid.
        PipelineError: Ray is missing, the cluster cannot be reached, or a model cannot be loaded.
    """
    folder = folder.resolve()
    with connect(address, workers) as ray:
        resources = ray.cluster_resources()
        kind = (device or ("cuda" if resources.get("GPU") else "")).partition(":")[0]
        needed = ("CPU", "GPU") if kind == "cuda" else ("CPU",)
        for name in needed:
            count = int(resources.get(name, 0))
            if count < workers:
                raise ConfigError(
                    f"the cluster has {plural(count, name)} for {plural(workers, 'worker')}, which"
                    " need one each",
                    where="--workers",
                    fix=f"give --workers {count}" if count else "add --device cpu",
                )
        build = partial(build_renderer, settings, folder, kind or None)
        renderer = RayRenderer(build, workers, folder, num_gpus=int("GPU" in needed))
        try:
            yield renderer
        finally:
            renderer.close()


def build_renderer(settings: RendererSettings, folder: Path, device: str | None) -> PictureRenderer:
    """Load the renderer of a worker, on a device of its process."""
    return load_renderer(settings, folder, choose_device(device, "--device"))
