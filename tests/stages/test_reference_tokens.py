"""Drawing with a reference model: which pictures change, how, and that nothing stays behind."""

from __future__ import annotations

import copy
import json
import threading

import diffusers
import numpy as np
import pytest
import torch

import customize
from customize.errors import ConfigError, PipelineError
from customize.stages.references import References
from tests.pipeline.making import concept
from tests.references.test_encoder import make_images
from tests.references.test_seams import snapshot
from tests.references.tiny_model import tiny_reference_model
from tests.tiny import tiny_sd, tiny_sdxl
from tests.tiny_llm import tiny_flux2_klein, tiny_krea2
from tests.tiny_video import tiny_animatediff

A, B, C = (make_images(2, seed) for seed in range(3))
PROMPT = "a dog on the beach"


def make(kind=tiny_sd, **settings):
    pipe = kind()
    width = 32 if kind is not tiny_sdxl else 40
    model = tiny_reference_model(pipe.components, width, **settings)
    return pipe.load_custom(References(model)), model


def draw(pipe, prompt=PROMPT, seed=1, **call):
    count = 1 if isinstance(prompt, str) else len(prompt)
    count *= call.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed) for _ in range(count)]
    settings = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    return pipe(prompt=prompt, generator=generators, **settings | call)


def images(*args, **kwargs):
    return draw(*args, **kwargs).images


def close(a, b):
    return np.abs(a - b).max() < 1e-4


