"""The stage that keeps several concepts of one picture apart: ``together=``.

Where a prompt names attached concepts, each is read by its own words
(:mod:`customize.stages.concept_words`) and acts on its own part of the picture, which is found
while the picture is drawn (:mod:`customize.stages.concept_routing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import ModularPipeline
from PIL import Image

from customize.errors import ConfigError, PipelineError
from customize.families import Family
from customize.families.pipeline_components import is_compiled, uncompiled
from customize.pipeline.rank_channels import RankChannels, rank_channels
from customize.pipeline.stage import CallArguments, CallContext, Stage
from customize.pipeline.state import AttachedState
from customize.pipeline.uncompiled_calls import call_uncompiled
from customize.pipeline.validation import check_text_encoders_loaded
from customize.stages.areas import WeightFunction, weight_function
from customize.stages.avoid import Decor
from customize.stages.concept_routing import ConceptRouter, GivenMasks
from customize.stages.concept_words import (
    RoutedPrompt,
    encode_routed,
    named_concepts,
    wordless_concepts,
)
from customize.stages.step_caches import check_no_step_cache
from customize.stages.text_prompts import text_prompts
from customize.text import quote
from customize.user_warnings import warn_user

# Arguments that replace the prompt, or change how it is encoded.
_INCOMPATIBLE_ARGUMENTS = ("prompt_embeds", "prompt_2", "prompt_3", "clip_skip")
# Other stages' arguments that change what each part of the picture reads.
_INCOMPATIBLE_STAGES = ("regions", "reference_images")


@contextmanager
def _run(
    context: CallContext, call: CallArguments, together: Any = None, return_masks: Any = None
) -> Iterator[CallArguments]:
    areas = _check_arguments(together, return_masks)
    is_requested = together is not None
    if together is None:
        plan = _plan_by_default(context, call, bool(return_masks))
    else:
        plan = _plan(context, call) if together else None
    if plan is None:
        if return_masks:
            context.results["masks"] = [{} for _ in range(_count_pictures(call))]
        yield call
        return
    given = None if areas is None else _given_masks(areas, plan.routed, context.state)
    router = ConceptRouter(
        plan.family,
        plan.channels,
        len(context.state.attached),
        plan.routed,
        given,
        wordless_concepts(context.state),
        is_requested,
    )
    masks: list[dict[str, Any]] = []  # filled when the call ends
    if return_masks:
        context.results["masks"] = masks
    denoisers = [plan.family.components[key] for key in plan.family.denoisers]
    compiled = any(map(is_compiled, denoisers))
    if compiled:
        warn_user("together= runs the denoiser without its compiled code, which has no hooks")
    with call_uncompiled(denoisers), router.attach():
        yield call
    report = _report(router) + (", not compiled" if compiled else "")
    context.state.call_reports[STAGE.name] = report
    masks += _mask_images(router)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a call routes.

    Attributes:
        family: The models of the pipeline, as they are in this call.
        channels: The ranks of their layers.
        routed: The prompts of the call.
    """

    family: Family
    channels: Sequence[RankChannels]
    routed: Sequence[RoutedPrompt]


def _plan(context: CallContext, call: CallArguments, fewest: int = 1) -> _Plan | None:
    """Return what a call with ``together=`` routes; None if its prompts name no concept.

    Args:
        context: Of the call.
        call: Its arguments.
        fewest: Concepts that a prompt names for it to be routed.

    Raises:
        ConfigError: Other arguments of the call exclude it.
        PipelineError: The family, the models or the concepts cannot be routed.
    """
    prompts, state = _prompts(context, call), context.state
    if not any(named_concepts(prompt, state) for prompt in prompts):
        message = "no prompt names an attached concept, so together= has no effect"
        warn_user(message)
        state.call_reports[STAGE.name] = f"together: {message}"
        return None
    family = type(context.family)(dict(context.pipe.components), context.family.pipeline_config)
    family.max_sequence_length = call.get("max_sequence_length")
    if not state.has_active_adapters:
        raise PipelineError(
            "the adapter of the concepts is not active",
            where="together",
            fix="call enable_lora() on the pipeline, or set_adapters() with all that shall act",
        )
    channels = rank_channels(family, state)
    _check_routable(family, channels, wordless_concepts(state))
    with call_uncompiled(family.text_encoders.values()):
        return _Plan(family, channels, encode_routed(family, state, channels, prompts, fewest))


