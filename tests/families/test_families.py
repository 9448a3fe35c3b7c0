"""Every family compared with its model's pipeline and scheduler."""

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
#: (channels, height, width) of an image's latents; (4, 16, 16) for other families.
SHAPES = {"flux2": (16, 8, 8), "qwen_image_21": (4, 2, 2)}
# Default resolutions of the pipelines whose denoisers have no configured size.
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
    """Record (latents, output) of each denoiser call, in the family's layout.

    `answer(latents)` replaces the model's prediction.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    size = shape_of(family)[1:]
    if family.name == "ltx2":  # the video stream would depend on the audio stream
        isolate(SimpleNamespace(transformer=family.denoiser))

    def recorded(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        packed = args[0] if args else kwargs["hidden_states"]
        if family.name == "flux3":  # only the denoiser uses tokens
            latents = packed.transpose(1, 2).unflatten(2, size)
            tokens = forward(*args, **kwargs)[0] if answer is None else _tokens(answer(latents))
            calls.append((latents, tokens.transpose(1, 2).unflatten(2, size)))
            return (tokens,)
        if family.name == "z_image":  # lists of images with a frame axis, opposite sign
            latents = torch.stack(packed)[:, :, 0]
            output = -answer(latents)[:, :, None] if answer else forward(*args, **kwargs)[0]
            calls.append((latents, -torch.stack(list(output))[:, :, 0]))
            return (list(output),)
        latents = family.unpack(packed, *size)
        output = family.pack(answer(latents)) if answer else forward(*args, **kwargs)[0]
        # Some outputs start with the prompt's tokens.
        picture = output[:, -packed.shape[1] :] if packed.ndim == 3 else output
        calls.append((latents, family.unpack(picture, *size)))
        if family.name == "ltx2":
            return output, torch.zeros_like(kwargs["audio_hidden_states"])
        return (output,) if kwargs.get("return_dict") is False else SimpleNamespace(sample=output)

    for denoiser in family.denoisers.values():
        # Modular pipelines inspect the signature.
        forward = denoiser.forward
        denoiser.forward = functools.wraps(forward)(functools.partial(recorded, forward))
    return calls


def _tokens(latents: Tensor) -> Tensor:
    return latents.flatten(2).transpose(1, 2)


def drawn_latents(pipe: Any, family: Family, prompt: str | list[str], **call: Any) -> Tensor:
    """Return the pipeline's output latents in the family's layout."""
    latents = drawn(pipe, prompt, output_type="latent", **call)
    if family.name == "ltx2":  # its pipeline returns unscaled latents
        mean, scale = family._latent_scaling()
        return ((latents - mean) * scale)[:, :, 0]
    if family.name == "flux2" and latents.shape[1:] == (4, 16, 16):
        # klein's pipeline returns latents in the autoencoder's layout.
        bn, eps = pipe.vae.bn, pipe.vae.config.batch_norm_eps
        mean, variance = (x[:, None, None] for x in (bn.running_mean, bn.running_var))
        return (pixel_unshuffle(latents, 2) - mean) / (variance + eps).sqrt()
    return family.unpack(latents, *shape_of(family)[1:])


def no_guidance(family: Family) -> dict[str, float]:
    """Return the pipeline's argument that disables guidance."""
    name = "true_cfg_scale" if family.name.startswith("qwen_image") else "guidance_scale"
    return {name: family.no_guidance}


def pipeline_latents(family: Family, latents: Tensor) -> Tensor:
    """Convert latents to the layout of the pipeline's argument."""
    return latents if family.name == "flux2" else family.pack(latents)


# -- recognition ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_is_recognised(name: str) -> None:
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


