"""Metrics of pyiqa (IQA-PyTorch) without reference image, such as `pyiqa:musiq`.

Written for the API of pyiqa 0.1.16: `create_metric(metric_name, as_loss, device)` returns a module
with `metric_mode` and `lower_better` that is called with `target` (1, 3, height, width) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from customize.errors import ConfigError
from customize.evaluation.rewards.frames import mean_over_frames
from customize.evaluation.rewards.optional_package import call_package, import_optional
from customize.evaluation.rewards.reward import Picture, RewardKind, weights_digest
from customize.image_tensors import images_to_tensor
from customize.near_names import suggest_names
from customize.text import quote

# Metrics that compare sets of images; pyiqa lists them among those without reference.
_OF_SETS = ("fid", "sfid", "fid_dinov2", "inception_score")


class PyiqaReward:
    """A metric of pyiqa; metrics whose lower values are better are negated.

    Args:
        model: Must be None, as each metric has its own weights.
        device: Device that the metric runs on.
        metric: Name of a metric that scores one image.

    Raises:
        ConfigError: There is no such metric, or a model is given.
        PipelineError: pyiqa is not installed, or cannot load the metric.
    """

    def __init__(
        self, model: str | Path | None, device: str | torch.device = "cpu", metric: str = "musiq"
    ) -> None:
        self.name = f"pyiqa:{metric}"
        if model is not None:
            raise ConfigError(
                "metrics of pyiqa have their own weights",
                where=self.name,
                fix=f"leave out the model {quote(model)}",
            )
        pyiqa = import_optional("pyiqa", self.name, "pip install pyiqa")
        names = [n for n in pyiqa.list_models(metric_mode="NR") if n not in _OF_SETS]
        if metric not in names:
            raise ConfigError(
                f"pyiqa has no metric {quote(metric)} that scores one image",
                where=self.name,
                fix=suggest_names(metric, names),
            )
        self.metric = call_package(
            "pyiqa",
            metric,
            pyiqa.create_metric,
            metric_name=metric,
            as_loss=False,
            device=torch.device(device),
        )
        self._needs_prompt = metric == "clipscore"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights and the name."""
        return weights_digest(self.metric, self.name)

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Tensor:
        """Scores (n,); only `pyiqa:clipscore` reads the prompts."""
        return mean_over_frames(self._score_images, pictures, prompts)

    def _score_images(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        scores = []
        for image, prompt in zip(images, prompts, strict=True):  # metrics read the original size
            captions = {"caption_list": [prompt]} if self._needs_prompt else {}
            pixels = (images_to_tensor([image]) + 1) / 2
            scores.append(self.metric(target=pixels, **captions).float().cpu().reshape(()))
        values = torch.stack(scores)
        return -values if self.metric.lower_better else values


PYIQA = RewardKind(
    name="pyiqa",
    measures="quality by a metric of pyiqa",
    load=PyiqaReward,
    needs="pyiqa",
    variant="required",
)
