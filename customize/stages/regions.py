"""The stage that keeps words of a prompt to regions of the picture: ``regions=``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from customize.concepts.tokens.prompt_phrases import check_phrases, find_phrase, regional_prompts
from customize.core.region_weights import box_weights, mask_weights, stack_regions
from customize.core.scalars import as_float
from customize.errors import ConfigError, PipelineError
from customize.families import Family
from customize.pipeline.call_wrapper import CallArguments, CallContext, Stage
from customize.pipeline.validation import check_text_encoders_loaded
from customize.stages.multidiffusion import RegionalPrompt, denoise_by_regions
from customize.text import quote

WeightFunction = Callable[[int, int], Tensor]

# Fine enough to tell whether anything of a region shows.
_CHECK_GRID = 256
_MIN_VISIBLE_SHARE = 0.01
#: Most regions of one prompt.
MAX_REGIONS = 64
# Of a mask.
_MAX_MASK_PIXELS = 2**28

# What changes how a pipeline encodes a prompt, or takes its place.
_INCOMPATIBLE_ARGUMENTS = ("prompt_embeds", "prompt_2", "prompt_3", "clip_skip")


@contextmanager
def _run(context: CallContext, call: CallArguments, regions: Any = None) -> Iterator[CallArguments]:
    if regions is None:
        yield call
        return
    pipe, family = context.pipe, context.family
    _check_supported(pipe, family, call)
    prompts = _read_prompts(call)
    words = {name: each.concept.info.words for name, each in context.state.attached.items()}
    asked = [
        _regional_prompt(prompt, own, words)
        for prompt, own in zip(prompts, _regions_by_prompt(regions, len(prompts)), strict=True)
    ]
    # Whoever is called, torch.compile's wrapper among them.
    called = type(family)(dict(pipe.components), family.pipeline_config)
    with denoise_by_regions(called, asked):
        yield call


#: Adds ``regions=`` to a pipeline's call; see README.md.
REGIONS = Stage(("regions",), _run)


def _regional_prompt(
    prompt: str, regions: Mapping[str, Any], words: Mapping[str, str]
) -> RegionalPrompt:
    """One prompt with its regions, checked.

    Args:
        regions: trigger, concept's name, or any words of the prompt -> box or mask.
        words: concept's name -> what calls it.
    """
    if len(regions) > MAX_REGIONS:
        raise ConfigError(
            f"{len(regions):,} regions were given, of at most {MAX_REGIONS}",
            where="regions",
            fix="give fewer; each costs as much time and memory as a prompt",
        )
    named: dict[str, WeightFunction] = {}
    for key, place in regions.items():
        where = f"regions[{quote(key)}]"
        if not isinstance(key, str):
            raise ConfigError(
                f"a region goes by words of the prompt, not by a {type(key).__name__}", where=where
            )
        said = words.get(key, "")
        phrase = said if said and find_phrase(said, prompt) else key
        if phrase in named:
            raise ConfigError(
                f"{phrase!r} is given two regions",
                where=where,
                fix="give each once; one mask can have several parts",
            )
        check_phrases(prompt, [phrase], [*filter(None, words.values()), *words], where)
        named[phrase] = _weight_function(place, where)
    check_phrases(prompt, list(named), (), "regions")
    _check_visible(named)
    texts = regional_prompts(prompt, list(named))
    return RegionalPrompt(prompt, tuple(texts), tuple(named.values()))


def _weight_function(place: Any, where: str) -> WeightFunction:
    """A box or a mask as weights on any grid."""
    if isinstance(place, Image.Image | Tensor | np.ndarray):
        mask = _read_mask(place, where)
    elif isinstance(place, Sequence) and not isinstance(place, str):
        return partial(box_weights, _read_box(place, where))
    else:
        raise ConfigError(
            f"a {type(place).__name__} is no region",
            where=where,
            fix="give a box (left, top, right, bottom), or a mask: a PIL image, array or tensor",
        )
    if not bool(torch.isfinite(mask).all()):
        raise ConfigError("the mask is not finite", where=where)
    if float(mask.min()) < 0.0 or float(mask.max()) > 1.0:
        raise ConfigError(
            f"the mask reaches from {float(mask.min()):g} to {float(mask.max()):g}",
            where=where,
            fix="scale it to 0 (outside) to 1 (inside)",
        )
    if not bool(mask.any()):
        raise ConfigError("the mask is empty", where=where, fix="set it to 1 in the region")
    return partial(mask_weights, mask)


def _read_mask(place: Image.Image | Tensor | np.ndarray[Any, Any], where: str) -> Tensor:
    """A mask's numbers, (height, width), float32, on the CPU."""
    if isinstance(place, Tensor) and place.is_nested:
        raise ConfigError("a nested tensor is no mask", where=where)
    shape = tuple(place.size[::-1] if isinstance(place, Image.Image) else place.shape)
    if len(shape) != 2 or not 0 < math.prod(shape) <= _MAX_MASK_PIXELS:
        raise ConfigError(
            f"a mask of shape {shape} is not one of (height, width), of at most "
            f"{_MAX_MASK_PIXELS:,} pixels",
            where=where,
            fix="give one number for each pixel",
        )
    try:
        if isinstance(place, Image.Image):
            return torch.from_numpy(np.array(place.convert("L"), dtype=np.float32) / 255)
        if isinstance(place, Tensor):
            if place.is_complex() or place.is_quantized or place.layout != torch.strided:
                raise TypeError("its numbers are complex, quantized or sparse")
            return place.detach().cpu().float()
        if place.dtype.kind not in "biuf":
            raise TypeError(f"its elements are of type {place.dtype}")
        with np.errstate(over="ignore"):  # beyond float32 is beyond 1 as well
            return torch.from_numpy(np.ascontiguousarray(place).astype(np.float32))
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the mask cannot be read: {error}",
            where=where,
            fix="give real numbers from 0 to 1, or a picture in grayscale",
        ) from error


