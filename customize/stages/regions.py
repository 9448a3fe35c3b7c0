"""The stage that restricts words of a prompt to regions of the image: ``regions=``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from customize.concepts.tokens.prompt_phrases import check_phrases, find_phrase, regional_prompts
from customize.core.region_weights import stack_regions
from customize.errors import ConfigError, PipelineError
from customize.pipeline.stage import CallArguments, CallContext, Stage
from customize.pipeline.validation import check_text_encoders_loaded
from customize.stages.areas import WeightFunction, weight_function
from customize.stages.multidiffusion import RegionalPrompt, denoise_by_regions
from customize.stages.step_caches import check_no_step_cache
from customize.stages.text_prompts import text_prompts
from customize.text import plural, quote

#: The largest number of regions of one prompt.
MAX_REGIONS = 64
# A region is refused where others cover more than 99 % of it, measured on a grid of this size.
_CHECK_GRID = 256
_MIN_VISIBLE_SHARE = 0.01
# Arguments that replace the prompt, or change how it is encoded.
_INCOMPATIBLE_ARGUMENTS = ("prompt_embeds", "prompt_2", "prompt_3", "clip_skip")


@contextmanager
def _run(context: CallContext, call: CallArguments, regions: Any = None) -> Iterator[CallArguments]:
    if regions is None:
        yield call
        return
    _check_supported(context, call)
    prompts = text_prompts(call, "regions")
    words = {name: a.concept.info.trigger_words for name, a in context.state.attached.items()}
    regional = [
        _regional_prompt(text, regions_of_prompt, words)
        for text, regions_of_prompt in zip(
            prompts, _regions_by_prompt(regions, len(prompts)), strict=True
        )
    ]
    # The pipeline's components include torch.compile's wrapper, whose hooks are the ones called.
    components = dict(context.pipe.components)
    family = type(context.family)(components, context.family.pipeline_config)
    family.max_sequence_length = call.get("max_sequence_length")
    with denoise_by_regions(family, regional):
        yield call


#: Adds ``regions=`` to the arguments of pipelines.
STAGE = Stage("regions", _run, arguments=("regions",))


def _check_supported(context: CallContext, call: CallArguments) -> None:
    """Refuse pipelines and calls that cannot be combined with regions."""
    pipe, family = context.pipe, context.family
    if family.regions_unsupported:
        raise PipelineError(
            f"family {family.name} does not support regions: {family.regions_unsupported}",
            where="regions",
            fix="leave out regions=; customize/families/README.md lists what supports it",
        )
    incompatible = [name for name in _INCOMPATIBLE_ARGUMENTS if call.get(name) is not None]
    if incompatible:
        raise ConfigError(
            f"{' and '.join(incompatible)} cannot be combined with regions=",
            where="regions",
            fix="give the prompt as prompt= alone",
        )
    for key, denoiser in family.denoisers.items():
        if getattr(pipe.components[key], "_compiled_call_impl", None) is not None:
            raise PipelineError(
                "the denoiser is compiled in place, so regions= cannot hook its calls",
                where=key,
                fix=f"compile it as pipe.{key} = torch.compile(pipe.{key}), or its blocks with "
                "compile_repeated_blocks()",
            )
        check_no_step_cache(denoiser, key, "which would mix regions")
    check_text_encoders_loaded(family, "regions= encodes prompts of its own", "regions")


def _regions_by_prompt(regions: Any, count: int) -> Sequence[Mapping[str, Any]]:
    """Return the regions of each of ``count`` prompts."""
    dicts = [regions] * count if isinstance(regions, Mapping) else regions
    if not isinstance(dicts, list | tuple) or not all(isinstance(d, Mapping) for d in dicts):
        raise ConfigError(
            f"regions must be a dict, not a {type(regions).__name__}",
            where="regions",
            fix='give such as {"<rex>": (0, 0, 0.5, 1)}, or a list with one for each prompt',
        )
    if len(dicts) != count:
        raise ConfigError(
            f"{plural(len(dicts), 'dict')} of regions for {plural(count, 'prompt')}",
            where="regions",
            fix="give one dict for all prompts, or one for each",
        )
    if not all(dicts):
        raise ConfigError("regions= is empty", where="regions", fix="leave the argument out")
    return dicts


def _regional_prompt(
    prompt: str, regions: Mapping[str, Any], words: Mapping[str, str]
) -> RegionalPrompt:
    """Validate the regions of a prompt, and split it into one prompt for each.

    Args:
        prompt: The prompt.
        regions: A trigger, a concept's name, or words of the prompt -> box or mask.
        words: Name of a concept -> its trigger words.
    """
    if len(regions) > MAX_REGIONS:
        raise ConfigError(
            f"{len(regions):,} regions exceed the limit of {MAX_REGIONS}",
            where="regions",
            fix="give fewer regions; each costs as much time and memory as a prompt",
        )
    weights: dict[str, WeightFunction] = {}
    for key, area in regions.items():
        where = f"regions[{quote(key)}]"
        if not isinstance(key, str):
            raise ConfigError(
                f"the key of a region must be words of the prompt, not a {type(key).__name__}",
                where=where,
            )
        concept_words = words.get(key, "")
        phrase = concept_words if concept_words and find_phrase(concept_words, prompt) else key
        if phrase in weights:
            raise ConfigError(
                f"{phrase!r} is given two regions",
                where=where,
                fix="give one region for each phrase; one mask can have several parts",
            )
        check_phrases(prompt, [phrase], [*filter(None, words.values()), *words], where)
        weights[phrase] = weight_function(area, where)
    check_phrases(prompt, list(weights), (), "regions")
    grids = [weight(_CHECK_GRID, _CHECK_GRID) for weight in weights.values()]
    for phrase, alone, stacked in zip(weights, grids, stack_regions(grids)[1:], strict=True):
        if float(stacked.sum()) < _MIN_VISIBLE_SHARE * float(alone.sum()):
            raise ConfigError(
                f"the region of {phrase!r} is covered by others",
                where="regions",
                fix="later regions cover earlier ones: give the smaller one last",
            )
    return RegionalPrompt(
        prompt,
        tuple(regional_prompts(prompt, list(weights))),
        tuple(weights.values()),
        tuple(weights),
    )
