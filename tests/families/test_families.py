"""What every family must do, held against the model's own pipeline and scheduler."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ModularPipeline
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from customize.core.objectives import weighted_mse
from customize.errors import ConfigError, PipelineError
from customize.families import FAMILIES, Family, family_of
from customize.families.tokenization import pad_sequences
from tests.tiny import (
    drawn,
    tiny_flux,
    tiny_flux3,
    tiny_qwen_image,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
    tiny_z_image,
)
from tests.tiny_llm import tiny_flux2, tiny_flux2_klein, tiny_krea2, tiny_qwen_image_21
from tests.tiny_video import isolate, tiny_animatediff, tiny_cogvideox, tiny_ltx2, tiny_wan

PIPELINES: dict[str, Callable[[], Any]] = {
    "sd-epsilon": tiny_sd,
    "sd-v": lambda: tiny_sd("v_prediction"),
    "sd-animatediff": tiny_animatediff,
    "sdxl-epsilon": tiny_sdxl,
    "sdxl-v": lambda: tiny_sdxl("v_prediction"),
    "sd3": tiny_sd3,
    "sd3-without-t5": lambda: tiny_sd3(t5=False),
    "flux-dev": tiny_flux,
    "flux-schnell": lambda: tiny_flux(guidance=False),
    "flux3": tiny_flux3,
    "flux2-dev": tiny_flux2,
    "flux2-klein": tiny_flux2_klein,
    "flux2-distilled": lambda: tiny_flux2_klein(distilled=True),
    "qwen_image": tiny_qwen_image,
    "qwen_image_21": tiny_qwen_image_21,
    "qwen_image_21-levels": lambda: tiny_qwen_image_21([1.0, 0.9, 0.6, 0.2]),
    "z_image": tiny_z_image,
    "krea2": tiny_krea2,
    "krea2-distilled": lambda: tiny_krea2(distilled=True),
    "wan-2.1": tiny_wan,
    "wan-2.2-5b": lambda: tiny_wan("2.2-5b"),
    "wan-2.2-14b": lambda: tiny_wan("2.2-14b"),
    "cogvideox-2b": tiny_cogvideox,
    "cogvideox-5b": lambda: tiny_cogvideox(rotary=True),
    "ltx2": tiny_ltx2,
    "ltx2-2.3": lambda: tiny_ltx2(later=True),
}
#: (channels, height, width) of a picture's latents, where they aren't (4, 16, 16).
SHAPES = {"flux2": (16, 8, 8), "qwen_image_21": (4, 2, 2)}
# Families whose denoiser names no size, so that the pipeline's default is far above the tests'.
NO_SIZE = {
    "flux": 256,
    "flux2": 256,
    "flux3": 1024,
    "qwen_image": 256,
    "qwen_image_21": 1024,
    "z_image": 1024,
    "krea2": 1024,
    "wan": 480,
    "ltx2": 512,
}
SIZE = {"height": 32, "width": 32}


@pytest.fixture(params=PIPELINES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return PIPELINES[request.param]()


@pytest.fixture
def family(pipe: Any) -> Family:
    return family_of(pipe.components, pipe.config)


def shape_of(family: Family) -> tuple[int, int, int]:
    return SHAPES.get(family.name, (4, 16, 16))


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixels() -> Tensor:
    return normal((2, 3, 32, 32), 3).clamp(-1, 1)


def record_calls(family: Family, answer: Callable[[Tensor], Tensor] | None = None) -> list:
    """Note (latents, output) of each call of the denoiser, as the family lays them out.

    `answer(latents)` may stand in for the weights.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    size = shape_of(family)[1:]
    if family.name == "ltx2":  # the pipeline's stream of pictures would follow that of sound
        isolate(SimpleNamespace(transformer=family.denoiser))

    def recorded(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        packed = args[0] if args else kwargs["hidden_states"]
        if family.name == "flux3":  # tokens to the denoiser, but not to the pipeline
            latents = packed.transpose(1, 2).unflatten(2, size)
            tokens = forward(*args, **kwargs)[0] if answer is None else _tokens(answer(latents))
            calls.append((latents, tokens.transpose(1, 2).unflatten(2, size)))
            return (tokens,)
        if family.name == "z_image":  # lists of pictures with a frame, and the other way round
            latents = torch.stack(packed)[:, :, 0]
            output = -answer(latents)[:, :, None] if answer else forward(*args, **kwargs)[0]
            calls.append((latents, -torch.stack(list(output))[:, :, 0]))
            return (list(output),)
        latents = family.unpack(packed, *size)
        output = family.pack(answer(latents)) if answer else forward(*args, **kwargs)[0]
        # Some answer for the prompt's tokens too, which come first.
        own = output[:, -packed.shape[1] :] if packed.ndim == 3 else output
        calls.append((latents, family.unpack(own, *size)))
        if family.name == "ltx2":
            return output, torch.zeros_like(kwargs["audio_hidden_states"])
        return (output,) if kwargs.get("return_dict") is False else SimpleNamespace(sample=output)

    for denoiser in family.denoisers.values():
        # With the signature of the real one, at which modular pipelines look.
        forward = denoiser.forward
        denoiser.forward = functools.wraps(forward)(functools.partial(recorded, forward))
    return calls


def _tokens(latents: Tensor) -> Tensor:
    return latents.flatten(2).transpose(1, 2)


def drawn_latents(pipe: Any, family: Family, prompt: str | list[str], **call: Any) -> Tensor:
    """Latents that the pipeline returns, laid out as the family does."""
    found = drawn(pipe, prompt, output_type="latent", **call)
    if family.name == "ltx2":  # whose pipeline undoes the scaling
        mean, scale = family._latent_scaling()
        return ((found - mean) * scale)[:, :, 0]
    if family.name == "flux2" and found.shape[1:] == (4, 16, 16):
        # klein's are ready for the autoencoder.
        bn, eps = pipe.vae.bn, pipe.vae.config.batch_norm_eps
        mean, variance = (x[:, None, None] for x in (bn.running_mean, bn.running_var))
        return (pixel_unshuffle(found, 2) - mean) / (variance + eps).sqrt()
    return family.unpack(found, *shape_of(family)[1:])


def no_guidance(family: Family) -> dict[str, float]:
    """The pipeline's argument that leaves the second prompt out."""
    name = "true_cfg_scale" if family.name.startswith("qwen_image") else "guidance_scale"
    return {name: family.no_guidance}


def given(family: Family, latents: Tensor) -> Tensor:
    """Latents as the pipeline's argument takes them."""
    return latents if family.name == "flux2" else family.pack(latents)


# -- recognition ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_each_pipeline_is_recognised(name: str) -> None:
    pipe = PIPELINES[name]()
    family = family_of(pipe.components, pipe.config)
    assert type(family) is FAMILIES[name.split("-")[0]]
    assert family.denoiser is pipe.components[family.denoiser_key]
    assert family.vae is pipe.vae
    assert family.default_resolution == NO_SIZE.get(family.name, 32)
    assert [name for name, other in FAMILIES.items() if other.matches(pipe.components)] == [
        family.name
    ]


def test_unknown_components_are_named_in_the_error() -> None:
    with pytest.raises(PipelineError, match=rf"unet: Linear.*{', '.join(FAMILIES)}"):
        family_of({"unet": torch.nn.Linear(1, 1), "vae": None})
    with pytest.raises(PipelineError, match="no denoiser at all"):
        family_of({})


def test_text_encoders_and_dictionaries(pipe: Any, family: Family) -> None:
    clips = list(family.clip_encoders)
    every = [key for key in pipe.components if key.startswith("text_encoder")]
    every = [key for key in every if pipe.components[key] is not None]
    every += ["connectors"] if family.name == "ltx2" else []
    assert list(family.text_encoders) == clips
    assert list(family.all_text_encoders) == every
    dictionaries = family.token_dictionaries()
    assert [entry.key for entry in dictionaries] == clips
    for entry in dictionaries:
        assert entry.text_encoder is pipe.components[entry.key]
        assert entry.tokenizer is pipe.components[entry.key.replace("text_encoder", "tokenizer")]


def test_freed_parts_are_asked_for_by_name(family: Family) -> None:
    parts = {**family.components, "text_encoder": None, "vae": None}
    freed = type(family)(parts, family.pipeline_config)
    with pytest.raises(PipelineError, match="no text_encoder"):
        freed.encode_prompts(["a dog"])
    with pytest.raises(PipelineError, match="no vae"):
        freed.encode_images(pixels())
    assert "text_encoder" not in freed.all_text_encoders
    t = freed.timesteps(torch.tensor([0.5]), shape_of(family))
    assert (
        freed.predict(
            normal((1, *shape_of(family)), 0),
            t,
            {name: rows[:1] for name, rows in family.encode_prompts([""]).items()},
        )
        .isfinite()
        .all()
    )


# -- prompts -------------------------------------------------------------------------------------

PROMPTS = ["a photo of a dog", "zebra, " + 30 * "two red cups ", ""]


def pipeline_conditions(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    return pipeline_encodings(pipe, prompt=prompts, do_classifier_free_guidance=False)[0]


def pipeline_encodings(pipe: Any, **call: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the pipeline's encode_prompt makes of the prompts, and of the negative ones."""
    family = family_of(pipe.components).name
    call |= {"device": "cpu"}
    if family in ("wan", "cogvideox"):
        length = {"max_sequence_length": 512 if family == "wan" else 226}
        embeds, negative = pipe.encode_prompt(**call, **length)
        return {"prompt_embeds": embeds}, {"prompt_embeds": negative}
    if family == "ltx2":
        embeds, mask, negative, negative_mask = pipe.encode_prompt(**call)
        found = []
        for states, own in ((embeds, mask), (negative, negative_mask)):
            if states is not None:
                condensed, _, own = pipe.connectors(states, own, padding_side="left")
                found.append({"prompt_embeds": condensed, "prompt_attention_mask": own})
        return found[0], found[-1]
    call |= {"num_images_per_prompt": 1}
    if family == "sd":
        embeds, negative = pipe.encode_prompt(**call)
        return {"prompt_embeds": embeds}, {"prompt_embeds": negative}
    if family == "flux3":
        step = pipe.blocks.sub_blocks["text_encoder"].init_pipeline()
        step.update_components(text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)

        def one_by_one(prompts: list[str]) -> dict[str, Tensor]:
            rows = [step(prompt=prompt, output="prompt_embeds")[0] for prompt in prompts]
            lengths = torch.tensor([len(row) for row in rows])
            return {"prompt_embeds": pad_sequences(rows), "prompt_lengths": lengths}

        return one_by_one(call["prompt"]), one_by_one([""])
    if family == "z_image":
        call.pop("num_images_per_prompt")
        both = pipe.encode_prompt(**call | {"prompt": list(call["prompt"])})
        found = [
            {
                "prompt_embeds": pad_sequences(rows),
                "prompt_lengths": torch.tensor(list(map(len, rows))),
            }
            for rows in both
            if rows
        ]
        return found[0], found[-1]
    if family == "qwen_image":
        call.pop("do_classifier_free_guidance")

        def encoded(prompt: Any) -> dict[str, Tensor]:
            embeds, mask = pipe.encode_prompt(**call | {"prompt": prompt})
            mask = torch.ones(embeds.shape[:2]).long() if mask is None else mask
            return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

        return encoded(call["prompt"]), encoded("")
    if family in ("flux2", "krea2", "qwen_image_21"):
        call.pop("do_classifier_free_guidance")

        def encoded_alone(prompts: list[str]) -> dict[str, Tensor]:
            embeds, mask, *_ = pipe.encode_prompt(**call | {"prompt": prompts})
            found = {"prompt_embeds": embeds}
            if family == "krea2":
                return found | {"prompt_embeds_mask": mask}
            if family == "flux2":
                return found
            full = torch.tensor([embeds.shape[1]] * len(prompts))
            return found | {"prompt_lengths": full if mask is None else mask.sum(1)}

        return encoded_alone(call["prompt"]), encoded_alone([""])
    if family == "flux":
        call.pop("do_classifier_free_guidance")
        embeds, pooled, _ = pipe.encode_prompt(**call)
        found = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        empty = pipe.encode_prompt(**call | {"prompt": ""})
        return found, dict(zip(found, empty, strict=False))
    if family == "sd3":
        call |= {"prompt_2": None, "prompt_3": None}
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(**call)
    return (
        {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled},
        {"prompt_embeds": negative, "pooled_prompt_embeds": negative_pooled},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_are_encoded_as_by_the_pipeline(
    pipe: Any, family: Family, dtype: torch.dtype
) -> None:
    pipe.to(dtype)
    with torch.no_grad():
        expected, ours = pipeline_conditions(pipe, PROMPTS), family.encode_prompts(PROMPTS)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert value.shape[0] == len(PROMPTS)
        assert ours[name].dtype == value.dtype
        assert value.dtype == dtype or not name.endswith("embeds")
        assert torch.equal(ours[name], value)


@torch.no_grad()
def test_guidance_leads_away_from_what_the_pipeline_leads_away_from(
    pipe: Any, family: Family
) -> None:
    _, expected = pipeline_encodings(pipe, prompt=["a dog"], do_classifier_free_guidance=True)
    ours = family.unconditional(family.encode_prompts([""]))
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value)


def test_the_default_guidance_is_the_pipeline_s(pipe: Any, family: Family) -> None:
    if isinstance(pipe, ModularPipeline):
        expected = pipe.guider.guidance_scale
    else:
        taken = inspect.signature(type(pipe).__call__).parameters
        expected = taken[family.guidance_argument].default
    if pipe.config.get("is_distilled") and family.no_guidance == 0:
        expected = 0  # which its users give by hand
    assert family.default_guidance == expected


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_sd3])
@pytest.mark.parametrize("key", ["text_encoder", "text_encoder_2"])
def test_encoders_of_mixed_precision_are_as_in_the_pipeline(
    make: Callable[[], Any], key: str
) -> None:
    pipe = make()
    pipe.components[key].to(torch.bfloat16)
    with torch.no_grad():
        expected = pipeline_conditions(pipe, PROMPTS)
        ours = family_of(pipe.components).encode_prompts(PROMPTS)
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value)


