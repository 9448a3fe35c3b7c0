"""Memory plans: estimates against measured sizes, chosen strategies and invalid sizes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_map_only

from customize.base.memory_plan import (
    GIB,
    RESERVED_BYTES,
    STRATEGIES,
    STRATEGIES_WITHOUT_OFFLOAD,
    ComponentSize,
    MemoryStrategy,
    PipelineSizes,
    choose_plan,
    estimate_peak_bytes,
    measure_components,
    parse_memory_size,
)
from customize.errors import ConfigError
from tests import true_sizes
from tests.peak import peak_bytes

MODELS = {
    name: getattr(true_sizes, name)
    for name in (
        "sd15",
        "sdxl",
        "sd35_large",
        "flux_dev",
        "qwen_image",
        "flux2_dev",
        "flux2_klein",
        "krea2",
        "qwen_image_21",
        "z_image",
    )
}
MIB = 2**20


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    family = MODELS[request.param]()
    return request.param, family, measure_components(family)


#: Millions of parameters, from the model cards.
PARAMETERS = {
    "sd15": {"unet": 860, "text_encoder": 123, "vae": 84},
    "sdxl": {"unet": 2567, "text_encoder": 123, "text_encoder_2": 695, "vae": 84},
    "sd35_large": {
        "transformer": 8057,
        "text_encoder": 124,
        "text_encoder_2": 695,
        "text_encoder_3": 4762,
        "vae": 84,
    },
    "flux_dev": {"transformer": 11901, "text_encoder": 123, "text_encoder_2": 4762, "vae": 84},
    "qwen_image": {"transformer": 20430, "text_encoder": 8292, "vae": 127},
    "flux2_dev": {"transformer": 32223, "text_encoder": 24011, "vae": 84},
    "flux2_klein": {"transformer": 3876, "text_encoder": 4022, "vae": 84},
    "krea2": {"transformer": 12820, "text_encoder": 4438, "vae": 127},
    "qwen_image_21": {"transformer": 7115, "text_encoder": 8767, "vae": 338},
    "z_image": {"transformer": 6155, "text_encoder": 4022, "vae": 84},
}


def test_weights_match_published_parameter_counts(model):
    name, family, sizes = model
    assert sizes.components.keys() == PARAMETERS[name].keys()
    for key, part in sizes.components.items():
        buffers = sum(buffer.nbytes for buffer in family.components[key].buffers())
        assert (part.weights - buffers) / 2e6 == pytest.approx(PARAMETERS[name][key], rel=0.01)
        assert part.other_weights + part.largest_layer <= part.weights
        # 4.5 of 16 bits, except in layers that are not linear.
        assert 0.28 * part.weights < part.nf4_weights <= part.weights
    # Half, except modulations, which diffusers does not cast because their names contain "norm".
    assert 0.5 < sizes.float8_denoiser / sizes.components[sizes.denoiser_key].weights < 0.7


#: Arguments of the denoiser in a pipeline that generates one image of the default resolution.
CALLS = {
    "sd15": lambda t: ((t(2, 4, 64, 64), t(2), t(2, 77, 768)), {}),
    "sdxl": lambda t: (
        (t(2, 4, 128, 128), t(2), t(2, 77, 2048)),
        {"added_cond_kwargs": {"text_embeds": t(2, 1280), "time_ids": t(2, 6)}},
    ),
    "sd35_large": lambda t: ((t(2, 16, 128, 128), t(2, 333, 4096), t(2, 2048), t(2)), {}),
    "flux_dev": lambda t: (
        (t(1, 4096, 64), t(1, 512, 4096), t(1, 768), t(1), t(4096, 3), t(512, 3), t(1)),
        {},
    ),
    "qwen_image": lambda t: (
        (t(1, 4096, 64), t(1, 512, 3584), None, t(1), [[(1, 64, 64)]]),
        {},
    ),
    "flux2_dev": lambda t: (
        (t(1, 4096, 128), t(1, 512, 15360), t(1), t(4096, 4), t(512, 4), t(1)),
        {},
    ),
    "flux2_klein": lambda t: (
        (t(1, 4096, 128), t(1, 512, 7680), t(1), t(4096, 4), t(512, 4)),
        {},
    ),
    "krea2": lambda t: (
        (t(1, 4096, 64), t(1, 512, 12, 2560), t(1), t(4608, 3), t(1, 512).bool()),
        {},
    ),
    "z_image": lambda t: (([t(16, 1, 128, 128)] * 2, t(2), [t(512, 2560)] * 2), {}),
}
#: Models with a separate call for the empty prompt; estimates assume one call.
APART = ("qwen_image", "flux2_klein", "krea2")


def empty(*shape):
    return torch.empty(*shape, device="meta", dtype=torch.bfloat16)


def test_denoiser_activations_are_a_tight_upper_bound(model):
    name, family, sizes = model
    denoiser = family.denoiser.eval()
    if name == "qwen_image_21":
        peak = peak_bytes(denoiser, lambda: first_step_of_qwen_image_21(denoiser))
    else:
        arguments, named = CALLS[name](empty)
        peak = peak_bytes(denoiser, lambda: denoiser(*arguments, **named))
    counted = sizes.components[sizes.denoiser_key].activations
    assert peak <= counted <= (3 if name in APART else 2) * peak


def first_step_of_qwen_image_21(denoiser):
    """Run both calls of the first step, which cache the keys and values of the prompts."""
    caches = [QwenImage21KVCache(len(denoiser.transformer_blocks)) for _ in range(2)]
    # Image positions determine shapes, so they are moved to the meta device after that.
    is_picture = (torch.arange(512 + 64 * 64 // 4) >= 512)[None]

    def move_to_meta(_, args, kwargs):
        args, kwargs = (
            tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), call_arguments)
            for call_arguments in (args, kwargs)
        )
        return args, kwargs

    readers = (*denoiser.transformer_blocks, denoiser.norm_out)
    hooks = [tensor.register_forward_pre_hook(move_to_meta, with_kwargs=True) for tensor in readers]
    for cache in caches:
        denoiser(
            hidden_states=empty(1, 4096, 64),
            encoder_hidden_states=empty(1, 512, 4096),
            timestep=empty(1),
            img_shapes=[[(1, 64, 64)]],
            img_mask=is_picture,
            kv_cache=cache,
            kv_cache_mode="extract",
        )
    for hook in hooks:
        hook.remove()


#: Configuration of an autoencoder and shape of the latents -> peaks of decoding, and of tiled
#: decoding. Some models have the same autoencoder.
_decoder_peaks: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}


def decoder_peaks(vae, shape):
    key = (str(vae.config), shape)
    if key not in _decoder_peaks:
        whole = peak_bytes(vae, lambda: vae.decode(empty(*shape)))
        vae.enable_tiling()
        _decoder_peaks[key] = whole, peak_bytes(vae, lambda: vae.decode(empty(*shape)))
        vae.disable_tiling()
    return _decoder_peaks[key]


def test_decoder_activations_are_a_tight_upper_bound(model):
    name, family, sizes = model
    side = {"sd15": 64, "qwen_image_21": 64}.get(name, 128)
    channels = {"sd15": 4, "sdxl": 4, "flux2_dev": 32, "flux2_klein": 32, "qwen_image_21": 64}
    frames = (1,) if name in ("qwen_image", "krea2", "qwen_image_21") else ()
    shape = (1, channels.get(name, 16), *frames, side, side)
    whole, tiled = decoder_peaks(family.vae.eval(), shape)
    assert whole <= sizes.components["vae"].activations <= 2 * whole
    assert tiled <= sizes.tiled_vae_activations <= 2 * tiled


def test_text_encoder_activations_are_a_tight_upper_bound(model):
    name, family, sizes = model
    # As in FLUX.2's pipelines; a mask of this shape is used unchanged.
    apart = {"use_cache": False, "attention_mask": empty(1, 1, 512, 512).bool()}
    named = {"output_hidden_states": True} | (apart if name.startswith("flux2") else {})
    for key, encoder in family.all_text_encoders.items():
        longest = getattr(encoder.config, "max_position_embeddings", 512)
        ids = torch.zeros(1, min(longest, 512), dtype=torch.long, device="meta")
        text = encoder.eval()
        measured = peak_bytes(text, lambda text=text, ids=ids: text(ids, **named))
        estimated = sizes.components[key].activations
        # The estimate is for 512 tokens, and CLIP reads 77.
        assert measured <= estimated <= 4 * measured * 512 / ids.shape[1]
        if ids.shape[1] == 512:
            assert estimated <= 2.5 * measured


#: Strategy of each model on a CUDA device, by memory size.
WHOLE, MODEL, GROUP = (
    MemoryStrategy(),
    MemoryStrategy("model"),
    MemoryStrategy("group", vae_tiling=True),
)
CAST = MemoryStrategy("model", vae_tiling=True, layerwise_casting=True)
PRESETS = {
    "sd15": (WHOLE, WHOLE, WHOLE, WHOLE),
    "sdxl": (MODEL, WHOLE, WHOLE, WHOLE),
    "sd35_large": (GROUP, CAST, CAST, MODEL),
    "flux_dev": (GROUP, GROUP, CAST, MODEL),
    "qwen_image": (GROUP, GROUP, GROUP, CAST),
    "flux2_dev": (GROUP, GROUP, GROUP, GROUP),
    "flux2_klein": (GROUP, MODEL, MODEL, WHOLE),
    "krea2": (GROUP, GROUP, CAST, CAST),
    "qwen_image_21": (GROUP, GROUP, GROUP, MODEL),
    "z_image": (GROUP, CAST, MODEL, WHOLE),
}


def test_strategies_and_peaks_on_a_cuda_device(model):
    name, _, sizes = model
    plans = [
        choose_plan(sizes, parse_memory_size(word), "cuda")
        for word in ("8GB", "12GB", "16GB", "24GB")
    ]
    assert tuple(plan.strategy for plan in plans) == PRESETS[name]
    assert all(plan.peak + RESERVED_BYTES <= plan.budget for plan in plans)


def test_quantization_is_preferred_to_group_offload(model):
    name, _, sizes = model
    chosen = choose_plan(sizes, parse_memory_size("8GB"), "cuda", quantizer=True)
    if name in ("sd35_large", "flux_dev", "flux2_klein", "qwen_image_21", "z_image"):
        assert chosen.strategy == MemoryStrategy("model", vae_tiling=True, quantize=True)
        assert (
            chosen.quantized_components[0] == "transformer"
            and len(chosen.quantized_components) == 2
        )
        assert "in 4 bits" in str(chosen)
    else:  # fits without quantization, or not even with it
        assert chosen == choose_plan(sizes, parse_memory_size("8GB"), "cuda")


def test_estimate_and_choice_by_hand():
    parts = {
        "unet": ComponentSize(
            weights=10 * GIB,
            largest_layer=MIB,
            other_weights=3 * MIB,
            activations=GIB,
            nf4_weights=3 * GIB,
        ),
        "text_encoder": ComponentSize(4 * GIB, 100 * MIB, 0, MIB, 2 * GIB),
        "vae": ComponentSize(GIB, MIB, 0, 2 * GIB, GIB),
    }
    sizes = PipelineSizes(parts, "unet", float8_denoiser=6 * GIB, tiled_vae_activations=GIB // 2)
    assert estimate_peak_bytes(sizes, MemoryStrategy()) == 15 * GIB + 2 * GIB
    assert estimate_peak_bytes(sizes, MemoryStrategy(vae_tiling=True)) == 15 * GIB + GIB
    assert estimate_peak_bytes(sizes, MemoryStrategy("model")) == 11 * GIB
    assert (
        estimate_peak_bytes(sizes, MemoryStrategy("model", layerwise_casting=True)) == 7 * GIB + MIB
    )
    assert (
        estimate_peak_bytes(sizes, MemoryStrategy("model"), ("unet",)) == 4 * GIB + MIB
    )  # the text encoder's, now
    assert estimate_peak_bytes(sizes, MemoryStrategy("model"), ("unet", "text_encoder")) == 4 * GIB
    assert estimate_peak_bytes(sizes, MemoryStrategy("group")) == 2 * GIB + 3 * MIB
    assert estimate_peak_bytes(sizes, MemoryStrategy("group", vae_tiling=True)) == GIB + 6 * MIB
    with pytest.raises(ConfigError) as caught:
        choose_plan(sizes, parse_memory_size("2GB"), "cuda")
    # 1 GiB and 6 MiB, plus the reserve of 1 GiB, rounded up to a tenth.
    assert "does not fit into 2 GB: it needs at least 2.1 GB" in str(caught.value)
    assert 'set memory="2.1GB"' in caught.value.fix
    assert choose_plan(sizes, parse_memory_size("2.1GB"), "cuda").strategy == MemoryStrategy(
        "group", vae_tiling=True
    )
    # Without an accelerator: 11 GiB, 1 GiB of activations, and a layer of 1 MiB.
    with pytest.raises(ConfigError, match=r"12\.1 GB, because there is no accelerator"):
        choose_plan(sizes, parse_memory_size("12GB"), "cpu")
    assert choose_plan(sizes, parse_memory_size("12.1GB"), "cpu").strategy == MemoryStrategy(
        vae_tiling=True, layerwise_casting=True
    )


bytes_ = st.integers(1, 40 * GIB)
parts_ = st.builds(
    lambda weights, share, loose, working, bits: ComponentSize(
        weights, int(weights * share), int(weights * loose), working, int(weights * bits)
    ),
    bytes_,
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    bytes_,
    st.floats(0.25, 1),
)


@given(
    st.fixed_dictionaries({"unet": parts_, "text_encoder": parts_, "vae": parts_}),
    st.floats(0.5, 1),
    st.floats(0.1, 1),
    st.integers(GIB, 100 * GIB),
    st.sampled_from(["cuda", "cpu"]),
    st.booleans(),
)
def test_chosen_plan_fits_or_the_suggested_size_does(parts, cast, tiled, amount, device, bits):
    sizes = PipelineSizes(
        parts, "unet", int(parts["unet"].weights * cast), int(parts["vae"].activations * tiled)
    )
    try:
        chosen = choose_plan(sizes, amount, device, bits)
    except ConfigError as refused:
        assert refused.fix is not None
        least = parse_memory_size(re.search(r'"([\d.]+GB)"', refused.fix)[1])
        assert least > amount
        chosen = choose_plan(sizes, least, device, bits)
        assert chosen.peak > amount - (RESERVED_BYTES if device == "cuda" else 0)
    assert chosen.peak + (RESERVED_BYTES if device == "cuda" else 0) <= chosen.budget
    assert chosen.peak == estimate_peak_bytes(sizes, chosen.strategy, chosen.quantized_components)
    ways = STRATEGIES if device == "cuda" else STRATEGIES_WITHOUT_OFFLOAD
    for faster in ways[: ways.index(chosen.strategy)]:
        if not faster.quantize and not (
            faster.layerwise_casting and sizes.float8_denoiser == parts["unet"].weights
        ):
            assert estimate_peak_bytes(sizes, faster) > chosen.budget - (
                RESERVED_BYTES if device == "cuda" else 0
            )


@pytest.mark.parametrize("word", ["8", "8 gb", "GB", "-8GB", "0GB", "eight GB", "8GiB", 8, None])
def test_invalid_memory_sizes_are_refused(word):
    with pytest.raises(ConfigError, match="invalid memory size"):
        parse_memory_size(word)


def test_memory_size_units():
    assert parse_memory_size("12GB") == 12 * GIB and parse_memory_size("1.5 GB") == 3 * GIB // 2


#: The rows of the guide's table.
TITLES = {
    "sd15": "Stable Diffusion 1.5",
    "sdxl": "SDXL",
    "sd35_large": "Stable Diffusion 3.5 large",
    "flux_dev": "FLUX.1 dev",
    "flux2_dev": "FLUX.2 dev",
    "flux2_klein": "FLUX.2 klein 4B",
    "qwen_image": "Qwen-Image",
    "qwen_image_21": "Qwen-Image 2.1",
    "z_image": "Z-Image",
    "krea2": "Krea 2",
}


def test_the_guide_has_the_plans_of_each_card(model):
    name, _, sizes = model
    cells = []
    for memory in ("8GB", "12GB", "16GB", "24GB"):
        strategy = choose_plan(sizes, parse_memory_size(memory), "cuda").strategy
        offload = {"none": "all", "model": "one model", "group": "layers"}[strategy.offload]
        cells.append("float8" if strategy.layerwise_casting else offload)
    guide = (Path(__file__).parents[2] / "customize/base/README.md").read_text()
    assert f"| {TITLES[name]} | {' | '.join(cells)} |" in guide