def _plan_by_default(context: CallContext, call: CallArguments, return_masks: bool) -> _Plan | None:
    """Return what a call without ``together=`` routes: concepts that share a prompt, if it can.

    Where it cannot, ``pipe.custom`` says why, and a call that asks for masks is refused.
    """
    state, family = context.state, context.family
    try:
        if not family.together_by_default or _attaches_in_calls(context.pipe):
            if return_masks:
                raise ConfigError("this pipeline does not do it by default")
            return None
        if not _share_a_prompt(state, call):
            if return_masks:
                warn_user(
                    "no prompt names two attached concepts, so there are no masks; together=True "
                    "finds that of one"
                )
            return None
        if any(is_compiled(context.pipe.components[key]) for key in family.denoisers):
            raise PipelineError("the denoiser is compiled")
        return _plan(context, call, fewest=2)
    except (ConfigError, PipelineError) as error:
        if return_masks:
            raise ConfigError(
                f"return_masks=True needs together=True: {error.problem}",
                where="return_masks",
                fix="leave it out, or give together=True where the call allows it",
            ) from error
        state.call_reports[STAGE.name] = f"together: off: {error.problem}"
        return None


def _count_pictures(call: CallArguments) -> int:
    """Return the number of pictures that a call draws."""
    numbers = (call.get(f"num_{output}_per_prompt") for output in ("images", "videos"))
    embeds = call.get("prompt_embeds")
    prompts = len(_texts(call)) if embeds is None else len(embeds)
    return max(1, prompts) * next((number for number in numbers if number), 1)


def _attaches_in_calls(pipe: Any) -> bool:
    """Whether a step of a modular pipeline attaches concepts, too late for the call's stages."""
    blocks = pipe.blocks if isinstance(pipe, ModularPipeline) else None
    return blocks is not None and any(each.name == "concepts" for each in blocks.inputs)


def _acts(state: AttachedState, arguments: CallArguments) -> bool:
    """Whether concepts share a prompt of a call, or may, once a library has attached some."""
    return state.update_cache is not None or _share_a_prompt(state, arguments)


def _share_a_prompt(state: AttachedState, arguments: CallArguments) -> bool:
    """Whether a prompt of a call names two attached concepts."""
    try:
        return any(len(named_concepts(text, state)) > 1 for text in _texts(arguments))
    except ConfigError:
        return False


def _texts(arguments: CallArguments) -> Sequence[str]:
    """Return the prompts of a call; none if it has no prompts, or others than texts."""
    prompts = arguments.get("prompt")
    texts: Sequence[Any] = prompts if isinstance(prompts, list | tuple) else [prompts]
    return texts if all(isinstance(text, str) for text in texts) else ()


#: Adds ``together=`` and ``return_masks=`` to the arguments of pipelines.
STAGE = Stage(
    "together",
    _run,
    arguments=("together", "return_masks"),
    acts=_acts,
    any_family=True,
)


def _check_arguments(together: Any, return_masks: Any) -> Mapping[str, Any] | None:
    """Check the stage's arguments, and return the areas of concepts if the call gives some."""
    if not isinstance(return_masks, bool | None):
        raise ConfigError(
            f"invalid return_masks={quote(return_masks)}",
            where="return_masks",
            fix="give True or False",
        )
    if return_masks and together is False:
        raise ConfigError(
            "return_masks=True needs the masks that together=False leaves out",
            where="return_masks",
            fix="leave one of them out",
        )
    if isinstance(together, bool | None):
        return None
    if not isinstance(together, Mapping) or not together:
        raise ConfigError(
            f"invalid together={quote(together)}",
            where="together",
            fix='give True or False, or areas such as {"<rex>": (0, 0, 0.5, 1), ...}',
        )
    return together


def _given_masks(
    areas: Mapping[str, Any], prompts: Sequence[RoutedPrompt], state: AttachedState
) -> list[GivenMasks]:
    """Return the masks of each prompt's concepts from areas that a call gives.

    Raises:
        ConfigError: An area is invalid or of no concept in the prompts, or a concept has none or
            several.
    """
    weights: dict[str, WeightFunction] = {}
    for key, area in areas.items():
        where = f"together[{quote(key)}]"
        names = [
            name
            for name, attached in state.attached.items()
            if key in (name, attached.concept.info.trigger_words, *attached.concept.info.triggers)
        ]
        if not names or names[0] in weights:
            raise ConfigError(
                f"{quote(key)} is given two areas" if names else f"{quote(key)} is no concept",
                where=where,
                fix=f"give one area for each of {', '.join(state.attached)}",
            )
        weights[names[0]] = weight_function(area, where)
    named = {each.name for prompt in prompts for each in prompt.named}
    if unnamed := sorted(weights.keys() - named):
        raise ConfigError(
            f"no prompt names {' and '.join(unnamed)}, which has an area",
            where="together",
            fix="leave its area out, or name it in the prompt",
        )
    missing = named - weights.keys()
    if missing:
        raise ConfigError(
            f"the prompt names {' and '.join(sorted(missing))}, without an area",
            where="together",
            fix="give an area for each concept of the prompt, or together=True to find them",
        )

    def masks(prompt: RoutedPrompt, rows: int, columns: int) -> torch.Tensor:
        return torch.stack([weights[each.name](rows, columns) for each in prompt.named])

    return [partial(masks, prompt) for prompt in prompts]


