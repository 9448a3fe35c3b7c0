"""Drawing rewritings and scoring their pictures, in one place, for evolution and preferences."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from customize.atomic import write_atomic
from customize.concepts.tokens.token_limit import TokenLimit
from customize.errors import ConfigError, DataError, PipelineError
from customize.evaluation.rewards.weighted_sum import WeightedSum
from customize.safe_read import MAX_IMAGE_BYTES, path_exists, read_bytes
from customize.stages.token_limits import default_token_limits


@dataclass(frozen=True)
class Job:
    """A rewriting to draw and score.

    Attributes:
        prompt: The user's prompt, by which pictures are scored.
        text: The prompt to draw.
    """

    prompt: str
    text: str


@dataclass(frozen=True)
class Rating:
    """The scores of a rewriting's pictures.

    Attributes:
        total: Mean weighted sum over the pictures; None where a reward failed on one of them.
        rewards: Name -> mean reward.
        passes: Whether every reward of every picture reaches its floor.
        pictures: File names, one for each seed.
        failure: Why there is no total; empty if there is one.
    """

    total: float | None
    rewards: Mapping[str, float]
    passes: bool
    pictures: tuple[str, ...] = ()
    failure: str = ""


class Renderer(Protocol):
    """Draws and scores rewritings.

    Attributes:
        digest: What identifies its settings: equal digests give equal ratings.
    """

    @property
    def digest(self) -> str: ...  # noqa: D102

    def __call__(self, jobs: Sequence[Job]) -> list[Rating]:
        """Return the rating of each job."""
        ...


class PictureRenderer:
    """Draws each rewriting with each seed by a pipeline, and scores the pictures by rewards.

    Pictures are PNG files named by what they depend on, so a picture is drawn once.

    Args:
        pipe: Text-to-image or text-to-video pipeline.
        reward: The weighted sum of rewards.
        folder: Folder of the pictures.
        seeds: Seeds of the pictures of each rewriting.
        call: Further arguments of the pipeline's call, such as ``num_inference_steps``.
        base: What identifies the pipeline's weights, such as its path.
        batch_size: Prompts of one call of the pipeline.

    Raises:
        ConfigError: There are no seeds.
    """

    def __init__(
        self,
        pipe: Any,
        reward: WeightedSum,
        folder: Path,
        seeds: Sequence[int] = (0, 1),
        call: Mapping[str, Any] | None = None,
        base: str = "",
        batch_size: int = 8,
    ) -> None:
        if not seeds:
            raise ConfigError("there are no seeds", where="seeds", fix="give at least one")
        self.pipe, self.reward, self.folder = pipe, reward, folder
        self.seeds, self.call, self.base = tuple(seeds), dict(call or {}), base
        self.batch_size = batch_size
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def digest(self) -> str:
        """What identifies base, settings, seeds and rewards, 16 hexadecimal digits."""
        return short_hash(self.base, self._settings(), self.seeds, self.reward.digest)

    @property
    def token_limits(self) -> list[TokenLimit]:
        """What each text encoder of the base reads of a prompt."""
        return default_token_limits(self.pipe)

    def __call__(self, jobs: Sequence[Job]) -> list[Rating]:
        """Return the rating of each job; missing and damaged pictures are drawn.

        Raises:
            PipelineError: A picture is not finite, or no picture was scored by all rewards.
        """
        names = {
            (job.text, seed): f"{short_hash(self.base, self._settings(), job.text, seed)}.png"
            for job in jobs
            for seed in self.seeds
        }
        drawn = {key: _read(self.folder / name) for key, name in names.items()}
        missing = [key for key, picture in drawn.items() if picture is None]
        drawn |= self._draw(missing, names)
        keys = [(job, seed) for job in jobs for seed in self.seeds]
        pictures = [drawn[job.text, seed] for job, seed in keys]
        prompts = [job.prompt for job, _ in keys]
        scores = self.reward.evaluate(pictures, prompts)
        return [
            self._rate(scores, k, [names[job.text, s] for s in self.seeds])
            for k, job in enumerate(jobs)
        ]

    def _settings(self) -> str:
        return json.dumps(self.call, sort_keys=True, default=str)

    def _draw(
        self, keys: Sequence[tuple[str, int]], names: Mapping[tuple[str, int], str]
    ) -> dict[tuple[str, int], Any]:
        """Draw and write pictures: (text, seed) -> picture, or frames of a video."""
        drawn: dict[tuple[str, int], Any] = {}
        for first in range(0, len(keys), self.batch_size):
            part = keys[first : first + self.batch_size]
            output = self.pipe(
                prompt=[text for text, _ in part],
                generator=[torch.Generator().manual_seed(seed) for _, seed in part],
                output_type="pil",
                **self.call,
            )
            results = getattr(output, "images", None) or output.frames
            for key, picture in zip(part, results, strict=True):
                _write(
                    self.folder / names[key], picture if isinstance(picture, list) else [picture]
                )
                drawn[key] = picture
        return drawn

    def _rate(self, scores: Any, index: int, pictures: Sequence[str]) -> Rating:
        rows = slice(index * len(self.seeds), (index + 1) * len(self.seeds))
        failed = [k for k in range(rows.start, rows.stop) if scores.failed[k]]
        if failed:
            return Rating(None, {}, False, tuple(pictures), scores.reasons[failed[0]])
        return Rating(
            float(scores.total[rows].double().mean()),
            {name: float(values[rows].double().mean()) for name, values in scores.scores.items()},
            bool(scores.passes[rows].all()),
            tuple(pictures),
        )


def try_render(renderer: Renderer, jobs: Sequence[Job]) -> list[Rating]:
    """Return the rating of each job: one without a total where no picture was scored."""
    try:
        return renderer(jobs) if jobs else []
    except PipelineError as error:
        return [Rating(None, {}, False, failure=str(error))] * len(jobs)


def short_hash(*parts: object) -> str:
    """Return 16 hexadecimal digits that identify values."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _write(path: Path, frames: Sequence[Image.Image]) -> None:
    """Write a picture, or a video as an animated PNG without loss."""
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=len(frames) > 1, append_images=list(frames[1:]))
    write_atomic(path, buffer.getvalue())


def _read(path: Path) -> Any:
    """Return the picture of a file, or the frames of an animated one; None if missing or damaged.

    Raises:
        DataError: The file cannot be opened.
    """
    if not path_exists(path):
        return None
    try:
        data = read_bytes(path, MAX_IMAGE_BYTES)
    except OSError as error:
        raise DataError(
            f"the picture cannot be read: {error.strerror or error}", where=path, fix="delete it"
        ) from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            frames = []
            for index in range(getattr(image, "n_frames", 1)):
                image.seek(index)
                frames.append(image.convert("RGB"))
    except Exception:  # damaged: Pillow raises anything
        return None
    return frames if len(frames) > 1 else frames[0]
