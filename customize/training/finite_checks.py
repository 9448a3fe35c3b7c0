"""Checks that what models give is finite, made where it is computed, so that errors name the cause.

A loss that is not finite does not tell where that came from: an autoencoder that overflows in half
precision, a text encoder or denoiser with broken weights, a learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from customize.errors import PipelineError
from customize.families import Family


def check_latents(family: Family, latents: Iterable[Tensor], picture: str) -> None:
    """Refuse latents that are not finite.

    Args:
        latents: mean and standard deviation, each (..., channels, h, w).
        picture: the name of what was encoded.

    Raises:
        PipelineError: naming the picture.
    """
    if _all_finite(latents):
        return
    dtype = str(family.vae.dtype).removeprefix("torch.")
    raise PipelineError(
        f"the autoencoder gives values that are not finite for {picture}, in {dtype}",
        where="vae",
        fix=_broken_weight("vae", family.vae)
        or (
            "get an unchanged copy of the base, or leave the picture out"
            if dtype == "float32"
            else "give the autoencoder in float32; SDXL's overflows in half precision"
        ),
    )


def check_conditions(family: Family, conditions: Mapping[str, Tensor], caption: str) -> None:
    """Refuse what the text encoders make of a caption where it is not finite.

    Args:
        conditions: (1, ...) each, as :meth:`Family.encode_prompts` gives them.

    Raises:
        PipelineError: naming the caption, and the encoder where its weights tell.
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
    """Refuse latents or pixels that are not finite.

    Args:
        component: what gave them: the denoiser or "vae".

    Raises:
        PipelineError: naming the component.
    """
    if _all_finite([values]):
        return
    raise PipelineError(
        f"the {component} gives values that are not finite while pictures are drawn",
        where=component,
        fix=_broken_weight(component, family.components[component])
        or "set mixed_precision to bf16 or no; where pictures were fine before, lower the learning "
        "rates",
    )


def suggest_base_fix(family: Family, fp16: bool) -> str:
    """What to do where the untouched base gives values that are not finite.

    Args:
        fp16: whether it computes in float16.
    """
    models = {**family.denoisers, **family.all_text_encoders, "vae": family.components.get("vae")}
    for key, model in models.items():
        fix = _broken_weight(key, model)
        if fix:
            return fix
    if fp16:
        return "set mixed_precision to bf16 or no, as fp16 ends at 65504"
    return "look at the base's own pictures, and get an unchanged copy of it"


def _all_finite(values: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(each).all()) for each in values)


def _broken_weight(component: str, model: object) -> str:
    """What to do about a model's first frozen weight that is not finite; empty where all are.

    Weights that train may be so by the step that followed.
    """
    model = getattr(model, "wrapped", model)  # of an encoder whose answers are remembered
    for name, weight in model.named_parameters() if isinstance(model, nn.Module) else ():
        if weight.requires_grad or not weight.is_floating_point():
            continue
        if not _all_finite([weight]):
            return (
                f"get an unchanged copy of the base: its weight {component}.{name} has a number "
                "that is not finite"
            )
    return ""
