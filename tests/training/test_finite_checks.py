"""Errors of values that are not finite name their cause."""

import pytest
import torch

from customize.errors import PipelineError, TrainingError
from customize.training.recipe import train
from tests.tiny import tiny_sd, tiny_sd3
from tests.training.runs import settings


def broken(component, weight, make=tiny_sd):
    """Return a pipeline with NaN in one weight."""
    pipe = make()
    with torch.no_grad():
        getattr(pipe, component).get_parameter(weight).view(-1)[0] = float("nan")
    return pipe


def run(pipe, folder, **changes):
    return train(settings(folder, **changes), pipe.components, progress=False)


@pytest.mark.parametrize("changes", [{}, {"cache_latents": False}, {"flip": True}])
def test_the_image_and_the_autoencoders_weight_are_named(changes, tmp_path):
    pipe = broken("vae", "encoder.conv_in.weight")
    with pytest.raises(PipelineError, match=r"for 0\.png.*vae\.encoder\.conv_in\.weight"):
        run(pipe, tmp_path, **changes)


@pytest.mark.parametrize("cached", [True, False])
def test_the_image_at_fault_is_named_among_several(cached, tmp_path, monkeypatch):
    pipe = tiny_sd()
    encode = pipe.vae.encode

    def overflowing(pixels, *args, **kwargs):
        # As in float16 at large activations: for the image with a bright corner.
        bright = pixels[:, 2].mean((1, 2), keepdim=True) > 0.1
        return encode(torch.where(bright[:, None], float("inf"), pixels), *args, **kwargs)

    monkeypatch.setattr(pipe.vae, "encode", overflowing)
    with pytest.raises(PipelineError, match=r"not finite for 2\.png, in float32"):
        run(pipe, tmp_path, cache_latents=cached, steps=4)


@pytest.mark.parametrize("live", [True, False])
def test_the_caption_and_the_text_encoder_are_named(live, tmp_path):
    pipe = broken("text_encoder", "encoder.layers.0.mlp.fc1.weight")
    changes = {} if live else {"train_tokens": False, "train_text_encoder": False}
    with pytest.raises(PipelineError, match=r"prompt 'a photo of <rex>'.*text_encoder\.encoder"):
        run(pipe, tmp_path, **changes)


def test_a_frozen_text_encoder_is_named(tmp_path):
    pipe = broken("text_encoder_3", "encoder.block.0.layer.0.SelfAttention.q.weight", tiny_sd3)
    with pytest.raises(PipelineError, match=r"text_encoder_3\.encoder"):
        run(pipe, tmp_path)


def test_an_infinite_first_loss_is_attributed_to_the_base(tmp_path):
    pipe = broken("unet", "conv_in.weight")
    with pytest.raises(TrainingError, match=r"step 1, before.*unet\.conv_in\.weight") as caught:
        run(pipe, tmp_path)
    assert "learning rate" not in str(caught.value)


def test_a_base_that_cannot_draw_is_reported_before_slices_are_chosen(tmp_path, monkeypatch):
    pipe = broken("unet", "conv_in.weight")
    with pytest.raises(PipelineError, match=r"generic prompts.*unet\.conv_in\.weight"):
        run(pipe, tmp_path, num_shared_directions=2)
    assert not list(tmp_path.glob(".shared_directions*"))


def test_class_images_that_are_not_finite_are_refused(tmp_path):
    pipe = broken("vae", "decoder.conv_in.weight")
    with pytest.raises(PipelineError, match=r"vae gives.*vae\.decoder\.conv_in\.weight"):
        run(pipe, tmp_path, prior_weight=1.0, prior_count=2, validation_steps=2)
    assert not list(tmp_path.rglob("class-*.png"))


def test_validation_images_that_are_not_finite_are_warned_of(tmp_path):
    pipe = broken("vae", "decoder.conv_in.weight")
    changes = {"validation_prompts": ("a <rex>",), "validation_steps": 2, "steps": 2}
    with pytest.warns(UserWarning, match=r"no validation images at step 2: the vae gives"):
        run(pipe, tmp_path, **changes)
    assert not list(tmp_path.rglob("step-*.png"))


def test_later_infinite_losses_are_attributed_to_the_learning_rates(tmp_path):
    changes = {"learning_rate": 1.0, "alpha": 1e20, "method": "lora", "steps": 4, "log_every": 1}
    with pytest.raises(TrainingError, match=r"at step 2.* lower the learning rates"):
        run(tiny_sd(), tmp_path, **changes)