def test_padding_is_masked_only_where_the_config_asks() -> None:
    pipe = tiny_sd()
    family = family_of(pipe.components)
    plain = family.encode_prompts(PROMPTS)["prompt_embeds"]
    pipe.text_encoder.config.use_attention_mask = True
    masked = family.encode_prompts(PROMPTS)["prompt_embeds"]
    assert not torch.equal(plain, masked)
    assert torch.equal(masked, pipeline_conditions(pipe, PROMPTS)["prompt_embeds"])


def test_gradients_reach_the_token_tables(family: Family) -> None:
    conditions = family.encode_prompts(["a photo of a dog"])
    if not family.token_dictionaries():
        return
    sum(value.float().square().sum() for value in conditions.values()).backward()
    for entry in family.token_dictionaries():
        table: Any = entry.text_encoder.get_input_embeddings()
        dog = entry.tokenizer("dog").input_ids[1]
        assert table.weight.grad[dog].abs().sum() > 0


# -- pictures ------------------------------------------------------------------------------------


@torch.no_grad()
def test_latents_are_scaled_as_the_pipeline_scales_them(pipe: Any, family: Family) -> None:
    mean, std = family.encode_images(pixels())
    assert mean.shape == std.shape == (2, *shape_of(family))
    assert mean.dtype == std.dtype == torch.float32

    if family.name in ("flux2", "flux3", "qwen_image", "qwen_image_21", "krea2", "wan", "ltx2"):
        return  # have tests of their own, on what they normalise by
    # To an autoencoder of videos they are the first frame.
    frame = (slice(None), slice(None), None) if family.name == "cogvideox" else ...
    posterior = pipe.vae.encode(pixels()[frame]).latent_dist
    shift = pipe.vae.config.shift_factor or 0.0
    draw = posterior.sample(torch.Generator().manual_seed(1))
    # The pipeline undoes the scaling by `latents / scaling_factor + shift_factor`.
    noise = (draw - posterior.mean) / posterior.std
    restored = (mean[frame] + std[frame] * noise) / pipe.vae.config.scaling_factor + shift
    torch.testing.assert_close(restored, draw)

    expected = pipe.vae.decode(posterior.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(family.decode_latents(mean)[frame], expected)


@torch.no_grad()
def test_pictures_are_those_of_the_pipeline(pipe: Any, family: Family) -> None:
    def call() -> dict[str, Any]:
        return {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)} | SIZE

    picture = family.decode_latents(drawn_latents(pipe, family, "a dog", **call()))
    # Of transparency, which one of them draws, there is none in what is learned.
    expected = drawn(pipe, "a dog", output_type="pt", **call())[:, :3]
    torch.testing.assert_close(picture, 2 * expected - 1, atol=1e-5, rtol=0)


