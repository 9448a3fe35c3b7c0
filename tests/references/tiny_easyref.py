"""A file of EasyRef's layout for the tiny Stable Diffusion XL, and the folder of its MLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from customize.families import family_of
from customize.references import easyref_file
from customize.references.seams import seam_of
from tests.references.easyref_release import encoder_part, mllm_part, random_weights, unet_part
from tests.references.test_easyref_file import TINY
from tests.references.tiny_mllm import tiny_mllm, tiny_processor
from tests.tiny import tiny_sdxl


def write_release(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path, Path]:
    """Return a pipeline, the file for its UNet, and the folder of the MLLM."""
    pipe = tiny_sdxl()
    family = family_of(pipe.components)
    layers = seam_of(family).attention_layers(family)
    monkeypatch.setattr(easyref_file, "sdxl_layers", lambda: layers)
    processors = dict.fromkeys(pipe.unet.attn_processors, 32)
    shapes = mllm_part(TINY) | encoder_part(TINY, 4, 40) | unet_part(processors, 40, 8)
    save_file(random_weights(shapes), folder / "easyref.safetensors")
    tiny_mllm().save_pretrained(folder / "mllm")
    tiny_processor().save_pretrained(folder / "mllm")
    return pipe, folder / "easyref.safetensors", folder / "mllm"