def test_freed_components_are_named_in_the_error(family: Family) -> None:
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
    """Return the pipeline's encodings of the prompts and of the negative prompts."""
    family = family_of(pipe.components).name
    call |= {"device": "cpu"}
    if family in ("wan", "cogvideox"):
        length = {"max_sequence_length": 512 if family == "wan" else 226}
        embeds, negative = pipe.encode_prompt(**call, **length)
        return {"prompt_embeds": embeds}, {"prompt_embeds": negative}
    if family == "ltx2":
        embeds, mask, negative, negative_mask = pipe.encode_prompt(**call)
        encodings = []
        for states, attention_mask in ((embeds, mask), (negative, negative_mask)):
            if states is not None:
                condensed, _, attention_mask = pipe.connectors(
                    states, attention_mask, padding_side="left"
                )
                encodings.append(
                    {"prompt_embeds": condensed, "prompt_attention_mask": attention_mask}
                )
        return encodings[0], encodings[-1]
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
        encodings = [
            {
                "prompt_embeds": pad_sequences(rows),
                "prompt_lengths": torch.tensor(list(map(len, rows))),
            }
            for rows in both
            if rows
        ]
        return encodings[0], encodings[-1]
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
            encodings = {"prompt_embeds": embeds}
            if family == "krea2":
                return encodings | {"prompt_embeds_mask": mask}
            if family == "flux2":
                return encodings
            full = torch.tensor([embeds.shape[1]] * len(prompts))
            return encodings | {"prompt_lengths": full if mask is None else mask.sum(1)}

        return encoded_alone(call["prompt"]), encoded_alone([""])
    if family == "flux":
        call.pop("do_classifier_free_guidance")
        embeds, pooled, _ = pipe.encode_prompt(**call)
        encodings = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        empty = pipe.encode_prompt(**call | {"prompt": ""})
        return encodings, dict(zip(encodings, empty, strict=False))
    if family == "sd3":
        call |= {"prompt_2": None, "prompt_3": None}
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(**call)
    return (
        {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled},
        {"prompt_embeds": negative, "pooled_prompt_embeds": negative_pooled},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoded_prompts_match_the_pipeline(pipe: Any, family: Family, dtype: torch.dtype) -> None:
    pipe.to(dtype)
    with torch.no_grad():
        expected, encoded = pipeline_conditions(pipe, PROMPTS), family.encode_prompts(PROMPTS)
    assert encoded.keys() == expected.keys()
    for name, value in expected.items():
        assert value.shape[0] == len(PROMPTS)
        assert encoded[name].dtype == value.dtype
        assert value.dtype == dtype or not name.endswith("embeds")
        assert torch.equal(encoded[name], value)


@torch.no_grad()
def test_the_unconditional_input_matches_the_pipeline(pipe: Any, family: Family) -> None:
    _, expected = pipeline_encodings(pipe, prompt=["a dog"], do_classifier_free_guidance=True)
    unconditional = family.unconditional(family.encode_prompts([""]))
    assert unconditional.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(unconditional[name], value)


def test_the_default_guidance_scale_is_the_pipelines(pipe: Any, family: Family) -> None:
    if isinstance(pipe, ModularPipeline):
        expected = pipe.guider.guidance_scale
    else:
        taken = inspect.signature(type(pipe).__call__).parameters
        expected = taken[family.guidance_argument].default
    if pipe.config.get("is_distilled") and family.no_guidance == 0:
        expected = 0  # the recommended value, which users pass
    assert family.default_guidance == expected


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_sd3])
@pytest.mark.parametrize("key", ["text_encoder", "text_encoder_2"])
def test_encoders_of_mixed_precision_match_the_pipeline(make: Callable[[], Any], key: str) -> None:
    pipe = make()
    pipe.components[key].to(torch.bfloat16)
    with torch.no_grad():
        expected = pipeline_conditions(pipe, PROMPTS)
        encoded = family_of(pipe.components).encode_prompts(PROMPTS)
    for name, value in expected.items():
        assert encoded[name].dtype == value.dtype
        assert torch.equal(encoded[name], value)


def test_padding_is_masked_only_if_configured() -> None:
    pipe = tiny_sd()
    family = family_of(pipe.components)
    plain = family.encode_prompts(PROMPTS)["prompt_embeds"]
    pipe.text_encoder.config.use_attention_mask = True
    masked = family.encode_prompts(PROMPTS)["prompt_embeds"]
    assert not torch.equal(plain, masked)
    assert torch.equal(masked, pipeline_conditions(pipe, PROMPTS)["prompt_embeds"])


def test_gradients_reach_the_token_embeddings(family: Family) -> None:
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
def test_scaled_latents_match_the_pipeline(pipe: Any, family: Family) -> None:
    mean, std = family.encode_images(pixels())
    assert mean.shape == std.shape == (2, *shape_of(family))
    assert mean.dtype == std.dtype == torch.float32

    if family.name in ("flux2", "flux3", "qwen_image", "qwen_image_21", "krea2", "wan", "ltx2"):
        return  # separate tests check their normalisation
    # Video autoencoders encode the image as the first frame.
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
def test_decoded_images_match_the_pipeline(pipe: Any, family: Family) -> None:
    def call() -> dict[str, Any]:
        return {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)} | SIZE

    picture = family.decode_latents(drawn_latents(pipe, family, "a dog", **call()))
    # Without the alpha channel of qwen_image_21.
    expected = drawn(pipe, "a dog", output_type="pt", **call())[:, :3]
    torch.testing.assert_close(picture, 2 * expected - 1, atol=1e-5, rtol=0)


