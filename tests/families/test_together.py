"""together= on every family: which layers are routed, and what a call changes and leaves."""

from __future__ import annotations

import functools
import inspect
import re
import threading
from contextlib import ExitStack
from importlib.util import find_spec

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig

from customize.base.quantization import quantize_model
from customize.concepts.io.write_concept import save_concept
from customize.concepts.types import Lora, LoraInfo
from customize.core.lowrank import LowRank
from customize.core.objectives import shift_sigmas
from customize.core.routing import resize_masks
from customize.errors import PipelineError
from customize.families import family_of
from customize.pipeline.model_guards import ADAPTER_NAME
from customize.pipeline.rank_channels import rank_channels
from customize.pipeline.state import get_state
from customize.stages import concept_routing, routed_attentions
from customize.stages.concept_routing import ConceptRouter
from customize.stages.concept_words import RoutedPrompt, encode_routed, named_concepts
from tests.base.test_placement import offload_groups, offload_models
from tests.families.test_families import PIPELINES, SHAPES
from tests.pipeline.making import concept, modular
from tests.stages.together_making import HALVES, LEFT, OTHER, PROMPT, alike
from tests.tiny import CLIP_LENGTH, drawn, short_prompts

UNSUPPORTED = ("qwen_image_21", "ltx2")
# Stable Diffusion and SDXL are in tests/stages/test_together.py.
NAMES = [name for name in PIPELINES if not name.startswith((*UNSUPPORTED, "sd-e", "sd-v", "sdxl"))]
variants = pytest.mark.parametrize("name", NAMES)
# One model of each architecture.
TWINS = ("flux-schnell", "flux2-distilled", "krea2-distilled", "wan-2.2-5b")
families = pytest.mark.parametrize("name", [name for name in NAMES if name not in TWINS])
SOME = ("sd3", "flux-dev", "flux2-klein", "qwen_image", "z_image", "krea2", "wan-2.2-14b")
some = pytest.mark.parametrize("name", SOME)

# Keys of the prompt in an attention's keys: all of them, or before or behind those of the picture.
ORDER = {"sd": "all", "wan": "all", "sd3": "last", "z_image": "last"}
CAUSAL = ("flux2", "flux3", "qwen_image", "z_image", "krea2")


@functools.cache
def pair(name):
    pipe = PIPELINES[name]()
    return pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1, class_word="cat"))


def family_and_state(pipe):
    return family_of(pipe.components, pipe.config), get_state(pipe)


def draw(pipe, prompt=PROMPT, seed=1, **call):
    noise = [torch.Generator().manual_seed(seed + k) for k in range(_count(prompt))]
    size = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent"}
    return drawn(pipe, prompt, generator=noise if len(noise) > 1 else noise[0], **size | call)


def _count(prompt):
    return 1 if isinstance(prompt, str) else len(prompt)


def router(pipe, prompt, tokens, mask):
    """Route a prompt in its own encoding: every concept at all tokens or none, with this mask."""
    family, state = family_and_state(pipe)
    (routed,) = encode_routed(family, state, [], [prompt])
    rows = routed.encoded
    positions = tuple(range(len(rows))) if tokens else ()
    named = named_concepts(prompt, state)
    routed = RoutedPrompt(prompt, named, rows, rows, (positions,) * len(named))
    channels = rank_channels(family, state)
    return ConceptRouter(
        family,
        channels,
        len(state.attached),
        [routed],
        [lambda *grid: torch.full((len(named), *grid), float(mask))],
    )


def encoded(pipe, prompt):
    family, state = family_and_state(pipe)
    return encode_routed(family, state, [], [prompt])[0].encoded


@variants
def test_masks_of_one_are_the_plain_picture_bit_for_bit_and_of_zero_the_base(name):
    pipe = pair(name)
    prompt = PROMPT
    while name == "z_image" and len(encoded(pipe, prompt)) % 32:  # no concept acts on padding
        prompt += " a"
    # Without the row of the empty prompt, where no concept acts.
    free = {} if name.startswith("flux3") else {"guidance_scale": 0.0}
    plain = draw(pipe, prompt, **free)
    with router(pipe, prompt, True, 1).attach():
        assert torch.equal(draw(pipe, prompt, **free), plain) == bool(free)
    with router(pipe, prompt, False, 0).attach():
        base = draw(pipe, prompt, **free)
    if not free:
        assert not torch.allclose(base, plain, atol=1e-3)
        return
    assert not torch.allclose(base, draw(pipe, prompt, **free), atol=1e-3)
    assert alike(base, draw(without_denoisers(name), prompt, **free))