def _read_box(place: Sequence[Any], where: str) -> tuple[float, float, float, float]:
    numbers = [as_float(number) for number in place] if len(place) == 4 else [math.nan]
    if any(map(math.isnan, numbers)):
        raise ConfigError(
            f"{quote(place)} is no box",
            where=where,
            fix="give four numbers: left, top, right, bottom",
        )
    left, top, right, bottom = numbers
    if min(left, top) < 0.0 or max(right, bottom) > 1.0:
        raise ConfigError(
            f"the box {tuple(place)} reaches out of the picture",
            where=where,
            fix="give shares of its width and height, from 0 to 1, not pixels",
        )
    if left >= right or top >= bottom:
        raise ConfigError(
            f"the box {tuple(place)} is empty",
            where=where,
            fix="give left, top, right, bottom, in this order",
        )
    return left, top, right, bottom


def _check_visible(named: Mapping[str, WeightFunction]) -> None:
    """Refuse a region that others cover."""
    own = [weigh(_CHECK_GRID, _CHECK_GRID) for weigh in named.values()]
    for phrase, before, after in zip(named, own, stack_regions(own)[1:], strict=True):
        if float(after.sum()) < _MIN_VISIBLE_SHARE * float(before.sum()):
            raise ConfigError(
                f"nothing of the region of {phrase!r} is left: others cover it",
                where="regions",
                fix="later regions lie on earlier ones: name the smaller one last",
            )


def _regions_by_prompt(regions: Any, count: int) -> Sequence[Mapping[str, Any]]:
    """The regions of each prompt."""
    listed = [regions] * count if isinstance(regions, Mapping) else regions
    if not isinstance(listed, list | tuple) or not all(isinstance(o, Mapping) for o in listed):
        raise ConfigError(
            f"regions are a dict, not a {type(regions).__name__}",
            where="regions",
            fix='give such as {"<rex>": (0, 0, 0.5, 1)}, or a list with one for each prompt',
        )
    if len(listed) != count:
        raise ConfigError(
            f"{len(listed)} dicts of regions were given for {count} prompts",
            where="regions",
            fix="give one for all, or one for each",
        )
    if not all(listed):
        raise ConfigError("no region is given", where="regions", fix="leave the argument out")
    return listed


def _read_prompts(call: CallArguments) -> list[str]:
    prompt = call.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    texts = prompts if isinstance(prompts, list | tuple) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            "regions need a prompt in words",
            where="prompt",
            fix="give prompt= a text or a list of texts",
        )
    return list(texts)


def _check_supported(pipe: Any, family: Family, call: CallArguments) -> None:
    """Refuse what regions cannot be drawn with; nothing has been done yet."""
    if family.regions_unsupported:
        raise PipelineError(
            f"models of family {family.name} cannot draw by regions: {family.regions_unsupported}",
            where="regions",
            fix="leave out regions=; README.md lists the families that can",
        )
    other = [name for name in _INCOMPATIBLE_ARGUMENTS if call.get(name) is not None]
    if other:
        raise ConfigError(
            f"{' and '.join(other)} cannot be given beside regions, whose words are the prompt's",
            where="regions",
            fix="give the prompt alone",
        )
    for key, denoiser in family.denoisers.items():
        if getattr(pipe.components[key], "_compiled_call_impl", None) is not None:
            raise PipelineError(
                "the denoiser is compiled in place, where regions cannot reach its calls",
                where=key,
                fix=f"compile it as pipe.{key} = torch.compile(pipe.{key}), or its blocks with "
                "compile_repeated_blocks()",
            )
        if getattr(denoiser, "is_cache_enabled", False):
            raise PipelineError(
                "the denoiser keeps answers from step to step, which it would mix among regions",
                where=key,
                fix="call disable_cache() on it first",
            )
    check_text_encoders_loaded(family, "regions encode prompts of their own", "regions")
