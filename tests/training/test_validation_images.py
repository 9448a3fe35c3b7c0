import warnings

import numpy as np
import pytest
import torch

from customize.families import family_of
from customize.training.data.batches import stream_seed
from customize.training.recipe import train
from customize.training.validation_images import (
    draw_images,
    log_images,
    save_image_row,
    warn_about_triggers,
)
from tests.tiny import (
    drawn,
    tiny_sd,
)
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_llm import tiny_flux2_klein, tiny_krea2, tiny_qwen_image_21
from tests.tiny_video import isolate, tiny_cogvideox, tiny_ltx2
from tests.training.runs import picture, settings

MAKERS = TINY_FAMILIES | {
    "sd-v": lambda: tiny_sd("v_prediction"),
    "flux2-distilled": lambda: tiny_flux2_klein(distilled=True),
    "qwen_image_21-levels": lambda: tiny_qwen_image_21([1.0, 0.9, 0.6, 0.2]),
    "krea2-distilled": lambda: tiny_krea2(distilled=True),
    "cogvideox-5b": lambda: tiny_cogvideox(rotary=True, multistep=True),
    "ltx2": tiny_ltx2,
}
SHAPES = {"flux2": (16, 8, 8), "qwen_image_21": (4, 2, 2)}


def arguments(family, conditions):
    """Return conditions of one prompt as arguments of the pipeline."""
    if family.name == "z_image" and conditions:  # its pipeline takes a list
        return {"prompt_embeds": list(conditions["prompt_embeds"])}
    return {key: value for key, value in conditions.items() if key != "prompt_lengths"}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_equal_the_pipelines(make, guidance):
    pipe = make()
    family = family_of(pipe.components, pipe.config)
    shape = SHAPES.get(family.name, (4, 16, 16))
    with torch.no_grad():
        conditions, empty = family.encode_prompts(["a dog"]), family.encode_prompts([""])
    if (
        family.name == "ltx2"
    ):  # otherwise the pipeline draws the noise of images after that of sound
        isolate(pipe)
    # A scheduler with random noise draws it for all images together.
    multistep = type(pipe.scheduler).__name__ == "CogVideoXDPMScheduler"
    seeds = [3] if multistep else [3, 4]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    images = draw_images(
        family,
        {k: v.expand(len(seeds), *v.shape[1:]) for k, v in conditions.items()},
        empty,
        shape,
        steps=4,
        guidance=guidance,
        seeds=seeds,
    )
    assert torch.equal(torch.get_rng_state(), state)
    for seed, image in zip(seeds, images, strict=True):
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
        # Models with guidance as an input need no negative prompt.
        negative_conditions = {} if family.has_guidance_input else empty
        negative_arguments = {
            f"negative_{k}": v for k, v in arguments(family, negative_conditions).items()
        }
        inputs = arguments(family, conditions) | negative_arguments
        if family.name == "ltx2":  # its pipeline applies the connectors itself
            inputs = {"prompt": "a dog"}
        scale = "true_cfg_scale" if family.name.startswith("qwen_image") else "guidance_scale"
        expected = drawn(
            pipe,
            **inputs,
            latents=noise if family.name == "flux2" else family.pack(noise),
            generator=torch.Generator().manual_seed(stream_seed("sampler", *seeds)),
            num_inference_steps=4,
            **{scale: guidance},
            height=32,
            width=32,
            output_type="pil",
        )[0]
        expected = expected.convert("RGB")  # one family also generates transparency
        difference = np.asarray(expected).astype(int) - np.asarray(image).astype(int)
        assert abs(difference).max() <= 1


def test_images_are_saved_and_logged(tmp_path):
    logged = []

    class Tracker:
        def __init__(self, name):
            self.name = name

        def log_images(self, values, step, **options):
            logged.append((self.name, values, step, options))

    pictures = [picture(0), picture(1)]
    save_image_row(pictures, tmp_path / "a" / "row.png")
    assert (tmp_path / "a" / "row.png").is_file()
    trackers = [Tracker("tensorboard"), Tracker("wandb"), object()]
    log_images(trackers, pictures[:1], ["a dog"], 7)
    (_, board, step, options), (_, other, _, _) = logged
    assert board["a dog"].shape == (1, 32, 32, 3) and options == {"dataformats": "NHWC"}
    assert other == {"a dog": pictures[:1]} and step == 7


def test_samples_do_not_replace_validation_prompts(tmp_path):
    config = settings(tmp_path, steps=1, samples=True, validation_prompts=["a dog"])
    config = config.model_copy(update={"validation_steps": 1})
    with pytest.warns(UserWarning, match="no validation prompt has the trigger <rex>"):
        train(config, tiny_sd().components, progress=False)


def test_missing_and_unknown_triggers_are_warned_of():
    pipe = tiny_sd()
    pipe.load_textual_inversion({"<mine>": torch.ones(1, 32)})
    family = family_of(pipe.components)

    def collect_warnings(prompts, triggers=("<rex>",)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_about_triggers(family, prompts, triggers)
        return [str(warning.message) for warning in caught]

    assert (
        collect_warnings([])
        == []
        == collect_warnings(["a <REX>", "a dog"])
        == collect_warnings(["<rex> and <mine>"])
    )
    assert "no validation prompt has the trigger <rex>" in collect_warnings(["a dog"])[0]
    (missing, misspelt) = collect_warnings(["a <rexx>"])
    assert "has the trigger <rex>" in missing and "did you mean <rex>?" in misspelt
    assert len(collect_warnings(["<rex>"], ("<rex>", "<tom>"))) == 1
