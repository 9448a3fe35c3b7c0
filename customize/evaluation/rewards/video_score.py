"""VideoScore: five qualities of a video by an Idefics2 with a regression head (arXiv:2406.15252).

Written for `Idefics2ForSequenceClassification` of mantis-vl 0.0.5, called as in
`examples/run_videoscore.py` of TIGER-AI-Lab/VideoScore: one text with a placeholder for each frame.
The published models were trained with one wording of that text, which is read from
:data:`QUERY_FILE` in the model's folder: `REGRESSION_QUERY_PROMPT` of that example.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from PIL import Image
from torch import Tensor

from customize.core.precision import full_precision
from customize.errors import ConfigError, PipelineError
from customize.evaluation.rewards.frames import check_pictures, sample_frames
from customize.evaluation.rewards.optional_package import import_optional
from customize.evaluation.rewards.reward import Picture, RewardKind, weights_digest
from customize.evaluation.rewards.special_tokens import remove_special_tokens
from customize.evaluation.scorer_models import load_model, load_pretrained
from customize.near_names import suggest_names
from customize.safe_read import MAX_TEXT_BYTES, read_text
from customize.text import quote

#: Frames of a video that the model reads, as in Prompt-A-Video.
FRAMES = 16
#: The outputs of the model, in their order; each is about 1 to 4.
DIMENSIONS = (
    "visual_quality",
    "temporal_consistency",
    "dynamic_degree",
    "text_alignment",
    "factual_consistency",
)
#: The text for the model, with `{text_prompt}` where the prompt goes.
QUERY_FILE = "query.txt"

_PLACEHOLDER = "{text_prompt}"
_IMAGE = "<image>"


class VideoScoreReward:
    """One of five qualities of a video, or their mean.

    Rewards of several dimensions share one model, and its last results.

    Args:
        model: Folder of TIGER-Lab/VideoScore or VideoScore-v1.1, and in it :data:`QUERY_FILE`.
        device: Device that the model runs on; float32 on the CPU, elsewhere bfloat16.
        dimension: One of :data:`DIMENSIONS`; default: the mean of all.

    Raises:
        ConfigError: No model is given, or the dimension is unknown.
        PipelineError: mantis-vl is not installed, or the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | Path | None,
        device: str | torch.device = "cpu",
        dimension: str | None = None,
    ) -> None:
        self.name = "video_score" if dimension is None else f"video_score:{dimension}"
        if dimension is not None and dimension not in DIMENSIONS:
            raise ConfigError(
                f"VideoScore has no dimension {quote(dimension)}",
                where=self.name,
                fix=suggest_names(dimension, DIMENSIONS),
            )
        if model is None:
            raise ConfigError(
                "the video_score reward needs a folder",
                where="model",
                fix=f"give the folder of TIGER-Lab/VideoScore-v1.1 with {QUERY_FILE}",
            )
        self.columns = range(len(DIMENSIONS))
        if dimension is not None:
            self.columns = range(DIMENSIONS.index(dimension), DIMENSIONS.index(dimension) + 1)
        with _LOCK:
            key = str(model), str(device)
            self.scorer = _SCORERS.get(key) or _Scorer(model, device)
            _SCORERS[key] = self.scorer

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return self.scorer.digest

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Tensor:
        """Scores (n,); a picture is a video of one frame."""
        videos = [sample_frames(video, FRAMES) for video in check_pictures(pictures, prompts)]
        return self.scorer.scores(videos, list(prompts))[:, self.columns].mean(1)


class _Scorer:
    """The model, and its scores of the last videos."""

    def __init__(self, model: str | Path, device: str | torch.device) -> None:
        mantis = import_optional(
            "mantis.models.idefics2", "video_score", "pip install mantis-vl torchvision"
        )
        from transformers import AutoProcessor

        self.query = _read_query(Path(model) / QUERY_FILE)
        self.model = load_model(
            mantis.Idefics2ForSequenceClassification,
            model,
            "VideoScore",
            ("idefics2",),
            dtype=torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16,
        ).to(device)
        self.processor = load_pretrained(AutoProcessor, model, "the VideoScore model's processor")
        self._last: tuple[list[list[Image.Image]], list[str], Tensor] | None = None

    @cached_property
    def digest(self) -> str:
        return weights_digest(self.model)

    @full_precision(tf32=True)
    @torch.no_grad()
    def scores(self, videos: list[list[Image.Image]], prompts: list[str]) -> Tensor:
        """Scores (n, 5) of videos."""
        last = self._last
        if last is None or not (_are_same(last[0], videos) and last[1] == prompts):
            rows = [self._score(video, text) for video, text in zip(videos, prompts, strict=True)]
            self._last = last = videos, prompts, torch.stack(rows)
        return last[2]

    def _score(self, frames: list[Image.Image], prompt: str) -> Tensor:
        text = self.query.replace(_PLACEHOLDER, remove_special_tokens(prompt, self.processor))
        inputs = self.processor(
            text=text + f"{_IMAGE} " * len(frames), images=frames, return_tensors="pt"
        )
        logits = self.model(**inputs.to(self.model.device, self.model.dtype)).logits
        if logits.shape != (1, len(DIMENSIONS)):
            raise PipelineError(
                f"the model returns scores of shape {tuple(logits.shape)}, not (1, 5)",
                where="video_score",
                fix="give the folder of TIGER-Lab/VideoScore or VideoScore-v1.1",
            )
        return logits[0].float().cpu()


_LOCK = threading.Lock()
_SCORERS: WeakValueDictionary[tuple[str, str], _Scorer] = WeakValueDictionary()


def _are_same(last: list[list[Image.Image]], videos: list[list[Image.Image]]) -> bool:
    """Whether two batches have the very same images, by identity."""
    return len(last) == len(videos) and all(
        len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
        for a, b in zip(last, videos, strict=True)
    )


def _read_query(path: Path) -> str:
    cause: Exception | None = None
    query = ""
    try:
        query = read_text(path, MAX_TEXT_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        cause = error
    if _PLACEHOLDER not in query:
        raise PipelineError(
            f"the text for the model {'cannot be read' if cause else 'lacks ' + _PLACEHOLDER}",
            where=path,
            fix="save REGRESSION_QUERY_PROMPT of examples/run_videoscore.py"
            " (TIGER-AI-Lab/VideoScore) there",
        ) from cause
    return query


VIDEO_SCORE = RewardKind(
    name="video_score",
    measures="quality of a video, the mean of five or one of them, 1 to 4",
    load=VideoScoreReward,
    needs="mantis-vl",
    variant="optional",
)
