"""Checks that the outputs of models are finite, so that errors name the component at fault.

A loss that is not finite may come from an autoencoder that overflows in half precision, from a text
encoder or denoiser with damaged weights, or from a high learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from customize.errors import PipelineError
from customize.families import Family


def check_latents(family: Family, latents: Iterable[Tensor], picture: str) -> None:
    """Check that latents are finite.

    Args:
        family: The base model.
        latents: Mean and standard deviation, each (..., channels, height, width).
        picture: Name of the encoded image file.

    Raises:
        PipelineError: A value is not finite; the error names the image.
    """
    if _all_finite(latents):
        return
    dtype = str(family.vae.dtype).removeprefix("torch.")
    raise PipelineError(
        f"the autoencoder gives values that are not finite for {picture}, in {dtype}",
        where="vae",
        fix=_broken_weight("vae", family.vae)
        or (
            "get an unchanged copy of the base, or leave the image out"
            if dtype == "float32"
            else "give the autoencoder in float32; SDXL's overflows in half precision"
        ),
    )


def check_conditions(family: Family, conditions: Mapping[str, Tensor], caption: str) -> None:
    """Check that the conditions of a caption are finite.

    Args:
        family: The base model.
        conditions: From :meth:`Family.encode_prompts`, of batch size 1.
        caption: The encoded caption.

    Raises:
        PipelineError: A value is not finite; the error names the caption, and the text encoder with
            damaged weights.
    """
    if _all_finite(conditions.values()):
        return
    fixes = {key: _broken_weight(key, model) for key, model in family.all_text_encoders.items()}
    key = next((key for key, fix in fixes.items() if fix), None)
    raise PipelineError(
        f"the text encoder gives values that are not finite for the prompt {caption[:80]!r}",
        where=key or "text_encoder",
        fix=fixes[key] if key else "set mixed_precision to bf16 or no",
    )


def check_sampled(family: Family, values: Tensor, component: str) -> None:
    """Check that sampled latents or pixels are finite.

    Args:
        family: The base model.
        values: Latents or pixels, of any shape.
        component: The component that returned them: the denoiser or "vae".

    Raises:
        PipelineError: A value is not finite; the error names the component.
    """
    if _all_finite([values]):
        return
    raise PipelineError(
        f"the {component} gives values that are not finite while images are drawn",
        where=component,
        fix=_broken_weight(component, family.components[component])
        or "set mixed_precision to bf16 or no; where images were fine before, lower the learning "
        "rates",
    )


def suggest_base_fix(family: Family, fp16: bool) -> str:
    """Return what to do if the base without adapters gives values that are not finite.

    Args:
        family: The base model.
        fp16: Whether it computes in float16.
    """
    models = {**family.denoisers, **family.all_text_encoders, "vae": family.components.get("vae")}
    for key, model in models.items():
        fix = _broken_weight(key, model)
        if fix:
            return fix
    if fp16:
        return "set mixed_precision to bf16 or no, as fp16 ends at 65504"
    return "look at the base's own images, and get an unchanged copy of it"


def _all_finite(values: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in values)


def _broken_weight(component: str, model: object) -> str:
    """What to do about a model's first frozen weight that is not finite; "" if all are finite.

    Trained weights are not checked, because a step may have made them infinite.
    """
    model = getattr(model, "wrapped", model)  # the encoder of a CachedTextEncoder
    for name, weight in model.named_parameters() if isinstance(model, nn.Module) else ():
        if weight.requires_grad or not weight.is_floating_point():
            continue
        if not _all_finite([weight]):
            return (
                f"get an unchanged copy of the base: its weight {component}.{name} has a number "
                "that is not finite"
            )
    return ""
