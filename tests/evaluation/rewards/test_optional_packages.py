"""Rewards of other packages, against stand-ins with their signatures.

The packages need other versions of transformers, or downloads of gigabytes. The stand-ins take
keywords alone, as the order of the arguments has changed between versions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor

from customize.errors import ConfigError, PipelineError
from customize.evaluation.rewards import load_reward
from tests.evaluation.making import pictures
from tests.evaluation.rewards import making
from tests.evaluation.rewards.making import PROMPTS, save_video_score, videos


@pytest.fixture
def provide(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes modules that can be imported."""

    def make(name: str, **content: Any) -> None:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:count]))
            module.__path__ = []
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for key, value in content.items():
            setattr(module, key, value)

    return make


def width_and_length(image: Image.Image, prompt: str) -> float:
    """A score of which a test knows the picture and the prompt."""
    return image.width + len(prompt) / 100


EXPECTED = [width_and_length(*pair) for pair in zip(pictures(3), PROMPTS, strict=True)]


@pytest.mark.parametrize(
    ("name", "module", "install"),
    [
        ("pyiqa:musiq", "pyiqa", "pip install pyiqa"),
        ("hpsv3", "hpsv3", "pip install --no-deps hpsv3"),
        ("image_reward", "ImageReward", "pip install image-reward"),
        ("video_score", "mantis", "pip install mantis-vl"),
    ],
)
def test_missing_and_broken_packages(
    name: str,
    module: str,
    install: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tmp_path if name == "video_score" else None
    with pytest.raises(PipelineError, match=f"{module} is not installed.*{name}.*Fix: {install}"):
        load_reward(name, model)
    # As packages do that import what newer versions of transformers no longer have.
    broken = "from transformers.modeling_utils import apply_chunking_to_forward_2"
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PipelineError, match=f"{module} cannot be imported: .*apply_chunking"):
        load_reward(name, model)
    sys.modules.pop(module, None)


