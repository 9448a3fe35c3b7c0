"""Which backend each component of a model is to use."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import nn

from customize.attention.kernels import (
    BOUNDS,
    NEEDS,
    QUANTIZED,
    QUANTIZED_BOUND,
    Heads,
    fastest,
    measured_error,
    seconds,
    unfit,
)
from customize.attention.placing import Choice, attentions, dispatches, is_open
from customize.errors import ConfigError, PipelineError
from customize.families import Family
from customize.families.base import class_name

#: What "auto" chooses from on a CUDA device. Elsewhere torch's own is all there is to choose.
CANDIDATES = ("native", "_native_cudnn", "xformers", "flash", "_flash_3")

#: The sequence that candidates are timed on: the tokens of a 1024 x 1024 picture in a transformer.
TIMED_TOKENS = 4096


def choose(family: Family, backend: str, device: torch.device) -> dict[str, Choice]:
    """What each component is to use. Nothing changes.

    Args:
        backend: "auto", "native" (or "sdpa", the same), or another of diffusers' names.
        device: where the models compute.

    Returns:
        component -> choice, for the denoiser, the autoencoder and the text encoders.

    Raises:
        ConfigError: no such backend.
        PipelineError: the denoiser cannot use it here, or it computes something else there.
    """
    name = _known(backend)
    names = [name]
    if name == "auto":
        names = list(CANDIDATES) if device.type == "cuda" else ["native"]
    choices = {}
    for key in (family.denoiser_key, "vae"):
        model = family.components.get(key)
        if model is None or not any(is_open(each) for each in attentions(model)):
            continue
        masked = family.masked_attention and key == family.denoiser_key
        try:
            choices[key] = _best(key, model, names, device, masked)
        except PipelineError as problem:
            if key == family.denoiser_key:
                raise
            choices[key] = Choice("as it was", note=problem.what)
    for key, encoder in family.all_text_encoders.items():
        choices[key] = _of_text_encoder(key, encoder, "native" in names, device)
    return choices


def _known(backend: str) -> str:
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = ["auto", *(each.value for each in AttentionBackendName)]
    name = "native" if backend == "sdpa" else backend
    if name not in known:
        raise ConfigError(
            f"{backend!r} is no attention backend",
            where="attention",
            fix=f"choose from {', '.join(known)}",
        )
    return name


def _of_text_encoder(key: str, encoder: Any, plain: bool, device: torch.device) -> Choice:
    """torch's attention where that is asked for and the model can change to it; else its own."""
    own = encoder.config._attn_implementation
    if not plain or own == "sdpa":
        return Choice(own)
    if not (encoder._supports_sdpa and encoder._can_set_attn_implementation()):
        return Choice(own, note=f"{class_name(encoder)} has no other")
    found = _checked(key, encoder, "native", _text_heads(encoder.config), device, True)
    return Choice("sdpa", found)


def _text_heads(config: Any) -> Heads:
    text = config.get_text_config()
    count = text.num_attention_heads
    # T5 and some LLMs have heads of another width than their share of the model's.
    own = getattr(text, "head_dim", None) or getattr(text, "d_kv", None)
    return Heads(count, own or text.hidden_size // count)


def _best(key: str, model: Any, names: list[str], device: torch.device, masked: bool) -> Choice:
    """The fastest of several backends that are right, or the one that is asked for.

    Raises:
        PipelineError: none is right.
    """
    shapes = sorted({_heads(each) for each in attentions(model) if is_open(each)})
    right, problem = {}, PipelineError("no backend")
    for name in names:
        try:
            right[name] = max(_checked(key, model, name, heads, device, masked) for heads in shapes)
        except PipelineError as refused:
            problem = refused
    if not right:
        raise problem
    name = next(iter(right))
    if len(right) > 1:
        name = fastest(
            {
                name: sum(
                    statistics.median(seconds(name, heads, device, model.dtype, TIMED_TOKENS, 5))
                    for heads in shapes
                )
                for name in right
            }
        )
    return Choice(name, right[name])


def _checked(
    key: str,
    model: nn.Module,
    name: str,
    heads: Heads,
    device: torch.device,
    masked: bool,
) -> float:
    """The error of a backend that may be used.

    Raises:
        PipelineError: it may not; what is missing, how to get it, and what works here.
    """
    dtype: Any = model.dtype
    works = f"here these work: {', '.join(_plain_choices(model, device))}"
    problem, fix = unfit(name, heads, device, dtype), works
    if problem is None and name not in ("native", "xformers") and not dispatches(model):
        problem = (
            f"the attention of {class_name(model)} does not go through diffusers' dispatcher, "
            f"which alone has {name}"
        )
    found = math.nan
    if problem is None:
        try:
            found = measured_error(name, heads, device, dtype, masked)
        except Exception as failed:  # whatever a foreign kernel raises
            package = NEEDS[name].package if name in NEEDS else ""
            problem = f"the attention backend {name} fails here: {failed}"
            fix = f"install it (pip install {package}); {works}" if package else works
        else:
            bound = QUANTIZED_BOUND if QUANTIZED in name else BOUNDS[dtype]
            if found > bound:
                problem = (
                    f"the attention backend {name} computes something else with {heads.number} "
                    f"heads of width {heads.width}{' and a mask' if masked else ''}: its error is "
                    f"{found:.2g}, and rounding explains {bound:.2g}"
                )
    if problem is not None:
        raise PipelineError(problem, where=key, fix=fix)
    return found


def _plain_choices(model: nn.Module, device: torch.device) -> list[str]:
    """Backends that need nothing installed."""
    found = ["auto", "native"]
    if dispatches(model):
        found += ["_native_math", "flex"] + ["_native_cudnn"] * (device.type == "cuda")
    return found


def _heads(module: Any) -> Heads:
    return Heads(module.heads, module.inner_dim // module.heads)