def test_image_sizes_must_be_multiples_of_latent_multiple(pipe: Any, family: Family) -> None:
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
def test_predictions_match_the_pipelines_denoiser_calls(
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
        prediction = family.predict(noisy, t.expand(1), conditions, guidance)
        torch.testing.assert_close(prediction, output, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_schedule_matches_the_pipeline(pipe: Any, family: Family) -> None:
    drawn(pipe, "a dog", num_inference_steps=4, output_type="latent", **SIZE)
    schedule = family.schedule(4, shape_of(family), torch.device("cpu"))
    assert schedule is not pipe.scheduler
    torch.testing.assert_close(schedule.timesteps, pipe.scheduler.timesteps)
    has_sigmas = family.pipeline_config.get("sample_sigmas") is not None
    if hasattr(schedule, "sigmas"):
        torch.testing.assert_close(schedule.sigmas, pipe.scheduler.sigmas)
        # Training shifts evenly spaced levels as sampling does.
        levels = family.timesteps(torch.linspace(1, 1 / 4, 4), shape_of(family))
        # sd3's and wan's schedulers space levels differently; qwen_image's last level is above 0;
        # flux2's shift depends on the number of steps.
        if family.name not in ("sd3", "qwen_image", "wan", "flux2") and not has_sigmas:
            torch.testing.assert_close(levels, schedule.timesteps)


@torch.no_grad()
def test_the_target_has_zero_loss_and_denoises_to_the_latents(pipe: Any, family: Family) -> None:
    shape = shape_of(family)
    clean, noise = normal((2, *shape), 0), normal((2, *shape), 1)
    t = family.timesteps(torch.tensor([0.1, 0.8]), shape)
    levels = t

    def answer(latents: Tensor) -> Tensor:
        whole = family.target(clean, noise, levels)
        if len(latents) == len(whole):
            return whole
        return whole[len(calls) % 2][None]  # for models with two denoisers

    calls = record_calls(family, answer)
    conditions = family.encode_prompts(["a dog", "a cat"])
    noisy = family.noisy_latents(clean, noise, t)
    prediction = family.predict(noisy, t, conditions)
    assert weighted_mse(prediction, family.target(clean, noise, t)).eq(0).all()
    assert len(calls) == len(family.denoisers)

    # The first level of the schedule may not be pure noise. DDIM's timesteps are exact only if the
    # number of steps divides 1000.
    schedule = family.schedule(5, shape, torch.device("cpu"))
    steps = len(schedule.timesteps)
    # UniPC rounds its timesteps, so its sigmas give the noise levels.
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
        latents=pipeline_latents(family, start),
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


def test_adapter_targets_are_the_same_with_an_adapter_attached(family: Family) -> None:
    before = family.fingerprint()
    targets = {key: family.adapter_targets(key) for key in before["widths"]}
    for key, layers in targets.items():
        module: Any = family.components[key]
        for name, shape in layers.items():
            assert module.get_submodule(name).weight.shape == shape
        module.add_adapter(LoraConfig(r=2, target_modules=list(layers)))
        assert family.adapter_targets(key) == layers
    assert family.fingerprint() == before


def test_adapter_targets_of_a_compiled_denoiser_have_the_same_names(family: Family) -> None:
    compiled = torch.compile(family.denoiser, backend="eager")
    again = type(family)({**family.components, family.denoiser_key: compiled})
    assert again.fingerprint() == family.fingerprint()
    assert again.cross_attention_layers() == family.cross_attention_layers()


def test_other_components_take_no_adapter(family: Family) -> None:
    with pytest.raises(ConfigError, match=f"choose from {family.denoiser_key}"):
        family.adapter_targets("vae")


def test_fingerprints_distinguish_architectures() -> None:
    fingerprints = {
        name: family_of(build().components).fingerprint() for name, build in PIPELINES.items()
    }
    assert fingerprints["sd-epsilon"] == fingerprints["sd-v"] == fingerprints["sd-animatediff"]
    assert fingerprints["sdxl-epsilon"] == fingerprints["sdxl-v"]
    assert fingerprints["sd3"] == fingerprints["sd3-without-t5"]
    assert fingerprints["flux-dev"] == fingerprints["flux-schnell"]
    assert fingerprints["flux2-dev"] == fingerprints["flux2-klein"]
    assert fingerprints["wan-2.1"] == fingerprints["wan-2.2-5b"]
    # Wan 2.2 14B has two transformers with the architecture of Wan 2.1.
    assert (
        len({fingerprint["denoiser"] for fingerprint in fingerprints.values()}) == len(FAMILIES) + 1
    )
    assert fingerprints["wan-2.2-14b"]["widths"] == {"transformer": [32], "transformer_2": [32]}
    clips = {"text_encoder": [16], "text_encoder_2": [24]}
    assert fingerprints["sd-v"]["widths"] == {"unet": [16, 32], "text_encoder": [32]}
    assert fingerprints["sdxl-v"]["widths"] == {"unet": [32, 40], **clips}
    assert fingerprints["sd3"]["widths"] == {"transformer": [32], **clips}
