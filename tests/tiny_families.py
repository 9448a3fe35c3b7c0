"""Tiny models of all families with a standard pipeline, and of their variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.tiny import tiny_flux, tiny_qwen_image, tiny_sd, tiny_sd3, tiny_sdxl, tiny_z_image
from tests.tiny_llm import tiny_flux2, tiny_flux2_klein, tiny_krea2, tiny_qwen_image_21
from tests.tiny_video import tiny_cogvideox, tiny_ltx2, tiny_wan

TINY_FAMILIES: dict[str, Callable[[], Any]] = {
    "sd": tiny_sd,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "flux2-dev": tiny_flux2,
    "flux2-klein": tiny_flux2_klein,
    "qwen_image": tiny_qwen_image,
    "qwen_image_21": tiny_qwen_image_21,
    "z_image": tiny_z_image,
    "krea2": tiny_krea2,
    "wan": tiny_wan,
    "wan-14b": lambda: tiny_wan("2.2-14b"),
    "cogvideox": tiny_cogvideox,
    "ltx2": lambda: tiny_ltx2(later=True),
}