def _prompts(context: CallContext, call: CallArguments) -> list[str]:
    """Return the prompts of a call, refusing calls that cannot be routed."""
    pipe, family = context.pipe, context.family
    unsupported = family.regions_unsupported
    if not unsupported and not family.text_attentions(family.denoiser_key):
        unsupported = "it does not say which layers compute from the picture and from the prompt"
    if unsupported:
        raise PipelineError(
            f"family {family.name} does not support together=: {unsupported}",
            where="together",
            fix="leave it out; customize/families/README.md lists what supports it",
        )
    arguments = [name for name in _INCOMPATIBLE_ARGUMENTS if call.get(name) is not None]
    arguments += [name for name in _INCOMPATIBLE_STAGES if name in context.requested]
    if arguments:
        raise ConfigError(
            f"{' and '.join(arguments)} cannot be combined with together=",
            where="together",
            fix="leave out one of them",
        )
    for key in family.denoisers:
        reason = "and together= changes them between"
        check_no_step_cache(uncompiled(pipe.components[key]), key, reason)
        _check_attentions(family, key)
    settings = context.state.get_setting(Decor)
    avoids = "avoid" in context.requested or (settings is not None and settings.avoid is not None)
    prompts = text_prompts(call, "together")
    if avoids and len(set(prompts)) > 1:
        raise ConfigError(
            "avoid= cannot be combined with together= for several prompts",
            where="together",
            fix="draw each prompt in a call of its own",
        )
    check_text_encoders_loaded(family, "together= encodes prompts of its own", "together")
    return prompts


def _check_attentions(family: Family, component: str) -> None:
    """Refuse attentions whose queries and keys are computed by one fused layer.

    Their concepts are in the layers that it replaces.
    """
    denoiser = uncompiled(family.components[component])
    for attention in family.text_attentions(component):
        if getattr(denoiser.get_submodule(attention.name), "fused_projections", False):
            raise PipelineError(
                f"the attention computes {attention.query} and {attention.key}, which together= "
                "reads, in one fused layer",
                where=f"{component}.{attention.name}",
                fix="call unfuse_qkv_projections()",
            )


def _check_routable(
    family: Family, channels: Sequence[RankChannels], wordless: Sequence[int]
) -> None:
    """Refuse concepts in layers of the denoiser that have no positions."""
    for channel in channels:
        is_of_denoiser = channel.component in family.denoisers
        if is_of_denoiser and channel.tokens is None and not set(channel.owners) <= set(wordless):
            raise PipelineError(
                "a concept changes a layer without positions, which acts on the whole picture",
                where=f"{channel.component}.{channel.module}",
                fix="leave together= out, or give the concept's block a weight of 0",
            )


def _report(router: ConceptRouter) -> str:
    """Return the line of ``pipe.custom`` on the latest call, and warn where nothing was found."""
    if router.stopped_by:
        return f"together: off: {router.stopped_by}"
    parts = []
    for picture in router.pictures.values():
        names = [each.name for each in picture.routed.named]
        if picture.masks is not None:
            shares = picture.masks.flatten(1).mean(1).tolist()
            found = zip(names, shares, strict=True)
            areas = ", ".join(f"{name} in {100 * share:.0f} %" for name, share in found)
            parts.append(f"{areas} of the picture")
        elif names:
            parts.append(f"{' and '.join(names)} not told apart, and not confined")
            if router.is_requested:
                warn_user(
                    f"{' and '.join(names)} were not found in different parts of the picture, so "
                    "they acted on all of it"
                )
    return f"together: {'; '.join(dict.fromkeys(parts))}"


def _mask_images(router: ConceptRouter) -> list[dict[str, Any]]:
    """Return for each picture: name of a concept -> its mask, white where the concept acts.

    Masks of a video are lists with a picture for each latent frame.
    """
    is_video = router.family.output != "images"
    return [
        {
            each.name: [_image(frame) for frame in mask] if is_video else _image(mask[0])
            for each, mask in zip(picture.routed.named, picture.masks, strict=True)
        }
        if picture.masks is not None
        else {}
        for picture in router.pictures.values()
    ]


def _image(mask: torch.Tensor) -> Image.Image:
    return Image.fromarray((255 * mask.cpu().numpy()).round().astype(np.uint8))