def differ(a, b):
    return np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize("kind", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_references_change_the_picture_and_nothing_else(kind, guidance):
    plain_pipe = kind()
    base = images(plain_pipe, guidance_scale=guidance)
    pipe, _ = make(kind)
    before = snapshot(pipe.unet)
    assert np.array_equal(images(pipe, guidance_scale=guidance), base)
    with_a = images(pipe, reference_images=A, guidance_scale=guidance)
    assert differ(with_a, base)
    assert differ(images(pipe, reference_images=B, guidance_scale=guidance), with_a)
    assert np.array_equal(images(pipe, reference_images=A, guidance_scale=guidance), with_a)
    zero = images(pipe, reference_images=A, reference_scale=0.0, guidance_scale=guidance)
    assert np.array_equal(zero, base)
    half = images(pipe, reference_images=A, reference_scale=0.5, guidance_scale=guidance)
    assert differ(half, base) and differ(half, with_a)
    assert snapshot(pipe.unet) == before
    pipe.unload_custom()
    assert np.array_equal(images(pipe, guidance_scale=guidance), base)
    assert not vars(pipe.unet).get("_customize")


def test_the_groups_that_were_used_last_are_kept(monkeypatch):
    monkeypatch.setattr("customize.stages.references._MAX_KEPT", 2)
    setting = References(make()[1])
    first = setting.encode(A)
    setting.encode(B)
    assert setting.encode(A) is first
    setting.encode(C)
    assert setting.encode(A) is first
    assert setting.encode([(A[0], "colour"), A[1]]) is not first


def test_everything_is_restored_after_an_error():
    pipe, _ = make()
    base, before = images(pipe), snapshot(pipe.unet)

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        draw(pipe, reference_images=A, callback_on_step_end=fail)
    assert snapshot(pipe.unet) == before
    assert np.array_equal(images(pipe), base)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_each_prompt_has_its_group_whatever_the_number_of_images(guidance):
    pipe, _ = make()
    call = {"guidance_scale": guidance, "num_images_per_prompt": 2}
    prompts = ["a dog", "a dog", "a cat"]  # equal prompts too
    batch = images(pipe, prompts, reference_images=[A, B, C], **call)
    for number, group in enumerate((A, B, C)):
        alone = images(pipe, prompts[number], reference_images=group, **call)
        assert close(batch[2 * number : 2 * number + 2], alone)
    shared = images(pipe, prompts, reference_images=A, **call)
    assert close(shared[:2], batch[:2])
    assert differ(shared[2:4], batch[2:4])


def test_a_scale_for_each_group():
    pipe, _ = make()
    prompts = ["a dog", "a cat"]
    both = images(pipe, prompts, reference_images=[A, B], reference_scale=[0.0, 1.0])
    assert close(both[:1], images(pipe, "a dog"))
    assert close(both[1:], images(pipe, "a cat", reference_images=B))


def test_a_scale_by_block_is_that_of_diffusers():
    pipe, model = make(lora_rank=0)
    layers = model.adapter.layers.attentions

    def with_layers(names):
        weights = {}
        for name in layers:
            weights[name] = model.adapter.value(name).weight.clone()
            if name not in names:
                model.adapter.value(name).weight.data.zero_()
        drawn = images(pipe, reference_images=A)
        for name, weight in weights.items():
            model.adapter.value(name).weight.data.copy_(weight)
        return drawn

    scale = {"down": {"block_1": [1.0]}}
    drawn = images(pipe, reference_images=A, reference_scale=scale)
    expected = with_layers([name for name in layers if name.startswith("down_blocks.1.")])
    assert close(drawn, expected)
    assert differ(drawn, images(pipe))
    everywhere = images(pipe, reference_images=A, reference_scale={"down": 1.0, "mid": 1, "up": 1})
    assert close(everywhere, images(pipe, reference_images=A))
    with pytest.raises(ConfigError, match="do not fit the UNet") as error:
        draw(pipe, reference_images=A, reference_scale={"down": {"block_1": [1.0, 0.5, 0.2]}})
    example = json.loads(error.value.fix.partition("such as ")[2])
    assert differ(images(pipe, reference_images=A, reference_scale=example), images(pipe))
    with pytest.raises(ConfigError, match="scale for 'a dog' is neither for words"):
        draw(pipe, reference_images=A, reference_scale={"a dog": 0.5})


def test_groups_that_nothing_reads_are_checked_and_not_encoded(monkeypatch):
    pipe, model = make()
    base, encoded = images(pipe), []
    other = tiny_reference_model(tiny_sd().components)
    other.encoder.final_layer.reference_tokens.data.add_(1.0)
    group = References(other).encode(A)
    monkeypatch.setattr(model, "encode", lambda *args, **kwargs: encoded.append(args))
    for scale in (0.0, [0.0], {"down": 0.0, "mid": 0.0, "up": {"block_0": 0.0}}):
        asked = {"reference_scale": scale}
        assert np.array_equal(images(pipe, reference_images=A, **asked), base)
        with pytest.raises(ConfigError, match="30 reference images are given"):
            draw(pipe, reference_images=make_images(30), **asked)
        with pytest.raises(ConfigError, match="another reference model"):
            draw(pipe, reference_images=group, **asked)
    with pytest.raises(ConfigError, match="does not contain 'a cow'"):
        draw(pipe, reference_images={"a cow": A}, reference_scale={"a cow": 0.0})
    assert encoded == []


def test_the_folder_of_a_reference_model_is_no_concept(tmp_path):
    pipe, model = make()
    folder = model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"a reference model, not a concept.*References"):
        pipe.load_custom(folder)


def test_a_copied_pipeline_reads_references():
    pipe, _ = make()
    expected = images(pipe, reference_images=A)
    copied = copy.deepcopy(pipe)
    assert np.array_equal(images(copied, reference_images=A), expected)
    copied.unload_custom()
    assert np.array_equal(images(pipe, reference_images=A), expected)


def test_forms_of_groups(tmp_path):
    pipe, model = make()
    expected = images(pipe, reference_images=A)
    group = References(model).encode(A)
    path = group.save(tmp_path / "a.refs.safetensors")
    for number, image in enumerate(A):
        (tmp_path / "folder").mkdir(exist_ok=True)
        image.save(tmp_path / "folder" / f"{number}.png")
    for form in (group, path, str(path), tmp_path / "folder", [np.array(image) for image in A]):
        assert close(images(pipe, reference_images=form), expected)
    mixed = images(pipe, ["a dog", "a cat"], reference_images=[path, B])
    assert close(mixed[1:], images(pipe, "a cat", reference_images=B))
    asked = images(pipe, reference_images=[(A[0], "colour"), A[1]])
    assert differ(asked, expected)


