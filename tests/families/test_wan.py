"""Wan: cleaned prompts, video autoencoders, many frames, two transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from customize.api.pipeline_methods import load_custom, unload_custom
from customize.concepts.io.read_concept import load_concept
from customize.core.objectives import FLOW_DENSITIES
from customize.errors import ConceptError, PipelineError
from customize.families import family_of
from customize.families.wan import MAX_SEQUENCE_LENGTH, Wan
from customize.training.recipe import train
from tests.pipeline.making import concept
from tests.tiny_video import tiny_wan
from tests.training.runs import assert_unchanged, settings, snapshot


def test_prompts_are_cleaned_and_truncated_as_by_the_pipeline() -> None:
    pipe = tiny_wan()
    prompts = ["  a   red &amp;amp;\ncup ", "dog " * 700]
    encoded = family_of(pipe.components).encode_prompts(prompts)["prompt_embeds"]
    expected, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
    )
    assert encoded.shape[1] == MAX_SEQUENCE_LENGTH
    assert torch.equal(encoded, expected)
    assert encoded[1].abs().sum(-1).all() and not encoded[0, 100:].any()


def residual_vae() -> AutoencoderKLWan:
    """Create an autoencoder like that of Wan 2.2 5B, which packs pixels 2 x 2."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.5, 0.6, 0.7, 0.8],
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=4,
        )
    return vae.eval()


@torch.no_grad()
@pytest.mark.parametrize(("residual", "factor"), [(False, 2), (True, 4)])
def test_latents_are_normalised_by_channel(residual: bool, factor: int) -> None:
    vae = residual_vae() if residual else tiny_wan().vae
    family = family_of({**tiny_wan().components, "vae": vae})
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_images(pixels)
    posterior = vae.encode(pixels[:, :, None]).latent_dist

    def by_channel(values: list[float]) -> Tensor:
        return torch.tensor(values)[:, None, None]

    centre, spread = by_channel(vae.config.latents_mean), by_channel(vae.config.latents_std)
    assert mean.shape == std.shape == (2, 4, 32 // factor, 32 // factor)
    torch.testing.assert_close(mean, (posterior.mean[:, :, 0] - centre) / spread)
    torch.testing.assert_close(std, posterior.std[:, :, 0] / spread)
    expected = vae.decode(posterior.mean).sample[:, :, 0]
    torch.testing.assert_close(family.decode_latents(mean), expected)


def video(pipe: Any) -> np.ndarray:
    noise = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    return pipe("a photo of <rex>", num_frames=5, generator=noise, **call).frames[0]


def test_a_concept_changes_every_frame_of_a_video() -> None:
    pipe = tiny_wan()
    bare = video(pipe)
    load_custom(pipe, concept(pipe))
    attached = video(pipe)
    assert attached.shape == (5, 32, 32, 3)
    assert (np.abs(attached - bare).max(axis=(1, 2, 3)) > 1e-3).all()
    unload_custom(pipe)
    assert np.array_equal(video(pipe), bare)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.875, 0.5])
def test_samples_go_to_the_transformer_of_their_noise_level(ratio: float) -> None:
    pipe = tiny_wan("2.2-14b", boundary_ratio=ratio)
    family = family_of(pipe.components, pipe.config)
    noisy = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = 1000 * torch.tensor([ratio, ratio - 0.001, 0.999])
    conditions = family.encode_prompts(["a dog", "a cat", "a cup"])
    both = family.predict(noisy, t, conditions)
    for row, key in enumerate(("transformer", "transformer_2", "transformer")):
        alone = {"transformer": family.components[key]}
        rows = {name: value[row : row + 1] for name, value in conditions.items()}
        expected = Wan(alone | {"scheduler": family.scheduler}).predict(
            noisy[row : row + 1], t[row : row + 1], rows
        )
        torch.testing.assert_close(both[row : row + 1], expected)


# Shifted by 3, the level of 0.3 is 0.56.
@pytest.mark.parametrize(
    ("u", "ratio", "learns"),
    [
        (0.05, 0.875, "transformer_2"),
        (0.3, 0.875, "transformer_2"),
        (0.3, 0.5, "transformer"),
        (0.95, 0.875, "transformer"),
    ],
)
def test_transformers_train_on_separate_noise_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, u: float, ratio: float, learns: str
) -> None:
    monkeypatch.setitem(FLOW_DENSITIES, "uniform", lambda count, generator: torch.full((count,), u))
    pipe = tiny_wan("2.2-14b", boundary_ratio=ratio)
    config = settings(tmp_path, steps=2, density="uniform", checkpoint_every=1, keep_checkpoints=2)
    before = snapshot(pipe.components)
    learned = train(config, pipe.components, progress=False, pipeline_config=pipe.config)
    assert_unchanged(before, pipe.components)
    assert list(learned.updates) == ["transformer", "transformer_2"]
    for component, updates in learned.updates.items():
        moved = [bool(update.up.any()) for update in updates.values()]
        assert all(moved) if component == learns else not any(moved), component
    assert load_concept(config.output).info.fingerprint["widths"].keys() == learned.updates.keys()


def test_two_transformers_without_boundary_ratio_support_concepts_but_not_training(
    tmp_path: Path,
) -> None:
    pipe = tiny_wan("2.2-14b", boundary_ratio=None)
    config = settings(tmp_path, steps=1)
    before = snapshot(pipe.components)
    for arguments in ({}, {"pipeline_config": pipe.config}):
        with pytest.raises(PipelineError, match=r"boundary_ratio.*Fix: give pipe\.config"):
            train(config, pipe.components, progress=False, **arguments)
    assert_unchanged(before, pipe.components)
    assert not (config.output / "concept.json").exists()

    bare = video(pipe)
    load_custom(pipe, concept(pipe))
    assert np.abs(video(pipe) - bare).max() > 1e-3
    unload_custom(pipe)
    assert np.array_equal(video(pipe), bare)


def test_a_concept_of_one_transformer_is_refused_by_two() -> None:
    one, two = tiny_wan(), tiny_wan("2.2-14b")
    for source, pipe in ((one, two), (two, one)):
        with pytest.raises(ConceptError, match="architecture or size"):
            load_custom(pipe, concept(source))
