"""together=: where concepts act, what stays as it was, and what is refused."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from customize.concepts.io.write_concept import save_concept
from customize.families import family_of
from customize.pipeline.model_guards import ADAPTER_NAME
from customize.pipeline.rank_channels import rank_channels
from customize.pipeline.state import get_state
from customize.stages import concept_routing
from customize.stages.concept_routing import ConceptRouter
from customize.stages.concept_words import RoutedPrompt, encode_routed, named_concepts
from tests.pipeline.making import assert_same, concept, everything, modular
from tests.recording import recorded_concepts
from tests.stages.together_making import (
    CLASSES,
    HALVES,
    LEFT,
    OTHER,
    PROMPT,
    alike,
    draw,
    makers,
    pair,
)
from tests.tiny import CLIP_LENGTH, tiny_sd, tiny_sdxl


def router(pipe, prompts, tokens, masks):
    """Route prompts in their own encoding with these masks."""
    family, state = family_of(pipe.components), get_state(pipe)
    with torch.no_grad():
        rows = family.encode_prompts(prompts)["prompt_embeds"]
    routed = [
        RoutedPrompt(
            prompt, named := named_concepts(prompt, state), each, each, (tokens,) * len(named)
        )
        for prompt, each in zip(prompts, rows, strict=True)
    ]
    channels = rank_channels(family, state)
    return ConceptRouter(family, channels, len(state.attached), routed, [masks])


def first_rows(pipe, *prompt, **call):
    """What the denoiser predicts in the first step, (rows, ...)."""
    outputs = []
    hook = pipe.unet.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    draw(pipe, *prompt, **call)
    hook.remove()
    return outputs[0]


@makers
def test_masks_of_one_are_the_plain_picture_bit_for_bit(make):
    pipe = pair(make)
    plain = draw(pipe, guidance_scale=1.0)
    everywhere = router(
        pipe, [PROMPT], tuple(range(CLIP_LENGTH)), lambda *grid: torch.ones(2, *grid)
    )
    with everywhere.attach():
        assert torch.equal(draw(pipe, guidance_scale=1.0), plain)
    nowhere = router(pipe, [PROMPT], (), lambda *grid: torch.zeros(2, *grid))
    with nowhere.attach():
        base = draw(pipe, guidance_scale=1.0)
    assert not torch.allclose(base, draw(pipe, guidance_scale=1.0), atol=1e-2)
    assert alike(base, draw(pair(make, weights=[{"unet": 0.0}] * 2), guidance_scale=1.0))


@makers
def test_ranks_act_on_their_own_tokens_and_in_their_own_area(make):
    pipe = pair(make)
    (state, family) = get_state(pipe), family_of(pipe.components)
    inputs: dict[str, torch.Tensor] = {}
    layers = {
        channel.module: channel
        for channel in rank_channels(family, state)
        if channel.component == "unet"
    }
    with ExitStack() as stack:
        for name, channel in layers.items():

            def note(module, args, name=name):
                inputs.setdefault(name, args[0])

            hook = channel.layer.lora_B[ADAPTER_NAME].register_forward_pre_hook(note)
            stack.callback(hook.remove)
        # The empty prompt is zeros in SDXL.
        draw(pipe, together=HALVES, num_inference_steps=1, negative_prompt="a red car")
    (routed,) = encode_routed(family, state, [], [PROMPT])
    assert routed.tokens == ((4, 5), (7, 8))
    attentions = set(family.cross_attention_layers())
    assert len(inputs) == len(layers)
    for name, activation in inputs.items():
        negative, positive = activation
        assert not bool(negative.any()), name
        attention, _, part = name.rpartition(".")
        if attention in attentions and part in ("to_k", "to_v"):
            for index, positions in enumerate(routed.tokens):
                ranks = [k for k, owner in enumerate(layers[name].owners) if owner == index]
                acts = (positive[:, ranks] != 0).any(1)
                assert acts.nonzero()[:, 0].tolist() == list(positions), name
        else:
            side = round(len(positive) ** 0.5)
            grid = positive.unflatten(0, (side, side))
            ranks = [k for k, owner in enumerate(layers[name].owners) if owner == 0]
            assert bool((grid[:, : side // 2, ranks] != 0).all()), name
            assert bool((grid[:, side // 2 :, ranks] == 0).all()), name


@makers
def test_positions_attend_to_a_concept_only_in_its_area(make):
    pipe, calls = pair(make), {}
    family = family_of(pipe.components)
    with ExitStack() as stack:
        for name in family.cross_attention_layers():

            def note(module, args, kwargs, output, name=name):
                calls[name] = partial(module, *args), kwargs

            module = pipe.unet.get_submodule(name)
            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        draw(pipe, together=HALVES, num_inference_steps=1)
    assert calls.keys() == set(family.cross_attention_layers())
    for name, (attention, kwargs) in calls.items():
        negative, positive = kwargs["attention_mask"]
        assert not bool(negative.any()) and bool(positive.any()), name
        for index, tokens in enumerate(((4, 5), (7, 8))):
            texts = kwargs["encoder_hidden_states"].clone()
            texts[1, list(tokens)] += 1.0
            with torch.no_grad():
                changed = attention(**kwargs | {"encoder_hidden_states": texts})
                change = changed - attention(**kwargs)
            side = round(len(positive) ** 0.5)
            halves = change[1].abs().amax(-1).unflatten(0, (side, side)).chunk(2, dim=1)
            assert float(halves[1 - index].max()) < 0.1 * float(halves[index].min()), name


@pytest.mark.filterwarnings("ignore:rex and tom were not found")  # in a single step
@makers
@pytest.mark.parametrize("areas", [True, HALVES], ids=["found", "given"])
def test_no_concept_acts_in_the_negative_branch(make, areas):
    call = {
        "num_inference_steps": 1,
        "guidance_scale": 5.0,
        "negative_prompt": "<tom> in a car",
    }
    pipe = pair(make, merge="average")  # the routed rows undo it
    base = pair(make, merge="average", weights=[{"unet": 0.0}] * 2)
    plain, routed = first_rows(pipe, **call), first_rows(pipe, together=areas, **call)
    without = first_rows(base, **call)
    assert alike(routed[0], without[0]) and not alike(plain[0], without[0])
    assert not torch.allclose(plain[1], routed[1], atol=1e-3)
    assert not torch.allclose(without[1], routed[1], atol=1e-3)


def test_in_the_negative_branch_of_other_prompts_concepts_act_as_before():
    pipe = pair()
    call = {"prompt": [PROMPT, "a photo of a car"], "seeds": (1, 2), "num_inference_steps": 1}
    plain, routed = first_rows(pipe, **call), first_rows(pipe, together=HALVES, **call)
    assert [torch.equal(*rows) for rows in zip(plain, routed, strict=True)] == [
        *(False, True),  # negative prompts
        *(False, True),
    ]


@makers
def test_a_batch_of_two_is_two_batches_of_one(make):
    pipe = pair(make)
    for prompts in ([PROMPT, OTHER], [PROMPT, "a photo of <rex>"], [PROMPT, PROMPT]):
        batch = draw(pipe, prompts, seeds=(1, 2), together=True)
        first = draw(pipe, prompts[0], seeds=(1,), together=True)
        second = draw(pipe, prompts[1], seeds=(2,), together=True)
        assert alike(batch, torch.cat([first, second]))
    several = draw(pipe, seeds=(1, 2), num_images_per_prompt=2, together=True)
    assert alike(several, torch.cat([draw(pipe, seeds=(k,), together=True) for k in (1, 2)]))


def test_sums_and_merges_are_routed(tmp_path, monkeypatch):
    pipe = tiny_sd()
    folders = recorded_concepts(pipe, tmp_path, monkeypatch)
    pictures = {}
    for merge in ("fusion", "sum", "average"):
        pipe.load_custom(*folders, merge=merge)
        pictures[merge] = draw(pipe, together=True, guidance_scale=1.0)
        assert not torch.allclose(pictures[merge], draw(pipe, guidance_scale=1.0), atol=1e-3)
        pipe.unload_custom()
    # Without guidance there is no negative prompt, which the merged text encoder reads.
    assert alike(pictures["fusion"], pictures["sum"])
    assert alike(pictures["average"], pictures["sum"])


@pytest.mark.parametrize("first", [True, False])
def test_layerwise_tokens_keep_their_layers(first):
    from tests.pipeline.making import attached

    pipe = attached(layers=True)
    pipe.load_custom(concept(pipe, "tom", index=1, class_word="cat"))
    prompt = PROMPT if first else OTHER
    image = draw(pipe, prompt, together=True)
    assert not torch.allclose(image, draw(pipe, prompt), atol=1e-3)
    (routed,) = encode_routed(family_of(pipe.components), get_state(pipe), [], [prompt])
    layers = len(family_of(pipe.components).cross_attention_layers())
    assert len(routed.rows) == layers * CLIP_LENGTH


def test_rows_of_a_trigger_do_not_depend_on_the_other_concept():
    pipe = pair(names=("rex", "tom", "kit"))
    family, state = family_of(pipe.components), get_state(pipe)
    channels = rank_channels(family, state)
    prompts = ["a photo of <tom> and <rex>", "a photo of <kit> and <rex>"]
    with_tom, with_kit = encode_routed(family, state, channels, prompts)
    plain = family.encode_prompts(prompts)["prompt_embeds"].detach()

    def rex(rows, routed):
        (at,) = (
            p for each, p in zip(routed.named, routed.tokens, strict=True) if each.name == "rex"
        )
        return rows[list(at)]

    # The classes differ, the other concepts' tokens and updates are away.
    near = (rex(with_tom.rows, with_tom) - rex(with_kit.rows, with_kit)).norm()
    assert float(near) < 0.5 * float((rex(plain[0], with_tom) - rex(plain[1], with_kit)).norm())


def test_masks_and_the_report_of_the_latest_call():
    pipe = pair()
    options = {"num_inference_steps": 6, "height": 32, "width": 48, "output_type": "latent"}
    output = pipe([PROMPT, "a cat"], together=True, return_masks=True, **options)
    first, second = output.masks
    assert list(first) == ["rex", "tom"] and second == {}
    assert all(isinstance(mask, Image.Image) and mask.size == (24, 16) for mask in first.values())
    report = pipe.custom.reports["together"]
    assert report.startswith("together: rex in ") and report.endswith("% of the picture")
    assert report in repr(pipe.custom)
    given = pipe(PROMPT, together=HALVES, return_masks=True, **options).masks[0]["rex"]
    assert given.getpixel((0, 0)) == 255 and given.getpixel((23, 15)) == 0
    pipe.unload_custom("tom")
    assert not pipe.custom.reports


def test_concepts_that_are_not_found_act_on_the_whole_picture(monkeypatch):
    pipe = pair()
    monkeypatch.setattr(concept_routing, "FOUND", 1.0)
    options = {"num_inference_steps": 4, "height": 32, "width": 32, "output_type": "latent"}
    with pytest.warns(UserWarning, match="rex and tom were not found in different parts"):
        output = pipe(PROMPT, together=True, return_masks=True, **options)
    assert output.masks == [{}]
    assert "rex and tom not told apart" in pipe.custom.reports["together"]


def test_three_concepts_and_one_that_no_prompt_names():
    pipe = pair(names=("rex", "tom", "kit"))
    three = draw(pipe, "a photo of <rex>, <tom> and <kit>", together=True)
    assert "kit in" in pipe.custom.reports["together"]
    assert bool(three.isfinite().all())
    draw(pipe, together=True)
    assert "kit" not in pipe.custom.reports["together"]


def test_library_concepts_avoid_and_img2img(tmp_path):
    pipe = tiny_sd()
    for index, name in enumerate(("rex", "tom", "kit")):
        save_concept(concept(pipe, name, index=index, class_word=CLASSES[name]), tmp_path / name)
    pipe.load_custom(library=tmp_path)
    draw(pipe, "a photo of <kit>")
    expected = draw(pair(), together=True)
    assert torch.equal(draw(pipe, together=True), expected)
    cleaned = draw(pipe, together=True, avoid="car")
    assert not torch.allclose(cleaned, expected, atol=1e-3)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    call = {"image": Image.new("RGB", (32, 32), "red"), "strength": 0.5, "num_inference_steps": 6}

    def again(**more):
        noise = torch.Generator().manual_seed(1)
        return other(PROMPT, generator=noise, output_type="latent", **call, **more).images

    assert not torch.allclose(again(together=False), again(together=True), atol=1e-3)


def test_modular_pipelines_are_routed():
    pipe = modular(pair(tiny_sdxl)).load_custom()
    assert not torch.allclose(draw(pipe, together=True), draw(pipe), atol=1e-3)
    swapped = {"<rex>": 1 - LEFT, "<tom>": LEFT}
    assert not torch.allclose(draw(pipe, together=swapped), draw(pipe, together=HALVES), atol=1e-3)


@pytest.mark.parametrize("how", ["wrapper", "in place", "blocks"])
def test_compiled_denoisers_run_uncompiled_and_are_compiled_again(how):
    pipe = pair(partial(tiny_sd, few_layers=True))
    plain, expected = draw(pipe), draw(pipe, together=True)
    unet, compilations = pipe.unet, []

    def backend(module, inputs):
        compilations.append(module)
        return module.forward

    if how == "wrapper":
        pipe.unet = torch.compile(unet, backend=backend)
    elif how == "in place":
        unet.compile(backend=backend)
    else:
        unet.mid_block.compile(backend=backend)
    assert alike(draw(pipe), plain)
    count = len(compilations)
    assert count
    with pytest.warns(UserWarning, match="without its compiled code"):
        assert torch.equal(draw(pipe, together=True), expected)
    assert pipe.custom.reports["together"].endswith("not compiled")
    assert alike(draw(pipe), plain)
    assert len(compilations) == count
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend=backend)
    draw(pipe)
    with pytest.warns(UserWarning, match="without its compiled code"):
        assert torch.equal(draw(pipe, together=True), expected)


@makers
def test_hooks_are_removed_after_a_call_and_an_error_during_it(make):
    pipe = pair(make)
    before, plain = everything(pipe), draw(pipe)

    def hooks():
        return [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks))
            for part in (pipe.unet, pipe.text_encoder)
            for name, module in part.named_modules()
        ]

    counts = hooks()
    draw(pipe, together=True)

    def fail(*args):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        draw(pipe, together=True, callback_on_step_end=fail)
    assert hooks() == counts
    assert_same(before, everything(pipe))
    assert torch.equal(draw(pipe), plain)


def test_calls_of_threads_and_of_callbacks_are_routed_by_themselves():
    pipe = pair()
    calls = [(PROMPT, True), (OTHER, True), (PROMPT, False)]
    alone = [draw(pipe, prompt, together=on) for prompt, on in calls]
    results = {}

    def job(number):
        prompt, on = calls[number]
        results[number] = draw(pipe, prompt, together=on)

    threads = [threading.Thread(target=job, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[k], expected) for k, expected in enumerate(alone))

    other = type(pipe)(
        **{**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)},
        requires_safety_checker=False,
    )
    inner = []

    def nested(_, number, t, values):
        if number == 1:
            inner.append(draw(other))
        return values

    assert torch.equal(draw(pipe, together=True, callback_on_step_end=nested), alone[0])
    assert torch.equal(inner[0], alone[2])
