"""Training the base model from scratch: complete, interrupted, and its files."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from scripts.storybook_training import pretrain_base
from scripts.storybook_training.worlds import STORYBOOK

TINY = pretrain_base.PRESETS["tiny"]


# Each checkpoint draws the sample prompts; one will do here.
WORLD = replace(STORYBOOK, sample_prompts=STORYBOOK.sample_prompts[:1])


def make(folder: Path, steps: int) -> StableDiffusionPipeline:
    folder.mkdir(exist_ok=True)
    preset = replace(TINY, steps=steps)
    vae = pretrain_base.train_vae(WORLD, folder, preset, "cpu")
    return pretrain_base.train_denoiser(WORLD, folder, preset, vae, "cpu")


def weights(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value.clone()
        for part in ("unet", "text_encoder", "vae")
        for name, value in getattr(pipe, part).state_dict().items()
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("pretrain")


@pytest.fixture(scope="module")
def whole(folders):
    return make(folders / "whole", 4)


def test_a_resumed_run_equals_an_uninterrupted_one(folders, whole):
    make(folders / "parts", 2)
    again = make(folders / "parts", 4)
    expected, actual = weights(whole), weights(again)
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
    for name in ("denoiser.safetensors", "vae.safetensors"):
        first, second = (load_file(folders / run / name) for run in ("whole", "parts"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_finished_run_trains_nothing(folders, whole):
    before = (folders / "whole/denoiser.safetensors").read_bytes()
    again = make(folders / "whole", 4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(whole).values(), weights(again).values(), strict=True)
    )
    assert (folders / "whole/denoiser.safetensors").read_bytes() == before


def test_the_result_opens_in_plain_diffusers_and_draws(folders, whole):
    pipe = DiffusionPipeline.from_pretrained(folders / "whole/base")
    assert type(pipe) is StableDiffusionPipeline
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    live, read = weights(whole), weights(pipe)
    assert live.keys() == read.keys()
    for name, value in live.items():
        assert torch.equal(value.half().to(value.dtype), read[name]), name
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a photo of a red dog on a beach",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 1


def test_the_files_are_half_precision_and_readable_by_others(folders, whole):
    mask = os.umask(0)
    os.umask(mask)
    files = [path for path in (folders / "whole").rglob("*") if path.is_file()]
    tensors = [path for path in files if path.suffix == ".safetensors"]
    assert len(tensors) == 6  # vae and denoiser states, latents, and the three models
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~mask)}
    assert not [path for path in files if path.suffix == ".partial"]
    for path in (folders / "whole/base").rglob("*.safetensors"):
        assert not {v.dtype for v in load_file(path).values()} & {torch.float32, torch.float64}


def test_losses_and_samples_are_written(folders, whole):
    rows = [json.loads(line) for line in (folders / "whole/log.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if row["stage"] == "vae"]
    assert held_out[0]["held_out_psnr"] > 0
    assert (folders / "whole/vae.png").is_file()
    assert (folders / "whole/samples-000004.png").is_file()


def test_a_run_on_wide_scenes_resumes_and_reads_latents_of_each_width(folders, whole, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folders / "whole/base", subfolder="vae")
    preset = replace(TINY, wide=0.5, two=1.0)

    def train(folder, steps):
        folder.mkdir(exist_ok=True)
        preset_ = replace(preset, steps=steps)
        return pretrain_base.train_denoiser(
            WORLD, folder, preset_, vae, "cpu", start=folders / "whole/base"
        )

    expected = weights(train(tmp_path / "whole", 4))
    train(tmp_path / "parts", 2)
    actual = weights(train(tmp_path / "parts", 4))
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
    latents = [load_file(path)["latents"] for path in (tmp_path / "whole").glob("latents-*")]
    shapes = sorted(tuple(each.shape) for each in latents)
    assert shapes == [(24, 4, 16, 24), (24, 4, 16, 32), (96, 4, 16, 16)]


# The loop on its own


def run_loop(
    folder: Path, steps: int, fail_at: int | None = None, nan_at: int | None = None
) -> list:
    """Fit a small matrix; gives its final weights."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    count = 0

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == fail_at:
            raise KeyboardInterrupt
        loss = model(torch.randn(3, 4, generator=generator)).square().mean()
        return loss * float("nan") if count == nan_at else loss

    folder.mkdir(exist_ok=True)
    pretrain_base.train_loop(
        "net", folder, {"m": model}, loss_of, steps, 1e-2, 0, lambda step: None, every=2
    )
    return [p.detach().clone() for p in model.parameters()]


def test_a_run_resumes_from_its_last_checkpoint(tmp_path):
    expected = run_loop(tmp_path / "whole", 7)
    with pytest.raises(KeyboardInterrupt):
        run_loop(tmp_path / "cut", 7, fail_at=6)
    assert int(load_file(tmp_path / "cut/net.safetensors")["step"]) == 4
    actual = run_loop(tmp_path / "cut", 7)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_a_diverged_run_keeps_its_last_finite_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="loss is nan at step 4"):
        run_loop(tmp_path, 7, nan_at=5)
    state = load_file(tmp_path / "net.safetensors")
    assert int(state["step"]) == 4
    assert all(torch.isfinite(value.float()).all() for value in state.values())