@families
def test_every_adapted_layer_is_routed_or_refused_by_name(name):
    pipe = PIPELINES[name]()
    family = family_of(pipe.components, pipe.config)
    generator = torch.Generator().manual_seed(3)

    def lora(modules, name="mine"):
        updates = {
            module: LowRank(
                0.1 * torch.randn(out, 2, generator=generator),
                torch.randn(2, width, generator=generator),
            )
            for module, (out, width) in modules.items()
        }
        info = LoraInfo(name, family.name, "", 2, trigger_words="red hat")
        return Lora(info, {family.denoiser_key: updates})

    for key in family.denoisers:
        kinds = family.layer_tokens(key)
        assert set(family.adapter_targets(key)) <= set(kinds)
    # All routed layers at once, the feed-forward ones and embedders too.
    layers = family.layers(family.denoiser_key)
    kinds = family.layer_tokens(family.denoiser_key)
    prompt = "a photo of <rex> and a red hat"
    pipe.load_custom(concept(pipe), lora({module: layers[module] for module in kinds}))
    half = draw(pipe, prompt, together={"rex": torch.ones(2, 2), "mine": LEFT})
    whole = draw(pipe, prompt, together={"rex": torch.ones(2, 2), "mine": torch.ones(2, 2)})
    assert bool(half.isfinite().all()) and not torch.allclose(half, whole, atol=1e-4)
    pipe.unload_custom("mine")
    rest = [module for module in layers if module not in kinds]
    assert rest
    for module in rest[:: max(1, len(rest) // 4)]:
        pipe.load_custom(lora({module: layers[module]}))
        with pytest.raises(PipelineError, match=re.escape(module)):
            draw(pipe, prompt, together=True)
        pipe.unload_custom("mine")


@families
def test_ranks_act_on_their_own_tokens_and_in_their_own_area(name):
    pipe = pair(name)
    family, state = family_and_state(pipe)
    kinds = family.layer_tokens(family.denoiser_key)
    channels = {
        channel.module: channel
        for channel in rank_channels(family, state)
        if channel.component == family.denoiser_key
    }
    inputs: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for module, channel in channels.items():

            def note(_, args, module=module):
                inputs.setdefault(module, args[0])

            up = channel.layer.lora_B[ADAPTER_NAME]
            stack.callback(up.register_forward_pre_hook(note).remove)
        draw(pipe, together=HALVES, num_inference_steps=2)
    (routed,) = encode_routed(family, state, [], [PROMPT])
    assert set(inputs) == set(channels)
    for module, activation in inputs.items():
        owners = channels[module].owners
        for index, tokens in enumerate(routed.tokens):
            ranks = [k for k, owner in enumerate(owners) if owner == index]
            acts = (activation[..., ranks] != 0).any(-1)
            if kinds[module] == "text_rows":
                acts = acts.any(-1).reshape(-1, len(routed.encoded))
            row = _routed_row(acts)
            is_left = index == 0
            if kinds[module] in ("text", "text_rows"):
                assert row.nonzero()[:, 0].tolist() == list(tokens), module
                continue
            count = {"sd": len(row), "flux3": 256}.get(family.name, 64)
            if kinds[module] == "picture":
                _check_side(row[:count], is_left, module)
            else:
                is_last = ORDER.get(family.name) == "last"
                rest = row[count:] if is_last else row[: len(row) - count]
                _check_side(row[:count] if is_last else row[-count:], is_left, module)
                assert rest.nonzero()[:, 0].tolist() == list(tokens), module


def _routed_row(acts):
    """The row of (entries, positions) where concepts act: not that of a negative prompt."""
    return max(acts, key=lambda row: int(row.sum()))


def _check_side(acts, is_left, module):
    side = round(len(acts) ** 0.5)
    grid = acts.reshape(side, side)
    if not is_left:
        grid = grid.flip(-1)
    assert bool(grid[:, : side // 2].all()), module
    assert not bool(grid[:, side // 2 :].any()), module


@variants
def test_maps_are_what_positions_attend_to_in_the_layer(name, monkeypatch):
    pipe = pair(name)
    family, _ = family_and_state(pipe)
    attended: dict[str, torch.Tensor] = {}
    calls: list[tuple] = []
    true: dict[str, tuple] = {}
    compute = routed_attentions.attended_tokens
    attention_function = torch.nn.functional.scaled_dot_product_attention

    def note(family, call, attention, *args):
        result = compute(family, call, attention, *args)
        if attention.name not in attended:
            attended[attention.name] = result
            row = next(iter(call.pictures))
            query, key, mask = calls[-1]
            true[attention.name] = (query[row], key[row], None if mask is None else mask[row])
        return result

    def record(query, key, value, attn_mask=None, **kwargs):
        calls.append((query, key, attn_mask))
        return attention_function(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(routed_attentions, "attended_tokens", note)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    draw(pipe, together=True)
    assert set(attended) == {a.name for a in family.text_attentions(family.denoiser_key)}
    order = ORDER.get(family.name, "first")
    for module, result in attended.items():
        query, key, mask = true[module]  # (heads, tokens, width)
        texts = result.shape[-1]
        positions = result.shape[1]
        if order == "last":
            query, key = query[:, :positions], key[:, positions : positions + texts]
        elif order == "first":
            query, key = query[:, -positions:], key[:, :texts]
        scores = query.float() @ key.float().mT / query.shape[-1] ** 0.5
        if mask is not None:
            mask = mask[..., :texts]
            is_boolean = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask, -torch.inf) if is_boolean else scores + mask
        assert torch.allclose(result[0], scores.softmax(-1).mean(0), atol=1e-5), module


@families
def test_rows_of_words_are_where_another_word_changes_the_encoded_prompt(name):
    pipe = pair(name)
    family, state = family_and_state(pipe)
    other = PROMPT.replace("tom", "tam")
    (routed,) = encode_routed(family, state, [], [PROMPT])
    tokens = routed.tokens[1]
    plain, changed = (
        family.denoiser_kwargs(family.encode_prompts([text])) for text in (PROMPT, other)
    )
    plain, changed = (next(iter(kwargs.values()))[0] for kwargs in (plain, changed))
    if len(plain) != len(changed):  # a learned trigger has other tokens than a plain word
        changed = changed[: len(plain)]
        plain = plain[: len(changed)]
    change = (plain - changed).flatten(1).norm(dim=1)
    if family.name in CAUSAL:
        assert int(change.nonzero()[0]) in tokens
    elif family.prompt_text(PROMPT) is not None:
        first = CLIP_LENGTH if family.has_clip_rows else 0
        assert first + int(change[first:].argmax()) in tokens


@variants
def test_levels_of_the_layout_are_those_before_the_shift(name):
    pipe = pair(name)
    family, _ = family_and_state(pipe)
    denoiser = pipe.components[family.denoiser_key]
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
    levels = []

    def note(module, args, kwargs):
        arguments = dict(zip(names, args, strict=False)) | kwargs
        levels.append((family.noise_level(arguments), family.schedule_level(arguments)))

    hook = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    draw(pipe)
    hook.remove()
    assert levels == sorted(levels, reverse=True) and levels[0][1] > 0.8
    if not hasattr(family, "_shift"):
        assert all(noise == schedule for noise, schedule in levels)
        return
    shift = family._shift(SHAPES.get(family.name, (4, 16, 16)))
    for noise, schedule in levels:
        assert float(shift_sigmas(torch.tensor(schedule), shift)) == pytest.approx(noise, abs=1e-5)


@variants
def test_no_concept_acts_in_rows_of_other_prompts_such_as_the_negative_one(name):
    pipe = pair(name)
    family, _ = family_and_state(pipe)
    base = without_denoisers(name)
    plain, routed, off = (
        first_rows(*drawing)
        for drawing in (
            (pipe, family, {"together": False}),
            (pipe, family, {"together": HALVES}),
            (base, family, {"together": False}),
        )
    )
    (row,) = [k for k, rows in enumerate(zip(routed, off, strict=True)) if not alike(*rows)]
    assert not torch.equal(routed[row], plain[row])
    rest = [k for k in range(len(plain)) if k != row]
    assert not any(torch.equal(plain[k], off[k]) for k in rest)


def first_rows(pipe, family, call):
    """What the denoiser predicts in the first of two steps, for each row."""
    outputs = []
    hook = pipe.components[family.denoiser_key].register_forward_hook(
        lambda module, args, kwargs, output: outputs.extend(output[0]), with_kwargs=True
    )
    draw(pipe, num_inference_steps=2, **call)
    hook.remove()
    return outputs[: len(outputs) // 2]


@functools.cache
def without_denoisers(name):
    """The pipeline, and concepts that change its text encoders alone."""
    pipe = PIPELINES[name]()
    off = dict.fromkeys(family_of(pipe.components, pipe.config).denoisers, 0.0)
    return pipe.load_custom(
        concept(pipe), concept(pipe, "tom", index=1, class_word="cat"), weights=[off, off]
    )


@families
def test_a_batch_of_two_is_two_batches_of_one(name):
    pipe = pair(name)
    if name.startswith("flux3"):
        pytest.skip("the pipeline takes one prompt at a time")
    batch = draw(pipe, [PROMPT, OTHER], together=True)
    single = [draw(pipe, text, seed=1 + k, together=True) for k, text in enumerate((PROMPT, OTHER))]
    assert alike(batch, torch.cat(single))


@families
def test_concepts_in_the_weights_are_routed_as_beside_them(name):
    pipe, fused = pair(name), PIPELINES[name]()
    fused.load_custom(concept(fused), fuse=True)
    expected = draw(pipe, together=HALVES)
    fused.load_custom(concept(fused, "tom", index=1, class_word="cat"))
    assert alike(draw(fused, together=HALVES), expected)
    fused.unload_custom("tom")
    fused.load_custom(concept(fused, "tom", index=1, class_word="cat"), fuse=True)
    assert alike(draw(fused, together=HALVES), expected)
    drawing = fused, family_and_state(fused)[0], {"together": False}
    plain = first_rows(*drawing)
    with router(fused, PROMPT, True, 1).attach():
        everywhere = first_rows(*drawing)
    same = [torch.equal(*rows) for rows in zip(plain, everywhere, strict=True)]
    assert same.count(True) == 1 or name == "z_image"  # whose padding has no ranks


@some
def test_masks_that_were_found_act_as_those_that_are_given(name):
    pipe = pair(name)
    family, state = family_and_state(pipe)
    routed = encode_routed(family, state, [], [PROMPT])
    masks = torch.stack([LEFT, 1 - LEFT])[:, None]
    answers = []
    for given in ([lambda *grid: resize_masks(masks[:, 0], *grid)], None):
        router = ConceptRouter(family, rank_channels(family, state), 2, routed, given)
        if given is None:
            found = concept_routing.RoutedPicture(routed[0], masks, 1, masks, 1)
            router.pictures[0] = found
        with torch.no_grad(), router.attach():
            conditions = family.encode_prompts([PROMPT])
            shape = SHAPES.get(family.name, (4, 16, 16))
            noisy = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
            t = family.timesteps(torch.tensor([0.3]), shape)
            answers.append(family.predict(noisy, t, conditions))
    assert alike(*answers)


@families
def test_prompts_of_other_lengths_are_recognized(name):
    pipe = pair(name)
    other = dict.fromkeys(short_prompts(pipe), 320)
    if not other or name.startswith("cogvideox"):
        pytest.skip("the pipeline or its model has one length")
    plain, areas = draw(pipe, **other), {"<rex>": LEFT, "tom": 1 - LEFT}
    assert not torch.allclose(draw(pipe, together=areas, **other), plain, atol=1e-3)
    assert not torch.allclose(draw(pipe, regions={"<rex>": LEFT}, **other), plain, atol=1e-3)


@families
def test_the_order_of_adapters_does_not_matter(name):
    pipe = pair(name)
    other = PIPELINES[name]()
    other.load_custom(concept(other, "tom", index=1, class_word="cat"), concept(other))
    assert alike(draw(other, together=HALVES), draw(pipe, together=HALVES))


@families
def test_sizes_of_other_shapes_masks_and_the_report(name):
    pipe = pair(name)
    family, _ = family_and_state(pipe)
    swapped = {"<rex>": 1 - LEFT, "<tom>": LEFT}
    wide = draw(pipe, together=HALVES, width=64)
    assert not torch.allclose(draw(pipe, together=swapped, width=64), wide, atol=1e-3)
    assert bool(draw(pipe, together=True, width=64).isfinite().all())
    assert pipe.custom.reports["together"].startswith("together: rex in ")
    if hasattr(pipe, "blocks"):
        return
    call = {"num_inference_steps": 2, "height": 32, "width": 64, "output_type": "latent"}
    frames = {"num_frames": 5} if family.output == "frames" else {}
    output = pipe(prompt=PROMPT, together=HALVES, return_masks=True, **call, **frames)
    mask = output.masks[0]["rex"]
    if frames:
        pipe(prompt=PROMPT, together=True, **call, **frames)
        assert " % of the picture" in pipe.custom.reports["together"]
        assert isinstance(mask, list) and len(mask) > 1
        mask = mask[0]
    assert mask.getpixel((0, 0)) == 255 and mask.getpixel((mask.width - 1, mask.height - 1)) == 0


@families
def test_encoders_without_learned_tokens_carry_nothing_that_a_concept_learned(name):
    other, pipe = PIPELINES[name](), pair(name)
    other.load_custom(concept(other, index=2), concept(other, "tom", index=3))
    rows, others = (
        family_of(each.components, each.config).encode_prompts([PROMPT])["prompt_embeds"]
        for each in (pipe, other)
    )
    family, _ = family_and_state(pipe)
    first = CLIP_LENGTH if family.has_clip_rows else 0
    assert torch.equal(rows[:, first:], others[:, first:])
    assert not first or not torch.equal(rows[:, :first], others[:, :first])


@some
@pytest.mark.parametrize("offload", [offload_models, offload_groups])
def test_offloaded_models_give_the_same_picture(name, offload):
    pipe = PIPELINES[name]()
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1, class_word="cat"))
    offload(pipe)
    assert torch.equal(draw(pipe, together=True), draw(pair(name), together=True))


@some
def test_layers_of_the_denoiser_may_be_offloaded_one_by_one(name):
    pipe = PIPELINES[name]()
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1, class_word="cat"))
    family, _ = family_and_state(pipe)
    for denoiser in family.denoisers.values():
        cpu_offload(denoiser, torch.device("cpu"))
    assert torch.equal(draw(pipe, together=True), draw(pair(name), together=True))


@some
def test_hooks_are_removed_after_a_call_and_an_error_during_it(name):
    pipe = pair(name)
    family, _ = family_and_state(pipe)
    plain = draw(pipe)

    def hooks():
        return [
            (len(module._forward_hooks), len(module._forward_pre_hooks))
            for denoiser in family.denoisers.values()
            for module in denoiser.modules()
        ]

    def fail(*args):
        raise RuntimeError("stop")

    counts = hooks()
    with pytest.raises(RuntimeError, match="stop"):
        draw(pipe, together=True, callback_on_step_end=fail)
    assert hooks() == counts
    assert torch.equal(draw(pipe), plain)


def test_denoisers_with_an_enabled_cache_are_refused():
    pipe = PIPELINES["flux-dev"]()
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(PipelineError, match="caches outputs from step to step"):
        draw(pipe, together=True)


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "qwen_image", "z_image", "flux2-klein"])
def test_modular_pipelines_draw_the_same_picture(name):
    pipe = pair(name)
    other = modular(pipe).load_custom()
    options = {"seed": 1, "num_inference_steps": 3}
    assert not torch.allclose(draw(other, together=True, **options), draw(other, **options))
    swapped = {"<rex>": 1 - LEFT, "<tom>": LEFT}
    first, second = (draw(other, together=areas, **options) for areas in (HALVES, swapped))
    assert not torch.allclose(first, second, atol=1e-3)


@some
def test_several_pictures_a_prompt_and_threads(name):
    pipe = pair(name)
    if name not in ("qwen_image", "wan-2.2-14b"):
        noise = [torch.Generator().manual_seed(k) for k in (1, 2)]
        call = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent"}
        several = drawn(
            pipe, PROMPT, generator=noise, num_images_per_prompt=2, together=True, **call
        )
        assert alike(several, torch.cat([draw(pipe, seed=k, together=True) for k in (1, 2)]))
    calls = [(PROMPT, True), (OTHER, True), (PROMPT, None)]
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


@some
def test_avoided_content_library_routing_and_half_precision(name, tmp_path):
    pipe = PIPELINES[name]()
    for index, (word, noun) in enumerate((("rex", "dog"), ("tom", "cat"), ("kit", "car"))):
        save_concept(concept(pipe, word, index=index, class_word=noun), tmp_path / word)
    pipe.load_custom(library=tmp_path)
    draw(pipe, "a photo of <kit>")
    expected = draw(pair(name), together=True)
    assert alike(draw(pipe, together=True), expected)
    cleaned = draw(pipe, together=True, avoid="car")
    assert bool(cleaned.isfinite().all())
    assert not torch.equal(cleaned, draw(pipe, together=True))
    half = draw(pipe.to(torch.bfloat16), together=HALVES)
    assert bool(half.isfinite().all())
    full = draw(pair(name), together=HALVES)
    assert float((half.float() - full).norm() / full.norm()) < 0.2


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "qwen_image"])
def test_no_concept_acts_in_the_negative_call_of_true_guidance(name):
    pipe, base = pair(name), without_denoisers(name)
    family, _ = family_and_state(pipe)
    negative = {"true_cfg_scale": 3.0, "negative_prompt": "<tom> in a car"}
    plain, routed, off = (
        first_rows(*drawing)
        for drawing in (
            (pipe, family, negative),
            (pipe, family, negative | {"together": HALVES}),
            (base, family, negative),
        )
    )
    assert not torch.allclose(plain[0], routed[0], atol=1e-3)
    assert alike(routed[1], off[1]) and not alike(plain[1], off[1])


