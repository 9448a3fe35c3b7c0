"""Selection of the attention backend of each component."""

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

#: Backends that "auto" chooses from on a CUDA device; on other devices it takes "native".
CANDIDATES = ("native", "_native_cudnn", "xformers", "flash", "_flash_3")

#: Sequence length for timing: the tokens of a 1024 x 1024 image in a transformer.
TIMED_TOKENS = 4096


def choose_backends(family: Family, backend: str, device: torch.device) -> dict[str, BackendChoice]:
    """Choose the backends of denoisers, autoencoder and text encoders, without applying them.

    Args:
        family: The pipeline's family.
        backend: "auto", "native" (or its alias "sdpa"), or another name in diffusers.
        device: The device that the models run on.

    Returns:
        Component -> choice.

    Raises:
        ConfigError: The backend is unknown.
        PipelineError: A denoiser cannot use the backend, or its error is too large.
    """
    name = _resolve_name(backend)
    names = [name]
    if name == "auto":
        names = list(CANDIDATES) if device.type == "cuda" else ["native"]
    choices = {}
    vae = family.components.get("vae")
    for key, model in {**family.denoisers, "vae": vae, **family.all_text_encoders}.items():
        if hasattr(model, "set_attn_implementation"):
            choices[key] = _choose_for_text_encoder(key, model, "native" in names, device)
        elif isinstance(model, nn.Module) and attention_modules(model):
            mask = None if key == "vae" else family.attention_mask
            try:
                choices[key] = _choose_fastest(key, model, names, device, mask)
            except PipelineError as error:
                # "auto" keeps custom processors; a named backend must be usable.
                if key in family.denoisers and (name != "auto" or _replaceable_modules(model)):
                    raise
                choices[key] = BackendChoice("unchanged", note=error.problem)
    return choices


def _resolve_name(backend: str) -> str:
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = ["auto", *(member.value for member in AttentionBackendName)]
    name = "native" if backend == "sdpa" else backend
    if name not in known:
        raise ConfigError(
            f"unknown attention backend {quote(backend)}",
            where="attention",
            fix=suggest_names(backend, known),
        )
    return name


def _choose_for_text_encoder(
    key: str, encoder: Any, use_native: bool, device: torch.device
) -> BackendChoice:
    """Choose torch's attention if requested and supported, otherwise the current implementation."""
    current = encoder.config._attn_implementation
    if not use_native or current == "sdpa":
        return BackendChoice(current)
    if not (encoder._supports_sdpa and encoder._can_set_attn_implementation()):
        return BackendChoice(current, note=f"{class_name(encoder)} has no other implementation")
    heads = _text_head_shape(encoder.config)
    return BackendChoice("sdpa", _check_error(key, encoder, "native", heads, device, "boolean"))


def _text_head_shape(config: Any) -> HeadShape:
    text = config.get_text_config()
    count = text.num_attention_heads
    # The heads of T5 and some LLMs have another width than hidden_size / heads.
    width = getattr(text, "head_dim", None) or getattr(text, "d_kv", None)
    return HeadShape(count, width or text.hidden_size // count)


def _choose_fastest(
    key: str, model: Any, names: list[str], device: torch.device, mask: MaskKind | None
) -> BackendChoice:
    """Choose the fastest of the backends whose error is within bounds.

    Raises:
        PipelineError: No backend is, or all attention processors are custom.
    """
    shapes = sorted({_head_shape(module) for module in _replaceable_modules(model)})
    if not shapes:
        raise PipelineError(
            f"all attention processors of {class_name(model)} are custom",
            where=key,
            fix="set diffusers' processors with set_attn_processor, or leave attention out",
        )
    errors, problem = {}, PipelineError("no backend")
    for name in names:
        try:
            errors[name] = max(
                _check_error(key, model, name, heads, device, mask) for heads in shapes
            )
        except PipelineError as error:
            problem = error
    if not errors:
        raise problem
    name = next(iter(errors))
    if len(errors) > 1:
        name = select_fastest(
            {
                name: sum(
                    statistics.median(
                        time_attention(name, heads, device, model.dtype, TIMED_TOKENS, 5)
                    )
                    for heads in shapes
                )
                for name in errors
            }
        )
    return BackendChoice(name, errors[name])


def _check_error(
    key: str,
    model: nn.Module,
    name: str,
    heads: HeadShape,
    device: torch.device,
    mask: MaskKind | None,
) -> float:
    """Check that a backend works, and return its error.

    Raises:
        PipelineError: It does not work; the fix has what to install and the backends that work.
    """
    dtype: Any = model.dtype
    works = f"available are {', '.join(_list_builtin_backends(model, device))}"
    problem, fix = find_unmet_requirement(name, heads, device, dtype), works
    if problem is None and not all(supports_backend(m, name) for m in _replaceable_modules(model)):
        problem = (
            f"the attention of {class_name(model)} does not use diffusers' dispatcher, and "
            f"diffusers has no {name} processor for it"
        )
    measured = math.nan
    if problem is None:
        try:
            measured = measure_error(name, heads, device, dtype, mask)
        except Exception as error:  # kernels raise any exception
            package = REQUIREMENTS[name].package if name in REQUIREMENTS else ""
            problem = f"the attention backend {name} fails: {error}"
            fix = f"install it (pip install {package}); {works}" if package else works
        else:
            bound = QUANTIZED_BOUND if QUANTIZED_PREFIX in name else ERROR_BOUNDS[dtype]
            if measured > bound:
                problem = (
                    f"the attention backend {name} is wrong with {heads.number} heads of width "
                    f"{heads.width}{' and a mask' if mask else ''}: its relative error is "
                    f"{measured:.2g}, above the bound {bound:.2g}"
                )
    if problem is not None:
        raise PipelineError(problem, where=key, fix=fix)
    return measured


def _list_builtin_backends(model: nn.Module, device: torch.device) -> list[str]:
    """List the backends that need no additional package."""
    names = ["auto", "native"]
    if uses_dispatcher(model):
        names += ["_native_math", "flex"] + ["_native_cudnn"] * (device.type == "cuda")
    return names


def _replaceable_modules(model: nn.Module) -> list[Any]:
    return [module for module in attention_modules(model) if is_processor_replaceable(module)]


def _head_shape(module: Any) -> HeadShape:
    if hasattr(module, "num_heads"):  # Krea 2 uses the names of LLMs
        return HeadShape(module.num_heads, module.head_dim)
    return HeadShape(module.heads, module.inner_dim // module.heads)