def test_output_reports_the_groups():
    pipe, _ = make()
    output = draw(pipe, ["a dog", "a cat"], reference_images=[A, B])
    first, second = output.references
    assert len(first) == len(second) == 2
    assert all(0.0 <= value <= 1.0 for value in (*first.agreement, *second.agreement))
    assert first.names == ("reference_images[0][0]", "reference_images[0][1]")
    assert not hasattr(draw(pipe), "references")
    assert "references: 4 tokens for up to 28 images (sd)" in str(pipe.custom)
    assert "agreement" in str(pipe.custom)


def test_an_outlier_agrees_least():
    pipe, model = make()
    model.encoder.final_layer.reference_tokens.data.mul_(0.1)
    same, other = make_images(1)[0], make_images(1, 7)[0]
    output = draw(pipe, reference_images=[same, same, other, same.copy()])
    agreement = output.references[0].agreement
    assert min(range(4), key=agreement.__getitem__) == 2


def test_prompts_are_read_by_models_that_read_them():
    pipe, model = make(includes_prompt=True)
    seen = []
    encode = model.encode
    model.unconditional_tokens()
    model.encode = lambda *args, **kwargs: seen.append(kwargs["prompt"]) or encode(*args, **kwargs)
    draw(pipe, ["a dog", "a cat"], reference_images=A)
    assert seen == ["a dog", "a cat"]
    group = References(model).encode(A, "a dog")
    with pytest.warns(UserWarning, match="was encoded with the prompt 'a dog'.* 'a cat'; and 1"):
        draw(pipe, ["a cat", "a dog", "a cup"], reference_images=group)


def test_a_group_of_another_model_is_refused():
    pipe, _ = make()
    other = tiny_reference_model(tiny_sd().components)
    other.encoder.final_layer.reference_tokens.data.add_(1.0)
    with pytest.raises(ConfigError, match="another reference model"):
        draw(pipe, reference_images=References(other).encode(A))


def test_a_group_of_the_rounded_model_is_refused():
    pipe, model = make()
    group = References(model).encode(A)
    model.encoder.to(torch.bfloat16)
    with pytest.raises(ConfigError, match="in a precision that rounds its weights"):
        draw(pipe, reference_images=group)


