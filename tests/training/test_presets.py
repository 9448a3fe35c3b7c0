"""scripts/presets: settings by model and card, whose need of memory is counted here.

By arithmetic and by what a step allocates on the meta device; nothing is measured on a card.
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from customize.base.memory_plan import (
    GIB,
    NF4_BITS,
    RESERVED_BYTES,
    ComponentSize,
    measure_components,
    parse_memory_size,
)
from customize.cli import main
from customize.concepts.adapter import attach_new_adapter
from customize.concepts.io.read_concept import load_concept
from customize.families import Family
from customize.training.config import TrainConfig, load_config
from tests import true_sizes
from tests.base.test_memory_plan import CALLS, empty
from tests.base.test_quantization import kind_param
from tests.peak import peak_bytes
from tests.tiny import tiny_sdxl
from tests.training.runs import make_pictures

PRESETS = {
    path.stem: path
    for path in sorted((Path(__file__).parents[2] / "scripts/presets").glob("*.yaml"))
}
#: Name in the file of a preset -> model in tests/true_sizes.
MODELS = {
    "sd15": "sd15",
    "sdxl": "sdxl",
    "sd35-large": "sd35_large",
    "flux": "flux_dev",
    "flux2-klein": "flux2_klein",
    "z-image": "z_image",
    "krea2": "krea2",
    "qwen-image": "qwen_image",
}
#: Number of images in a call of CALLS, and number of values of an encoded prompt.
IN_A_CALL = {"sd15": 2, "sdxl": 2, "sd35_large": 2, "z_image": 2}
PROMPTS = {
    "sd15": 77 * 768,
    "sdxl": 77 * 2048,
    "sd35_large": 333 * 4096,
    "flux_dev": 512 * 4096,
    "flux2_klein": 512 * 7680,
    "z_image": 512 * 2560,
    "krea2": 512 * 12 * 2560,
    "qwen_image": 512 * 3584,
}
#: Number of encoded images on the device, with different captions.
PICTURES = 20
NEEDED: dict[str, Any] = {
    "base": "base",
    "images": "photos",
    "output": "out",
    "name": "rex",
    "class_word": "dog",
}


def configured(name: str) -> tuple[str, int, TrainConfig]:
    """Return the model, the card's memory in bytes and the settings of a preset."""
    model, _, card = name.rpartition("-")
    return MODELS[model], parse_memory_size(card.upper()), load_config(PRESETS[name], **NEEDED)


@cache
def model(name: str) -> Family:
    family: Family = getattr(true_sizes, name)()
    family.denoiser.requires_grad_(False)
    return family


@cache
def activations(name: str, rank: int, checkpointing: bool) -> int:
    """Return the peak bytes of a forward and backward pass of IN_A_CALL images.

    Under autocast, the adapter computes in the model's precision.
    """
    family = model(name)
    denoiser = family.denoiser
    adapter = attach_new_adapter(
        family, method="lora", rank=rank, components=[family.denoiser_key], dtype=torch.bfloat16
    )
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    arguments, named = CALLS[name](empty)

    def call() -> torch.Tensor:
        answer = denoiser(*arguments, **named)[0]
        return answer if torch.is_tensor(answer) else torch.stack(answer)

    try:
        return peak_bytes(denoiser, call, backward=True)
    finally:
        denoiser.disable_gradient_checkpointing()
        adapter.remove()


def stored_bytes(part: ComponentSize, kind: str) -> int:
    """Return the bytes of a denoiser's weights; if quantized, with one dequantized layer."""
    if kind == "none":
        return part.weights
    linear = (part.weights - part.nf4_weights) / (1 - NF4_BITS / 16)
    bits = {"nf4": NF4_BITS, "int8": 8}[kind]
    return part.weights - int(linear * (1 - bits / 16)) + part.largest_layer


def needed(name: str, config: TrainConfig) -> dict[str, int]:
    """Return the bytes of each consecutive part of a run."""
    family = model(name)
    parts = measure_components(family).components
    assert config.mixed_precision == "bf16" and config.resolution in (None, 512, 1024)
    assert (config.resolution or family.default_resolution) == family.default_resolution
    assert config.cache_latents and config.prior_weight == 0

    # Factors in float32; trained ones have a gradient and AdamW's two moments.
    adapted = [family.denoiser_key, *(family.text_encoders if config.train_text_encoder else ())]
    shapes = [shape for key in adapted for shape in family.adapter_targets(key).values()]
    ups = sum(4 * config.rank * out for out, _ in shapes)
    downs = sum(4 * config.rank * width for _, width in shapes)
    adapter = 4 * ups + downs * (1 if config.method == "orthogonal" else 4)

    side = family.default_resolution // 8
    latents = PICTURES * 2 * 4 * 16 * side**2 * (1 + config.flip)
    prompts = (PICTURES + 1) * 2 * PROMPTS[name]
    encoders = {key: parts[key] for key in family.all_text_encoders}
    live = {key: parts[key] for key in family.text_encoders}
    calls = -(-config.batch_size // IN_A_CALL.get(name, 1))
    step = calls * activations(name, config.rank, config.gradient_checkpointing)
    return {
        # The autoencoder in float32; encoding needs no more memory than decoding.
        "pictures": 2 * parts["vae"].weights + 4 * family.decoder_activations() + latents,
        "prompts": sum(encoder.weights for encoder in encoders.values())
        + max(encoder.activations for encoder in encoders.values())
        + latents
        + prompts,
        "steps": stored_bytes(parts[family.denoiser_key], config.quantize)
        + sum(
            encoder.weights + config.batch_size * encoder.activations for encoder in live.values()
        )
        + adapter
        + step
        + latents
        + prompts,
    }


def test_every_card_has_valid_presets():
    cards = {name.rpartition("-")[2] for name in PRESETS}
    assert cards == {"8gb", "12gb", "16gb", "24gb"}
    for name in PRESETS:
        configured(name)


@pytest.mark.parametrize(
    "name", ["sdxl-12gb", pytest.param("sdxl-8gb", marks=kind_param("nf4").marks)]
)
def test_a_preset_trains_with_flags_over_it(name, tmp_path):
    tiny_sdxl().save_pretrained(tmp_path / "base")
    values = {
        "base": tmp_path / "base",
        "images": make_pictures(tmp_path / "images"),
        "name": "rex",
    }
    values |= {"class-word": "dog", "output": tmp_path / "out", "steps": 1, "resolution": 32}
    flags = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    flags += ["--num-shared-directions", "0", "--no-record-inputs"]
    assert main(["train", "--config", str(PRESETS[name]), *flags]) == 0
    info = load_concept(tmp_path / "out").info
    assert info.rank == 16
    assert info.training["settings"]["quantize"] == configured(name)[2].quantize


def quick(name: str) -> Any:
    return pytest.param(name, marks=[] if name.startswith("sd15") else [pytest.mark.slow])


@pytest.mark.parametrize("name", [quick(name) for name in PRESETS])
def test_a_preset_fits_its_card_by_the_documented_margin(name):
    known, card, config = configured(name)
    peak = max(needed(known, config).values()) + RESERVED_BYTES
    assert peak <= card
    comment = re.search(r"^# Counted: ([\d.]+) GB,", PRESETS[name].read_text(), re.MULTILINE)
    assert comment is not None
    assert float(comment[1]) == math.ceil(peak / GIB * 10) / 10
    assert peak > 0.6 * card  # otherwise more would fit