def test_a_multiple_of_the_size_is_what_the_pipeline_takes(pipe: Any, family: Family) -> None:
    size = 2 * family.latent_multiple
    call = {"num_inference_steps": 2, "width": size, "output_type": "pil"}
    assert drawn(pipe, "a dog", **call, height=size)[0].size == (size, size)
    odd = size + family.latent_multiple // 2
    if family.name not in ("flux", "flux2", "qwen_image", "qwen_image_21", "krea2"):
        with pytest.raises(ValueError, match="divisible by"):
            drawn(pipe, "a dog", **call, height=odd)
        return
    # The others round, with a warning.
    rounded = size + family.latent_multiple if family.name == "krea2" else size
    assert drawn(pipe, "a dog", **call, height=odd)[0].size == (size, rounded)


# -- noise and targets ---------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_predict_is_the_call_that_the_pipeline_makes(
    pipe: Any, family: Family, guidance: float
) -> None:
    calls = record_calls(family)
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 3} | SIZE
    scale = {"guidance_scale": guidance} if family.has_guidance_input else no_guidance(family)
    drawn(pipe, "a red cup", generator=generator, **call, **scale)
    conditions = family.encode_prompts(["a red cup"])
    assert len(calls) == len(pipe.scheduler.timesteps)
    for t, (noisy, output) in zip(pipe.scheduler.timesteps, list(calls), strict=True):
        found = family.predict(noisy, t.expand(1), conditions, guidance)
        torch.testing.assert_close(found, output, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_schedule_is_that_of_the_pipeline(pipe: Any, family: Family) -> None:
    drawn(pipe, "a dog", num_inference_steps=4, output_type="latent", **SIZE)
    ours = family.schedule(4, shape_of(family), torch.device("cpu"))
    assert ours is not pipe.scheduler
    torch.testing.assert_close(ours.timesteps, pipe.scheduler.timesteps)
    own = family.pipeline_config.get("sample_sigmas") is not None
    if hasattr(ours, "sigmas"):
        torch.testing.assert_close(ours.sigmas, pipe.scheduler.sigmas)
        # What is trained at u is what is drawn at u: evenly spaced levels are shifted alike.
        levels = family.timesteps(torch.linspace(1, 1 / 4, 4), shape_of(family))
        # sd3's and wan's schedulers space levels otherwise; qwen_image's draws them to an end
        # above 0; flux2 shifts by the number of steps too.
        if family.name not in ("sd3", "qwen_image", "wan", "flux2") and not own:
            torch.testing.assert_close(levels, ours.timesteps)


@torch.no_grad()
def test_the_true_target_has_no_loss_and_leads_back_to_the_picture(
    pipe: Any, family: Family
) -> None:
    shape = shape_of(family)
    clean, noise = normal((2, *shape), 0), normal((2, *shape), 1)
    t = family.timesteps(torch.tensor([0.1, 0.8]), shape)
    levels = t

    def answer(latents: Tensor) -> Tensor:
        whole = family.target(clean, noise, levels)
        if len(latents) == len(whole):
            return whole
        return whole[len(calls) % 2][None]  # of a model whose samples go to two denoisers

    calls = record_calls(family, answer)
    conditions = family.encode_prompts(["a dog", "a cat"])
    noisy = family.noisy_latents(clean, noise, t)
    prediction = family.predict(noisy, t, conditions)
    assert weighted_mse(prediction, family.target(clean, noise, t)).eq(0).all()
    assert len(calls) == len(family.denoisers)

    # The pipeline's first level may not be all noise, so it starts where its schedule does. DDIM
    # meets its own timesteps only where the number of steps divides 1000.
    schedule = family.schedule(5, shape, torch.device("cpu"))
    steps = len(schedule.timesteps)
    # UniPC rounds its timesteps; the levels of noise are those of its sigmas.
    passed = schedule.sigmas[:-1] * 1000 if hasattr(schedule, "sigmas") else schedule.timesteps
    start = family.noisy_latents(clean, noise, passed[:1].expand(2))
    calls.clear()

    def next_level(*_: Any) -> dict[str, Any]:
        nonlocal levels
        levels = passed[min(len(calls), steps - 1)].expand(2)
        return {}

    next_level()
    steered = {} if isinstance(pipe, ModularPipeline) else {"callback_on_step_end": next_level}
    result = drawn_latents(
        pipe,
        family,
        ["a dog", "a cat"],
        num_inference_steps=steps,
        **no_guidance(family),
        latents=given(family, start),
        **steered,
        **SIZE,
    )
    assert len(calls) == steps
    for (sample, _), level in zip(calls, passed, strict=True):
        expected = family.noisy_latents(clean, noise, level.expand(2))
        torch.testing.assert_close(sample, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result, clean, atol=1e-4, rtol=1e-4)


def test_timesteps_rise_with_u_and_stay_in_range(family: Family) -> None:
    u = torch.linspace(0, 1, 4001)[1:-1]
    t = family.timesteps(u, shape_of(family))
    assert t.shape == u.shape
    assert (t.diff() >= 0).all()
    assert t.min() >= 0 and t.max() <= 1000
    noisy = family.noisy_latents(torch.ones(3999, 1, 1, 1), torch.zeros(3999, 1, 1, 1), t)
    assert (noisy.flatten().diff() <= 0).all(), "u = 1 is all noise"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predict_with_and_without_autocast(pipe: Any, family: Family, dtype: torch.dtype) -> None:
    conditions = family.encode_prompts(["a dog", "a cat"])  # float32
    noisy = normal((2, *shape_of(family)), 0)
    t = family.timesteps(torch.tensor([0.3, 0.6]), shape_of(family))
    for denoiser in family.denoisers.values():
        denoiser.to(dtype)
    plain = family.predict(noisy, t, conditions)
    assert plain.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        cast = family.predict(noisy, t, conditions)
    assert cast.dtype == torch.bfloat16
    assert (cast.float() - plain.float()).norm() < 0.05 * plain.float().norm()


def test_extra_channels_of_a_variant_are_refused(family: Family) -> None:
    channels, height, width = shape_of(family)
    t = family.timesteps(torch.tensor([0.5]), shape_of(family))
    with pytest.raises(PipelineError, match=f"takes {channels} channels where latents have 9"):
        family.predict(torch.zeros(1, 9, height, width), t, family.encode_prompts([""]))


# -- adapter targets -----------------------------------------------------------------------------


def test_targets_are_the_same_with_an_adapter_attached(family: Family) -> None:
    before = family.fingerprint()
    targets = {key: family.adapter_targets(key) for key in before["widths"]}
    for key, found in targets.items():
        module: Any = family.components[key]
        for name, shape in found.items():
            assert module.get_submodule(name).weight.shape == shape
        module.add_adapter(LoraConfig(r=2, target_modules=list(found)))
        assert family.adapter_targets(key) == found
    assert family.fingerprint() == before


def test_targets_of_a_compiled_denoiser_keep_their_names(family: Family) -> None:
    compiled = torch.compile(family.denoiser, backend="eager")
    again = type(family)({**family.components, family.denoiser_key: compiled})
    assert again.fingerprint() == family.fingerprint()
    assert again.cross_attention_layers() == family.cross_attention_layers()


def test_other_components_take_no_adapter(family: Family) -> None:
    with pytest.raises(ConfigError, match=f"choose from {family.denoiser_key}"):
        family.adapter_targets("vae")


def test_fingerprints_tell_architectures_apart() -> None:
    prints = {
        name: family_of(build().components).fingerprint() for name, build in PIPELINES.items()
    }
    assert prints["sd-epsilon"] == prints["sd-v"] == prints["sd-animatediff"]
    assert prints["sdxl-epsilon"] == prints["sdxl-v"]
    assert prints["sd3"] == prints["sd3-without-t5"]
    assert prints["flux-dev"] == prints["flux-schnell"]
    assert prints["flux2-dev"] == prints["flux2-klein"]
    assert prints["wan-2.1"] == prints["wan-2.2-5b"]
    # Wan 2.2 14B is two transformers of Wan 2.1's kind.
    assert len({found["denoiser"] for found in prints.values()}) == len(FAMILIES) + 1
    assert prints["wan-2.2-14b"]["widths"] == {"transformer": [32], "transformer_2": [32]}
    clips = {"text_encoder": [16], "text_encoder_2": [24]}
    assert prints["sd-v"]["widths"] == {"unet": [16, 32], "text_encoder": [32]}
    assert prints["sdxl-v"]["widths"] == {"unet": [32, 40], **clips}
    assert prints["sd3"]["widths"] == {"transformer": [32], **clips}
