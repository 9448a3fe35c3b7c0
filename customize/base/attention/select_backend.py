"""Which backend each component of a model is to use."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import nn

from customize.base.attention.apply_backend import (
    BackendChoice,
    attention_modules,
    is_processor_replaceable,
    supports_backend,
    uses_dispatcher,
)
from customize.base.attention.backends import (
    ERROR_BOUNDS,
    QUANTIZED_BOUND,
    QUANTIZED_PREFIX,
    REQUIREMENTS,
    HeadShape,
    MaskKind,
    find_unmet_requirement,
    measure_error,
    select_fastest,
    time_attention,
)
from customize.errors import ConfigError, PipelineError
from customize.families import Family
from customize.families.pipeline_components import class_name
from customize.near_names import suggest_names
from customize.text import quote

#: What "auto" chooses from on a CUDA device. Elsewhere torch's own is all there is to choose.
CANDIDATES = ("native", "_native_cudnn", "xformers", "flash", "_flash_3")

#: The sequence that candidates are timed on: the tokens of a 1024 x 1024 picture in a transformer.
TIMED_TOKENS = 4096


def choose_backends(family: Family, backend: str, device: torch.device) -> dict[str, BackendChoice]:
    """What each component is to use. Nothing changes.

    Args:
        backend: "auto", "native" (or "sdpa", the same), or another of diffusers' names.
        device: where the models compute.

    Returns:
        component -> choice, for denoisers, the autoencoder and what reads prompts.

    Raises:
        ConfigError: no such backend.
        PipelineError: a denoiser cannot use it here, or it computes something else there.
    """
    name = _known(backend)
    names = [name]
    if name == "auto":
        names = list(CANDIDATES) if device.type == "cuda" else ["native"]
    choices = {}
    vae = family.components.get("vae")
    for key, model in {**family.denoisers, "vae": vae, **family.all_text_encoders}.items():
        if hasattr(model, "set_attn_implementation"):
            choices[key] = _of_text_encoder(key, model, "native" in names, device)
        elif isinstance(model, nn.Module) and attention_modules(model):
            mask = None if key == "vae" else family.attention_mask
            try:
                choices[key] = _best(key, model, names, device, mask)
            except PipelineError as problem:
                # "auto" leaves processors of someone's own alone; what is named must be used.
                if key in family.denoisers and (name != "auto" or _openings(model)):
                    raise
                choices[key] = BackendChoice("as it was", note=problem.problem)
    return choices


def _known(backend: str) -> str:
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = ["auto", *(each.value for each in AttentionBackendName)]
    name = "native" if backend == "sdpa" else backend
    if name not in known:
        raise ConfigError(
            f"{quote(backend)} is no attention backend",
            where="attention",
            fix=suggest_names(backend, known),
        )
    return name


def _of_text_encoder(key: str, encoder: Any, plain: bool, device: torch.device) -> BackendChoice:
    """torch's attention where that is asked for and the model can change to it; else its own."""
    own = encoder.config._attn_implementation
    if not plain or own == "sdpa":
        return BackendChoice(own)
    if not (encoder._supports_sdpa and encoder._can_set_attn_implementation()):
        return BackendChoice(own, note=f"{class_name(encoder)} has no other")
    found = _checked(key, encoder, "native", _text_heads(encoder.config), device, "boolean")
    return BackendChoice("sdpa", found)


def _text_heads(config: Any) -> HeadShape:
    text = config.get_text_config()
    count = text.num_attention_heads
    # T5 and some LLMs have heads of another width than their share of the model's.
    own = getattr(text, "head_dim", None) or getattr(text, "d_kv", None)
    return HeadShape(count, own or text.hidden_size // count)


def _best(
    key: str, model: Any, names: list[str], device: torch.device, mask: MaskKind | None
) -> BackendChoice:
    """The fastest of several backends that are right, or the one that is asked for.

    Raises:
        PipelineError: none is right, or no attention's may be set.
    """
    shapes = sorted({_heads(each) for each in _openings(model)})
    if not shapes:
        raise PipelineError(
            f"all attention processors of {class_name(model)} are someone's own",
            where=key,
            fix="give it diffusers' own with set_attn_processor, or leave attention out",
        )
    right, problem = {}, PipelineError("no backend")
    for name in names:
        try:
            right[name] = max(_checked(key, model, name, heads, device, mask) for heads in shapes)
        except PipelineError as refused:
            problem = refused
    if not right:
        raise problem
    name = next(iter(right))
    if len(right) > 1:
        name = select_fastest(
            {
                name: sum(
                    statistics.median(
                        time_attention(name, heads, device, model.dtype, TIMED_TOKENS, 5)
                    )
                    for heads in shapes
                )
                for name in right
            }
        )
    return BackendChoice(name, right[name])


def _checked(
    key: str,
    model: nn.Module,
    name: str,
    heads: HeadShape,
    device: torch.device,
    mask: MaskKind | None,
) -> float:
    """The error of a backend that may be used.

    Raises:
        PipelineError: it may not; what is missing, how to get it, and what works here.
    """
    dtype: Any = model.dtype
    works = f"here these work: {', '.join(_plain_choices(model, device))}"
    problem, fix = find_unmet_requirement(name, heads, device, dtype), works
    if problem is None and not all(supports_backend(each, name) for each in _openings(model)):
        problem = (
            f"the attention of {class_name(model)} does not go through diffusers' dispatcher, and "
            f"without it there is no {name} for this kind of attention"
        )
    found = math.nan
    if problem is None:
        try:
            found = measure_error(name, heads, device, dtype, mask)
        except Exception as failed:  # whatever a foreign kernel raises
            package = REQUIREMENTS[name].package if name in REQUIREMENTS else ""
            problem = f"the attention backend {name} fails here: {failed}"
            fix = f"install it (pip install {package}); {works}" if package else works
        else:
            bound = QUANTIZED_BOUND if QUANTIZED_PREFIX in name else ERROR_BOUNDS[dtype]
            if found > bound:
                problem = (
                    f"the attention backend {name} computes something else with {heads.number} "
                    f"heads of width {heads.width}{' and a mask' if mask else ''}: its error is "
                    f"{found:.2g}, and rounding explains {bound:.2g}"
                )
    if problem is not None:
        raise PipelineError(problem, where=key, fix=fix)
    return found


def _plain_choices(model: nn.Module, device: torch.device) -> list[str]:
    """Backends that need nothing installed."""
    found = ["auto", "native"]
    if uses_dispatcher(model):
        found += ["_native_math", "flex"] + ["_native_cudnn"] * (device.type == "cuda")
    return found


def _openings(model: nn.Module) -> list[Any]:
    return [each for each in attention_modules(model) if is_processor_replaceable(each)]


def _heads(module: Any) -> HeadShape:
    if hasattr(module, "num_heads"):  # as LLMs name them: Krea 2
        return HeadShape(module.num_heads, module.head_dim)
    return HeadShape(module.heads, module.inner_dim // module.heads)