class Metric(nn.Module):
    """InferenceModel of pyiqa 0.1.16."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.metric_mode, self.lower_better = "NR", name == "niqe"
        self.net = nn.Linear(1, 1) if name != "niqe" else nn.Identity()
        self.captions: list[str] = []

    def forward(self, *, target: Tensor, ref: Any = None, **settings: Any) -> Tensor:
        assert target.shape[:2] == (1, 3) and target.min() >= 0 and target.max() <= 1
        self.captions += settings.pop("caption_list", [])
        assert not settings and ref is None
        return target.mean((2, 3))[:, :1]  # as metrics do that return (1, 1)


@pytest.fixture
def pyiqa(provide: Any) -> None:
    names = {"NR": ["clipscore", "fid", "musiq", "niqe"], "FR": ["lpips"]}

    def create_metric(
        *, metric_name: str, as_loss: bool = False, device: Any = None, **settings: Any
    ) -> Metric:
        assert isinstance(device, torch.device) and not settings and not as_loss
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(len(metric_name))
            return Metric(metric_name)

    def list_models(
        *, metric_mode: str | None = None, filter: str = "", exclude_filters: str = ""
    ) -> list[str]:
        return names[metric_mode or "NR"]

    provide("pyiqa", create_metric=create_metric, list_models=list_models)


def test_pyiqa(pyiqa: None) -> None:
    images = pictures(3)
    reds = torch.tensor([torch.tensor([*image.getdata()])[:, 0].float().mean() for image in images])
    musiq, niqe = load_reward("pyiqa:musiq"), load_reward("pyiqa:niqe")
    torch.testing.assert_close(musiq(images, PROMPTS), reds / 255)
    torch.testing.assert_close(niqe(images, PROMPTS), -reds / 255)  # lower is better
    assert musiq.name == "pyiqa:musiq"
    assert len({musiq.digest, niqe.digest, load_reward("pyiqa:clipscore").digest}) == 3
    clipscore: Any = load_reward("pyiqa:clipscore")
    clipscore(images, PROMPTS)
    assert clipscore.metric.captions == PROMPTS


def test_pyiqa_metrics_that_score_no_single_image(pyiqa: None) -> None:
    for name in ("lpips", "fid", "musik"):
        with pytest.raises(ConfigError, match=f"no metric '{name}' that scores one image"):
            load_reward(f"pyiqa:{name}")
    with pytest.raises(ConfigError, match=r"have their own weights.*leave out the model 'here'"):
        load_reward("pyiqa:musiq", "here")


class Inferencer:
    """HPSv3RewardInferencer, whose arguments have another order in each version."""

    def __init__(
        self,
        *,
        config_path: str | None = None,
        checkpoint_path: str | None = None,
        device: str = "cuda",
        differentiable: bool = False,
    ) -> None:
        assert config_path is None and device == "cpu" and not differentiable
        if checkpoint_path == "missing.safetensors":
            raise FileNotFoundError(f"No such file: {checkpoint_path}")
        self.model = nn.Linear(2, 2)

    def reward(self, *, prompts: list[str], image_paths: list[Image.Image]) -> Tensor:
        means = [width_and_length(*pair) for pair in zip(image_paths, prompts, strict=True)]
        return torch.tensor([[mean, 9.0] for mean in means], requires_grad=True).bfloat16().float()


def test_hpsv3(provide: Any) -> None:
    provide("hpsv3", HPSv3RewardInferencer=Inferencer)
    reward = load_reward("hpsv3")
    scores = reward(pictures(3), PROMPTS)
    torch.testing.assert_close(scores, torch.tensor(EXPECTED).bfloat16().float())
    assert not scores.requires_grad and len(reward.digest) == 64
    with pytest.raises(PipelineError, match=r"not a safetensors file.*HPSv3.pth"):
        load_reward("hpsv3", "HPSv3.pth")
    with pytest.raises(PipelineError, match="hpsv3 cannot load its model: No such file: missing"):
        load_reward("hpsv3", "missing.safetensors")


class ImageReward(nn.Linear):
    """The model of image-reward 1.5."""

    def score(self, *, prompt: str, image: Image.Image) -> float:
        assert isinstance(image, Image.Image)
        return width_and_length(image, prompt)


def test_image_reward(provide: Any) -> None:
    def load(
        *, name: str = "ImageReward-v1.0", device: Any = "cpu", download_root: Any = None,
        med_config: Any = None,
    ) -> ImageReward:  # fmt: skip
        if name != "ImageReward-v1.0":
            raise RuntimeError(f"Model {name} not found; available models = [...]")
        return ImageReward(2, 2)

    provide("ImageReward", load=load)
    reward = load_reward("image_reward")
    torch.testing.assert_close(reward(pictures(3), PROMPTS), torch.tensor(EXPECTED))
    clip = videos(1, 4)[0]
    mean = sum(width_and_length(frame, "a") for frame in clip) / 4
    torch.testing.assert_close(reward([clip], ["a"]), torch.tensor([mean]))
    with pytest.raises(PipelineError, match="image-reward cannot load its model: Model v9 not"):
        load_reward("image_reward", "v9")


@pytest.fixture
def mantis(provide: Any) -> None:
    name = "Idefics2ForSequenceClassification"
    provide("mantis.models.idefics2", **{name: making.Idefics2ForSequenceClassification})


@torch.no_grad()
def test_video_score(mantis: None, tmp_path: Path) -> None:
    folder, clip = save_video_score(tmp_path), videos(1, 31)[0]
    processor = AutoProcessor.from_pretrained(folder)
    model = making.Idefics2ForSequenceClassification.from_pretrained(folder).eval()
    frames = clip[::2]  # 16 of 31
    text = f'the prompt is "{PROMPTS[0]}", the frames:\n' + "<image> " * 16
    inputs = processor(text=text, images=frames, return_tensors="pt")
    expected = model(**inputs).logits[0]
    mean: Any = load_reward("video_score", folder)
    torch.testing.assert_close(mean([clip], PROMPTS[:1]), expected.mean()[None])
    assert mean.scorer.model.calls == 1 and expected.std() > 1e-3
    names = ("visual_quality", "temporal_consistency", "dynamic_degree", "text_alignment",
             "factual_consistency")  # fmt: skip
    for column, name in enumerate(names):
        reward: Any = load_reward(f"video_score:{name}", folder)
        torch.testing.assert_close(reward([clip], PROMPTS[:1]), expected[column][None])
        assert reward.scorer is mean.scorer and reward.name == f"video_score:{name}"
    # The dimensions share one call; other prompts and frames make another.
    assert mean.scorer.model.calls == 1
    mean([clip], PROMPTS[1:2])
    mean([clip[1:]], PROMPTS[1:2])
    assert mean.scorer.model.calls == 3
    # Prompts add no images.
    assert torch.equal(mean([clip], ["a <image>dog"]), mean([clip], ["a dog"]))


def test_video_score_refuses(mantis: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no dimension 'quality'.*did you mean visual_quality"):
        load_reward("video_score:quality", tmp_path)
    with pytest.raises(ConfigError, match=r"needs a folder.*query\.txt"):
        load_reward("video_score")
    folder = save_video_score(tmp_path, labels=3)
    with pytest.raises(PipelineError, match=r"scores of shape \(1, 3\), not \(1, 5\)"):
        load_reward("video_score", folder)(videos(1, 2), PROMPTS[:1])
    (folder / "query.txt").write_text("which score?")

    with pytest.raises(PipelineError, match=r"lacks {text_prompt}.*REGRESSION_QUERY_PROMPT"):
        load_reward("video_score", folder)
    (folder / "query.txt").unlink()
    with pytest.raises(PipelineError, match=r"cannot be read.*query\.txt"):
        load_reward("video_score", folder)