def test_models_for_other_denoisers_are_refused_and_nothing_changes():
    model = tiny_reference_model(tiny_sd().components)
    sdxl = tiny_sdxl()
    before = snapshot(sdxl.unet)
    with pytest.raises(PipelineError, match="family sd"):
        sdxl.load_custom(References(model))
    assert snapshot(sdxl.unet) == before
    for kind, fix in ((tiny_flux2_klein, "Flux2KleinPipeline"), (tiny_krea2, "use a model of")):
        with pytest.raises(PipelineError, match="family sd, and this one") as error:
            kind().load_custom(References(model))
        assert fix in error.value.fix
    sd = tiny_sd()
    sd.unet = diffusers.UNet2DConditionModel.from_config(
        dict(sd.unet.config) | {"block_out_channels": (8, 16)}
    )
    with pytest.raises(PipelineError, match="another denoiser"):
        sd.load_custom(References(model))


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ({"reference_images": A, "reference_scale": 3.0}, "invalid scale"),
        ({"reference_images": A, "reference_scale": float("nan")}, "invalid scale"),
        ({"reference_images": A, "reference_scale": [1.0, 1.0]}, "2 scales"),
        ({"reference_images": [A, B]}, "2 groups"),
        ({"reference_images": {}}, "no references"),
        ({"reference_images": A, "reference_scale": {}}, "is empty"),
        ({"reference_images": A, "reference_scale": {"up": {"block_9": 1.0}}}, "no up block"),
        ({"reference_images": A, "reference_scale": {"up.block_0.0": 1.0}}, "nor for a part"),
        ({"reference_images": A, "ip_adapter_image": A[0]}, "ip_adapter_image= cannot"),
        ({"reference_images": A, "prompt": []}, "list of prompts is empty"),
        ({"reference_images": {"a horse": A}}, "does not contain"),
        ({"reference_images": {"dog": A}}, "need their regions"),
        ({"reference_images": []}, "no reference images"),
        ({"reference_images": make_images(1) * 29}, "29 reference images"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*repeated reference image")
def test_bad_arguments_are_refused(call, problem):
    pipe, _ = make()
    before = snapshot(pipe.unet)
    with pytest.raises(ConfigError, match=problem):
        draw(pipe, **call)
    assert snapshot(pipe.unet) == before


def test_regions_have_their_own_groups():
    pipe, _ = make()
    prompt = "a dog and a cat on a beach"
    regions = {"dog": (0.0, 0.0, 0.5, 1.0), "cat": (0.5, 0.0, 1.0, 1.0)}
    call = {"regions": regions, "height": 32, "width": 64, "guidance_scale": 1.0}
    plain = images(pipe, prompt, **call)

    def with_groups(**groups):
        return images(pipe, prompt, reference_images=groups, **call)

    both, other = with_groups(dog=A, cat=B), with_groups(dog=C, cat=B)
    change = np.abs(both - other)[0].mean(axis=(0, 2))
    assert change[:16].mean() > 3 * change[48:].mean()
    assert differ(both, plain)
    one = with_groups(dog=A)
    change = np.abs(one - plain)[0].mean(axis=(0, 2))
    assert change[:16].mean() > 3 * change[48:].mean()
    zero = images(
        pipe, prompt, reference_images={"dog": A, "cat": B}, reference_scale={"cat": 0.0}, **call
    )
    assert close(zero, one)
    everything = images(pipe, prompt, reference_images=A, **call)
    assert differ(everything, one)


def test_concepts_and_avoid_work_together():
    pipe, model = make()
    pipe.load_custom(concept(pipe, "rex"), concept(pipe, "tom", index=1))
    prompt = "a photo of <rex> and <tom>"
    attached = images(pipe, prompt)
    referred = images(pipe, prompt, reference_images=A)
    assert differ(referred, attached)
    avoided = images(pipe, prompt, reference_images=A, avoid="fence")
    assert differ(avoided, referred)
    assert np.array_equal(images(pipe, prompt), attached)
    pipe.unload_custom()
    assert np.array_equal(images(pipe), images(tiny_sd()))
    assert pipe.load_custom(customize.References(model)).custom.reports["references"]


def test_prompt_embeddings_are_told_by_their_order():
    pipe, _ = make()
    expected = images(pipe, reference_images=A)
    embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    drawn = pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        reference_images=A,
        generator=[torch.Generator().manual_seed(1)],
        num_inference_steps=2,
        output_type="np",
        height=32,
        width=32,
    ).images
    assert close(drawn, expected)


def test_an_equal_negative_prompt_reads_the_black_image():
    pipe, _ = make()
    drawn = images(pipe, "", negative_prompt="", reference_images=A, guidance_scale=5.0)
    assert differ(
        drawn, images(pipe, "", negative_prompt="", reference_images=A, guidance_scale=1.0)
    )


def test_motion_models_read_references():
    pipe, _ = make(tiny_animatediff)
    call = {"num_frames": 3, "num_inference_steps": 2, "output_type": "np"}
    call |= {"height": 32, "width": 32, "prompt": PROMPT}

    def video(**more):
        return pipe(generator=torch.Generator().manual_seed(1), **call, **more).frames

    base = video()
    referred = video(reference_images=A)
    assert differ(referred, base)
    assert np.array_equal(video(), base)


def test_other_pipelines_of_the_same_models_read_references():
    pipe, _ = make()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)

    def change(**more):
        noise = torch.Generator().manual_seed(1)
        call = {"num_inference_steps": 4, "output_type": "np", "strength": 0.9}
        return other(prompt=PROMPT, image=image, generator=noise, **call, **more).images

    assert differ(change(reference_images=A), change())


def test_threads_wait_for_each_other():
    pipe, _ = make()
    expected = [images(pipe), images(pipe, reference_images=A), images(pipe, reference_images=B)]
    calls = [{}, {"reference_images": A}, {"reference_images": B}] * 2
    results: list[object] = [None] * len(calls)

    def work(number):
        results[number] = images(pipe, **calls[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, result in enumerate(results):
        assert np.array_equal(result, expected[number % 3])


def test_sliced_attention_reads_references():
    pipe, _ = make()
    expected = images(pipe, reference_images=A)
    pipe.enable_attention_slicing(1)
    before = snapshot(pipe.unet)
    assert close(images(pipe, reference_images=A), expected)
    assert snapshot(pipe.unet) == before
