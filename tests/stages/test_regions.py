"""regions=: what is drawn, what is refused, and that hooks are removed."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import FirstBlockCacheConfig, StableDiffusionImg2ImgPipeline
from PIL import Image

from customize.errors import ConfigError, CustomizeError, PipelineError
from customize.families import family_of
from customize.stages import multidiffusion
from tests.pipeline.making import assert_same, attached, everything, modular
from tests.tiny import drawn, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

PROMPT = "a photo of <rex> and a red car on the beach"
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
REGIONS = {"<rex>": LEFT, "red car": RIGHT}
#: Hard edges, at which latents of 16 x 16 can be compared bit for bit.
LEFT_MASK = torch.tensor([1.0, 0.0]).expand(2, 2)
MASKS = {"<rex>": LEFT_MASK, "red car": 1 - LEFT_MASK}


def draw(pipe, prompt=PROMPT, seeds=(1,), **call):
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
    return drawn(pipe, prompt, generator=noise, **size | call)


def alike(result, expected):
    """But for rounding: encoding several prompts at a time adds up in another order."""
    return torch.allclose(result, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_signature_of_calls_has_regions():
    parameters = inspect.signature(attached().__call__).parameters
    assert parameters["regions"].default is None


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("layers", [False, True], ids=["plain", "layerwise"])
def test_words_of_a_region_do_not_affect_another_within_a_step(guidance, layers):
    pipe = attached(layers=layers)
    call = {"num_inference_steps": 1, "guidance_scale": guidance}
    red = draw(pipe, regions=MASKS, **call)
    blue = {"<rex>": LEFT_MASK, "blue hat": 1 - LEFT_MASK}
    other = draw(pipe, PROMPT.replace("red car", "blue hat"), regions=blue, **call)
    plain = draw(pipe, **call)
    assert torch.equal(red[..., :8], other[..., :8])
    assert not torch.allclose(red[..., 8:], other[..., 8:], atol=1e-3)
    assert not torch.allclose(red[..., :8], plain[..., :8], atol=1e-3)
    assert torch.equal(plain, draw(pipe, **call))


def test_words_without_region_affect_the_whole_image_and_others_not_the_background(monkeypatch):
    monkeypatch.setattr(
        multidiffusion, "BOOTSTRAP_NOISE_LEVEL", 1.0
    )  # so that a region's answer is that of its prompt
    pipe = attached()
    call = {"num_inference_steps": 1}
    only = {"<rex>": LEFT_MASK}
    with_rex = draw(pipe, "a photo of <rex> on the beach", regions=only, **call)
    without = draw(pipe, "a photo of on the beach", **call)
    assert alike(with_rex[..., 8:], without[..., 8:])
    whole = draw(pipe, "a photo of <rex> on the beach", **call)
    assert alike(with_rex[..., :8], whole[..., :8])
    moved = draw(pipe, "a photo of <rex> in the forest", regions=only, **call)
    assert not torch.allclose(moved[..., :8], with_rex[..., :8], atol=1e-3)
    assert not torch.allclose(moved[..., 8:], with_rex[..., 8:], atol=1e-3)


def test_bootstrapping_hides_other_regions_at_high_noise_levels():
    pipe = attached()
    seen = []

    def note(module, args, kwargs, output):
        seen.append(output[0])

    def first_two(left):
        """Return the first two predictions for latents that differ in their left half."""
        seen.clear()
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
        noise[..., :8] *= left
        draw(pipe, latents=noise, regions=MASKS, guidance_scale=1.0)
        return list(seen)

    handle = pipe.unet.register_forward_hook(note, with_kwargs=True)
    # The noise in place of the left half has the latents' mean and deviation.
    first, second = first_two(1.0), first_two(-1.0)
    handle.remove()
    assert len(first) == len(second) == 2
    near = [
        (a - b)[..., 8:].abs().max() / a.abs().max() for a, b in zip(first, second, strict=True)
    ]
    assert float(near[0]) < 0.1 * float(near[1])


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_at_high_noise_levels_a_region_is_a_picture_of_its_own(make):
    pipe = attached(make)
    forward, calls = pipe.unet.forward, []

    def note(sample, *args, **kwargs):
        output = forward(sample, *args, **kwargs)
        calls.append((sample, kwargs["encoder_hidden_states"], output[0]))
        return output

    pipe.unet.forward = note
    predictions = []
    handle = pipe.unet.register_forward_hook(lambda m, a, output: predictions.append(output[0]))
    left, corner = (0, 0, 0.5, 1), (0.5, 0.5, 0.9, 1)
    draw(pipe, num_inference_steps=1, regions={"<rex>": left, "red car": corner})
    handle.remove()
    shapes = [tuple(sample.shape) for sample, _, _ in calls]
    # The whole picture with the background; the soft edges belong to the windows.
    assert shapes == [(2, 4, 16, 16), (1, 4, 16, 10), (1, 4, 10, 10)]
    (whole, _, background), (window, _, _), (_, _, car) = calls
    assert torch.equal(window[0, ..., :7], whole[1, ..., :7])
    assert not torch.equal(window[0, ..., 9:], whole[1, ..., 9:10])  # noise
    (blended,) = predictions
    assert torch.equal(blended[0], background[0])
    assert torch.equal(blended[1, :, :6, 10:], background[1, :, :6, 10:])
    assert torch.allclose(blended[1, :, 12:, 10:12], car[0, :, 6:, 4:6], atol=1e-5)
    calls.clear()
    draw(pipe, num_inference_steps=25, regions=MASKS)
    sizes = [sample.shape[-1] for sample, _, _ in calls]
    bootstrapped = sizes[: sizes.index(8) + 3 * 12]
    assert sizes[:3] == [16, 8, 8] and sizes[-2:] == [16, 16]
    assert set(bootstrapped) == {8, 16}


def test_what_has_the_positions_of_the_whole_picture_allows_no_windows():
    family = family_of(tiny_sd().components)
    latents = torch.randn(2, 4, 16, 16)
    window = slice(0, 16), slice(8, 16)
    part = family.window_arguments({"sample": latents, "timestep": 3}, *window)
    assert part["timestep"] == 3 and torch.equal(part["sample"], latents[..., 8:])
    for name in (
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
    ):
        assert family.window_arguments({"sample": latents, name: [latents]}, *window) is None
    masks = {"sample": latents, "cross_attention_kwargs": {"ip_adapter_masks": [latents]}}
    assert family.window_arguments(masks, *window) is None
    assert family_of(tiny_flux().components).window_arguments({}, *window) is None


def test_a_region_of_the_whole_image_equals_the_plain_call():
    pipe = attached()
    prompt = "a photo of <rex> on the beach"
    image = draw(pipe, prompt, regions={"<rex>": (0, 0, 1, 1)})
    assert alike(image, draw(pipe, prompt))


def test_keys_may_be_concept_names_and_later_regions_cover_earlier_ones():
    pipe = attached()
    assert torch.equal(
        draw(pipe, regions=REGIONS), draw(pipe, regions={"rex": LEFT, "Red  car": RIGHT})
    )
    whole = (0.0, 0.0, 1.0, 1.0)
    hard = draw(pipe, regions={"<rex>": torch.ones(4, 4), "red car": 1 - LEFT_MASK})
    assert torch.equal(hard, draw(pipe, regions=MASKS))
    with pytest.raises(ConfigError, match="'<rex>' is covered by others"):
        draw(pipe, regions={"<rex>": LEFT, "red car": whole})


def test_masks_of_all_types_and_sizes_are_equivalent():
    pipe = attached()
    expected = draw(pipe, regions={"<rex>": LEFT_MASK})
    array = np.zeros((30, 40), dtype=bool)
    array[:, :20] = True
    image = Image.fromarray(array)
    for mask in (array, image, image.convert("L"), torch.from_numpy(array), array.astype(float)):
        assert torch.equal(draw(pipe, regions={"<rex>": mask}), expected)


def test_batches_equal_single_calls():
    pipe = attached()
    other = "a blue cup and <rex> in the forest"
    regions = [REGIONS, {"blue cup": (0.2, 0.2, 0.6, 0.9)}]
    images = draw(
        pipe, [PROMPT, other], seeds=(1, 2, 3, 4), num_images_per_prompt=2, regions=regions
    )
    alone = [
        draw(pipe, prompt, seeds=(2 * k + n + 1,), regions=regions[k])
        for k, prompt in enumerate((PROMPT, other))
        for n in range(2)
    ]
    assert alike(images, torch.cat(alone))
    both = draw(pipe, [PROMPT, PROMPT], seeds=(1, 2), regions=REGIONS)
    assert alike(both[:1], alone[0])


def test_negative_prompts_equal_to_the_prompt_are_drawn_by_regions():
    pipe = attached()
    other = "a blue cup and <rex> in the forest"
    regions = [REGIONS, {"blue cup": (0.2, 0.2, 0.6, 0.9)}]
    prompts, call = [PROMPT, other], {"seeds": (1, 2), "regions": regions}
    images = draw(pipe, prompts, negative_prompt=prompts, guidance_scale=5.0, **call)
    assert alike(images, draw(pipe, prompts, guidance_scale=1.0, **call))


def test_rows_of_the_empty_prompt_are_predicted_once_and_unchanged(monkeypatch):
    monkeypatch.setattr(multidiffusion, "BOOTSTRAP_NOISE_LEVEL", 1.0)
    pipe = attached()
    words = []

    def note(module, args, kwargs):
        words.append(kwargs["encoder_hidden_states"])

    handle = pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    draw(pipe, num_inference_steps=1)
    (plain,) = words
    words.clear()
    forward, inputs = pipe.unet.forward, []
    pipe.unet.forward = lambda *args, **kwargs: (
        inputs.append(kwargs["encoder_hidden_states"]) or forward(*args, **kwargs)
    )
    draw(pipe, num_inference_steps=1, regions=REGIONS)
    del pipe.unet.forward
    handle.remove()
    # The halves leave nothing to the background: one call with both, and one for the other region.
    assert [len(batch) for batch in inputs] == [2, 1]
    assert torch.equal(inputs[0][0], plain[0])
    assert not torch.allclose(inputs[0][1], plain[1], atol=1e-3)
    assert not torch.allclose(inputs[1][0], inputs[0][1], atol=1e-3)


@pytest.mark.parametrize("layers", [False, True], ids=["plain", "layerwise"])
def test_hooks_are_removed_after_a_call_and_an_error_during_it(layers):
    pipe = attached(layers=layers)
    before, plain = everything(pipe), draw(pipe)
    hooks = [len(pipe.unet._forward_hooks), len(pipe.unet._forward_pre_hooks)]
    draw(pipe, regions=REGIONS)

    def fail(*args):
        raise RuntimeError("stop")

    for call in ({"callback_on_step_end": fail}, {"height": 33}):
        with pytest.raises((RuntimeError, ValueError)):
            draw(pipe, regions=REGIONS, **call)
    assert [len(pipe.unet._forward_hooks), len(pipe.unet._forward_pre_hooks)] == hooks
    assert_same(before, everything(pipe))
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_sd3, tiny_flux])
def test_modular_pipelines_draw_by_regions(make):
    pipe = attached(make)
    standard = draw(pipe, regions=REGIONS, output_type="np")
    other = modular(pipe).load_custom()
    image = draw(other, regions=REGIONS, output_type="np")
    assert not np.allclose(image, draw(other, output_type="np"), atol=1e-3)
    if make is tiny_flux:  # the others are guided in another way than the standard pipelines
        assert np.allclose(image, standard, atol=1e-4)
        return
    red = draw(other, regions=MASKS, num_inference_steps=1)
    blue = {"<rex>": LEFT_MASK, "blue hat": 1 - LEFT_MASK}
    prompt = PROMPT.replace("red car", "blue hat")
    moved = draw(other, prompt, regions=blue, num_inference_steps=1)
    assert torch.equal(red[..., :8], moved[..., :8])
    assert not torch.equal(red[..., 8:], moved[..., 8:])


def test_other_pipelines_of_the_same_models():
    pipe = attached()
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe).load_custom()
    call = {
        "image": Image.new("RGB", (32, 32), "red"),
        "strength": 1.0,
        "num_inference_steps": 2,
        "output_type": "np",
    }

    def again(**more):
        return other(PROMPT, generator=torch.Generator().manual_seed(1), **call, **more).images

    assert not np.allclose(again(), again(regions=REGIONS), atol=1e-3)


def test_a_compiled_denoiser_draws_by_regions_or_is_refused():
    pipe = attached(lambda: tiny_sd(few_layers=True))
    expected = draw(pipe, regions=REGIONS)
    assert not alike(expected, draw(pipe))
    unet = pipe.unet
    pipe.unet = torch.compile(unet, backend="eager")
    assert alike(draw(pipe, regions=REGIONS), expected)
    assert alike(draw(pipe, regions=REGIONS), expected)  # already compiled
    pipe.unet = unet
    unet.compile(backend="eager")
    with pytest.raises(PipelineError, match=r"compiled in place.*torch\.compile"):
        draw(pipe, regions=REGIONS)


def test_offloaded_models_give_the_same_image():
    pipe = attached()
    expected = draw(pipe, regions=REGIONS)
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        cpu_offload_with_hook(part, torch.device("cpu"))
    assert torch.equal(draw(pipe, regions=REGIONS), expected)
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        remove_hook_from_module(part)
    cpu_offload(pipe.text_encoder, torch.device("cpu"))
    with pytest.raises(PipelineError, match="sequential offload"):
        draw(pipe, regions=REGIONS)


def test_denoisers_with_an_enabled_cache_are_refused():
    pipe = attached(tiny_flux)
    plain, regional = draw(pipe), draw(pipe, regions=REGIONS)
    assert not torch.allclose(regional, plain, atol=1e-3)
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    hooks = len(pipe.transformer._forward_pre_hooks), len(pipe.transformer._forward_hooks)
    with pytest.raises(PipelineError, match=r"caches outputs.*disable_cache"):
        draw(pipe, regions=REGIONS)
    assert hooks == (len(pipe.transformer._forward_pre_hooks), len(pipe.transformer._forward_hooks))
    pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe, regions=REGIONS), regional)
    assert torch.equal(draw(pipe), plain)


def test_arguments_that_a_denoiser_pops_are_passed_to_every_region():
    pipe = attached(tiny_flux)
    forward, popped = pipe.transformer.forward, []

    def taking(*args, joint_attention_kwargs, **kwargs):
        popped.append(joint_attention_kwargs.pop("mine"))
        return forward(*args, joint_attention_kwargs=joint_attention_kwargs, **kwargs)

    pipe.transformer.forward = taking
    call = {"joint_attention_kwargs": {"mine": 1}, "num_inference_steps": 1}
    draw(pipe, regions=REGIONS, **call)
    assert popped == [1, 1]


def test_prompts_that_the_pipeline_encodes_differently_are_refused():
    pipe = attached(tiny_flux)
    encode = pipe.encode_prompt

    def encode_otherwise(*args, **kwargs):
        embeds, *rest = encode(*args, **kwargs)
        return 2 * embeds, *rest

    pipe.encode_prompt = encode_otherwise
    with pytest.raises(PipelineError, match="never called with the encoded prompt"):
        draw(pipe, regions=REGIONS)
    del pipe.encode_prompt
    assert not pipe.transformer._forward_hooks
    for name, value in (
        ("prompt_2", "a cat"),
        ("prompt_embeds", torch.zeros(1, 512, 48)),
    ):
        with pytest.raises(ConfigError, match=f"{name} cannot be combined with regions"):
            draw(pipe, regions=REGIONS, **{name: value})


NAN = torch.full((4, 4), torch.nan)
WRONG = {
    "pixels": ({"<rex>": (0, 0, 256, 512)}, "exceeds the image.*not pixels"),
    "outside": ({"<rex>": (-0.1, 0, 0.5, 1)}, "exceeds the image"),
    "empty": ({"<rex>": (0.5, 0, 0.5, 1)}, "is empty.*left, top, right, bottom"),
    "reversed": ({"<rex>": (0.5, 0, 0.2, 1)}, "is empty"),
    "three": ({"<rex>": (0, 0, 1)}, "invalid box.*four numbers"),
    "text": ({"<rex>": (0, 0, "1", 1)}, "invalid box"),
    "nan box": ({"<rex>": (0, 0, float("nan"), 1)}, "invalid box"),
    "nan mask": ({"<rex>": NAN}, "not finite"),
    "no mask": ({"<rex>": torch.zeros(4, 4)}, "mask is empty"),
    "colours": ({"<rex>": torch.ones(3, 4, 4)}, "shape.*height, width"),
    "bytes": ({"<rex>": np.full((4, 4), 255, np.uint8)}, "values from 255 to 255"),
    "below": ({"<rex>": -torch.ones(4, 4)}, "values from -1"),
    "kind": ({"<rex>": "left"}, "cannot be a str"),
    "number": ({7: LEFT}, "not a int"),
    "near": ({"<rax>": LEFT}, r"'<rax>' is not in the prompt.*similar are <rex>"),
    "phrase": ({"red cat": LEFT}, r"'red cat' is not in the prompt.*red car"),
    "twice": ({"<rex>": LEFT, "rex": RIGHT}, "given two regions"),
    "shared": ({"red car": LEFT, "car": RIGHT}, "share words"),
    "covered": ({"<rex>": (0.2, 0.2, 0.4, 0.4), "car": (0, 0, 1, 1)}, "is covered by others"),
    "none": ({}, "regions= is empty"),
    "list": ([REGIONS, REGIONS], "2 dicts of regions for 1 prompt"),
    "a box": (LEFT, "regions must be a dict, not a tuple"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_regions_are_refused_before_any_model_runs(name):
    pipe = attached()
    regions, message = WRONG[name]
    called = []
    handles = [
        part.register_forward_pre_hook(lambda *_: called.append(1))
        for part in (pipe.unet, pipe.text_encoder)
    ]
    with pytest.raises(ConfigError, match=message):
        draw(pipe, regions=regions)
    assert not called
    for handle in handles:
        handle.remove()


def test_regions_need_the_prompt_as_text():
    pipe = attached()
    with pytest.raises(CustomizeError, match="needs the prompt as text"):
        draw(pipe, None, regions=REGIONS)
