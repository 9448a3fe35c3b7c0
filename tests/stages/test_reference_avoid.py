"""avoid= with reference images: which rows, words and models it acts on."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

import customize
from customize.errors import ConfigError
from customize.families import family_of
from customize.references.avoided_values import TextValues
from customize.references.seams.attachment import ReferenceProjection
from customize.stages.decor.reference_values import encode_phrases
from customize.stages.references import References
from tests.base.test_placement import offload_groups, offload_models
from tests.pipeline.making import concept
from tests.references.test_encoder import make_images
from tests.references.test_seams import snapshot
from tests.references.tiny_model import tiny_reference_model
from tests.stages.test_reference_tokens import PROMPT, A, B, close, differ, draw, images, make
from tests.tiny import drawn, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl
from tests.tiny_references import tiny_kontext
from tests.tiny_video import tiny_animatediff

WORD = "red"


def record_values(pipe, **call):
    """Call a pipeline, and return the values of tokens in each layer at the first step."""
    recorded = []
    forward = ReferenceProjection.forward

    def record(self, tokens):
        values = forward(self, tokens)
        if self._is_value:
            recorded.append(values)
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceProjection, "forward", record)
        draw(pipe, num_inference_steps=1, **call)
    return recorded


@pytest.mark.parametrize("kind", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_word_leaves_the_values_of_prompts_and_no_others(kind, guidance):
    pipe, _ = make(kind)
    call = {"reference_images": A, "guidance_scale": guidance}
    plain, base = images(pipe, **call), images(pipe)
    before = snapshot(pipe.unet)
    values = record_values(pipe, **call)
    avoided = record_values(pipe, avoid=WORD, **call)
    changed = 0
    for old, new in zip(values, avoided, strict=True):
        assert torch.equal(new[:-1], old[:-1])  # of the negative prompt
        changed += not torch.equal(new[-1], old[-1])
    assert changed
    drawn_once = images(pipe, avoid=WORD, **call)
    assert differ(drawn_once, plain)
    assert np.array_equal(images(pipe, avoid=WORD, **call), drawn_once)
    assert np.array_equal(images(pipe, **call), plain)
    assert snapshot(pipe.unet) == before
    pipe.unload_custom()
    assert np.array_equal(images(pipe), base)
    assert np.array_equal(base, images(kind()))


def test_the_prompt_alone_is_cleaned_where_it_is_the_target():
    pipe, _ = make()
    values = record_values(pipe, reference_images=A)
    ours = record_values(pipe, reference_images=A, avoid=WORD)
    pipe.load_custom(customize.Decor(target="prompt"))
    alone = record_values(pipe, reference_images=A, avoid=WORD)
    assert all(torch.equal(old, new) for old, new in zip(values, alone, strict=True))
    assert not all(torch.equal(old, new) for old, new in zip(values, ours, strict=True))


def test_strength_and_settings_for_all_calls():
    pipe, _ = make()
    plain = images(pipe, reference_images=A)
    pipe.load_custom(customize.Decor(strength=0.0))
    assert np.array_equal(images(pipe, reference_images=A, avoid=WORD), plain)
    pipe.load_custom(customize.Decor(strength=1.25))
    explicit = record_values(pipe, reference_images=A, avoid=WORD)
    pipe.load_custom(customize.Decor(strength=0.5))
    half = record_values(pipe, reference_images=A, avoid=WORD)
    pipe.load_custom(customize.Decor(avoid=WORD))
    default = record_values(pipe, reference_images=A)
    assert all(torch.equal(one, two) for one, two in zip(explicit, default, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(half, default, strict=True))
    pipe.load_custom(customize.Decor())
    assert np.array_equal(images(pipe, reference_images=A), plain)


def test_prompts_that_ask_for_the_word_keep_it():
    pipe, _ = make()
    prompts = ["a red dog", "a dog", "a striped cat"]
    call = {"reference_images": [A, B, A], "num_images_per_prompt": 2}
    with pytest.warns(UserWarning, match="asks for"):
        batch = images(pipe, prompts, avoid=[WORD, "striped"], **call)
    words = ("striped", [WORD, "striped"], WORD)
    for number, (prompt, group, word) in enumerate(zip(prompts, [A, B, A], words, strict=True)):
        alone = images(pipe, prompt, reference_images=group, avoid=word, num_images_per_prompt=2)
        assert close(batch[2 * number : 2 * number + 2], alone)


def test_phrases_are_directions_in_any_order():
    pipe, _ = make()
    one = images(pipe, reference_images=A, avoid="red, striped")
    assert close(one, images(pipe, reference_images=A, avoid=["striped", "red", "red"]))
    assert differ(one, images(pipe, reference_images=A, avoid="red"))


def test_phrases_are_encoded_apart_from_the_call():
    pipe, _ = make()
    family = family_of(pipe.components)
    expected = encode_phrases(family, ["red", "striped"])
    seen = []
    pipe.load_custom(customize.Decor(strength=1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "customize.stages.reference_avoid.encode_phrases",
            lambda *args: seen.append(encode_phrases(*args)) or seen[-1],
        )
        draw(pipe, reference_images=A, avoid="red, striped")
    assert all(torch.equal(seen[0][phrase], expected[phrase]) for phrase in expected)


def test_saved_groups_and_scales(tmp_path):
    pipe, model = make()
    path = References(model).encode(A).save(tmp_path / "a.refs.safetensors")
    expected = images(pipe, reference_images=A, avoid=WORD)
    assert close(images(pipe, reference_images=path, avoid=WORD), expected)
    zero = images(pipe, reference_images=A, reference_scale=0.0, avoid=WORD)
    assert np.array_equal(zero, images(pipe, avoid=WORD))


def test_regions_avoid_in_the_group_of_each_phrase():
    pipe, _ = make()
    call = {"height": 32, "width": 64, "guidance_scale": 1.0}
    regions = {"dog": (0.0, 0.0, 0.5, 0.5), "cat": (0.5, 0.0, 1.0, 0.5)}
    call |= {"prompt": "a dog and a cat on a beach", "regions": regions}
    groups = {"reference_images": {"dog": A, "cat": B}}
    values = record_values(pipe, **call, **groups)
    avoided = record_values(pipe, **call, **groups, avoid=WORD)
    assert len(values) == len(avoided)
    changed = [not torch.equal(old, new) for old, new in zip(values, avoided, strict=True)]
    # A pass for the background, which has no group, and one for each region.
    layers = len(values) // 3
    assert not any(changed[:layers])
    assert any(changed[layers : 2 * layers]) and any(changed[2 * layers :])


def test_directions_are_those_of_the_base_where_concepts_are_attached():
    pipe, _ = make()
    layers = [module for module in pipe.unet.modules() if isinstance(module, torch.nn.Linear)]
    pipe.load_custom(concept(pipe, "rex"), concept(pipe, "tom", index=1))
    call = {"prompt": "a photo of <rex> and <tom>", "reference_images": A}
    used = []
    directions = TextValues.directions

    def record(self, words):
        used.append(self._projection)
        return directions(self, words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextValues, "directions", record)
        avoided = images(pipe, avoid=WORD, **call)
    assert used and all(any(layer is each for each in layers) for layer in used)
    assert differ(avoided, images(pipe, **call))
    pipe.load_custom(concept(pipe, "rex"), fuse=True)
    call["prompt"] = "a photo of <rex>"
    assert differ(images(pipe, avoid=WORD, **call), images(pipe, **call))
    pipe.unload_custom()
    assert np.array_equal(images(pipe), images(tiny_sd()))


def test_motion_models_avoid_in_references():
    pipe, _ = make(tiny_animatediff)
    call = {"num_frames": 3, "num_inference_steps": 2, "output_type": "np"}
    call |= {"height": 32, "width": 32, "prompt": PROMPT, "reference_images": A}

    def video(**more):
        return pipe(generator=torch.Generator().manual_seed(1), **call, **more).frames

    plain = video()
    avoided = video(avoid=WORD)
    pipe.load_custom(customize.Decor(target="prompt"))
    assert differ(avoided, video(avoid=WORD))
    assert np.array_equal(video(), plain)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_denoisers_avoid_in_references(in_place):
    torch._dynamo.reset()
    pipe, _ = make()
    expected = images(pipe, reference_images=A, avoid=WORD)
    plain = images(pipe, reference_images=A)
    if in_place:
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert close(images(pipe, reference_images=A, avoid=WORD), expected)
    assert close(images(pipe, reference_images=A), plain)
    assert close(images(pipe, reference_images=A, avoid=WORD), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("offload", [offload_models, offload_groups])
def test_offloaded_pipelines_avoid_in_references(offload):
    plain, model = make()
    expected = images(plain, reference_images=A, avoid=WORD)
    pipe = tiny_sd()
    offload(pipe)
    pipe.load_custom(References(model))
    assert close(images(pipe, reference_images=A, avoid=WORD), expected)


def test_half_precision_denoisers_avoid_in_references():
    pipe, _ = make()
    for name in ("unet", "text_encoder", "vae"):
        getattr(pipe, name).to(torch.bfloat16)
    assert differ(images(pipe, reference_images=A, avoid=WORD), images(pipe, reference_images=A))


def test_modular_pipelines_avoid_in_references():
    parts = tiny_sdxl().components
    pipe = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in parts.items() if part is not None})
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}

    def one(**more):
        return drawn(pipe, PROMPT, generator=torch.Generator().manual_seed(1), **call, **more)

    pipe.load_custom(References(tiny_reference_model(parts, 40)))
    standard = tiny_sdxl().load_custom(References(tiny_reference_model(parts, 40)))
    call_standard = {"reference_images": A, "guidance_scale": 7.5}
    assert close(one(reference_images=A), images(standard, **call_standard))
    avoided = one(reference_images=A, avoid=WORD)
    assert close(avoided, images(standard, avoid=WORD, **call_standard))
    assert differ(avoided, one(reference_images=A))


@pytest.mark.parametrize("kind", [tiny_sd3, tiny_flux])
def test_other_denoisers_warn_that_references_keep_the_word(kind):
    pipe = kind()
    pipe.load_custom(References(tiny_reference_model(pipe.components, 48)))
    with pytest.warns(UserWarning, match="acts on the prompt alone"):
        drawn_images = images(pipe, reference_images=A, avoid=WORD)
    pipe.load_custom(customize.Decor(target="prompt"))
    assert np.array_equal(images(pipe, reference_images=A, avoid=WORD), drawn_images)


def test_models_that_read_references_by_themselves_warn():
    pipe = tiny_kontext()
    image = make_images(1)[0].resize((64, 64))
    with pytest.warns(UserWarning, match="acts on the prompt alone.*by itself"):
        pipe(
            prompt=PROMPT,
            reference_images=image,
            avoid=WORD,
            num_inference_steps=1,
            height=32,
            width=32,
            output_type="latent",
            max_area=32 * 32,
            _auto_resize=False,
        )


def test_phrases_that_are_too_long_are_refused():
    pipe, _ = make()
    before = snapshot(pipe.unet)
    with pytest.raises(ConfigError, match="longer than"):
        draw(pipe, reference_images=A, avoid=" ".join(["red"] * 100))
    assert snapshot(pipe.unet) == before