def test_quantized_layers_are_routed():
    quantizers = ["torchao_int8"] if find_spec("torchao") else []
    quantizers += ["nf4"] if find_spec("bitsandbytes") else []
    if not quantizers:
        pytest.skip("an extra")
    for quantizer in quantizers:
        pipe = PIPELINES["flux-dev"]()
        quantize_model(pipe.transformer, quantizer, torch.float32, torch.device("cpu"))
        pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1, class_word="cat"))
        plain = draw(pipe)
        with router(pipe, PROMPT, True, 1).attach():
            assert torch.equal(draw(pipe), plain)
        assert not torch.allclose(draw(pipe, together=HALVES), plain, atol=1e-3)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_the_pooled_prompt_is_read_with_each_update_at_its_own_tokens(name, long):
    pipe = pair(name)
    family, state = family_and_state(pipe)
    prompt = "<rex> " + "a red " * 3 + "cat and <tom>"
    if long and name == "flux-dev":  # T5 reads more than CLIP
        prompt = "<rex> " + "a red " * 12 + "cat and <tom>"
    channels = [c for c in rank_channels(family, state) if c.component == "text_encoder"]
    inputs: dict[str, list[torch.Tensor]] = {}
    with ExitStack() as stack:
        for channel in channels:

            def note(_, args, module=channel.module):
                # The whole prompt without masks, with them, then other texts.
                inputs.setdefault(module, []).append(args[0])

            up = channel.layer.lora_B[ADAPTER_NAME]
            stack.callback(up.register_forward_pre_hook(note).remove)
        (routed,) = encode_routed(family, state, rank_channels(family, state), [prompt])
    assert routed.pooled is not None and inputs
    ids = family.token_dictionaries()[0].tokenizer(prompt, add_special_tokens=False).input_ids
    positions = {"rex": [1, 2], "tom": [1 + k for k in range(len(ids) - 2, len(ids))]}
    for channel in channels:
        middle = inputs[channel.module][1][0]
        for index, at in enumerate(positions.values()):
            ranks = [k for k, owner in enumerate(channel.owners) if owner == index]
            expected = [k for k in at if k < CLIP_LENGTH]
            assert (middle[:, ranks] != 0).any(1).nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_families_that_read_the_prompt_in_another_way_are_refused(name):
    pipe = PIPELINES[name]()
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1))
    with pytest.raises(PipelineError, match=f"family {name} does not support together="):
        draw(pipe, together=True)
