"""Checks of ``customize generate`` on the loaded pipeline: device, guidance, triggers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from customize.cli.terminal import print_line
from customize.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from customize.cli.generation_plan import GenerationPlan
    from customize.concepts.formats.lora_file import LoraFile
    from customize.concepts.types import Adaptation
    from customize.families import Family


def check_memory_device(device: torch.device, flag: str) -> None:
    """Refuse a device that differs from the one that a memory plan uses."""
    import torch

    from customize.base.device import current_accelerator

    accelerator = current_accelerator() or torch.device("cpu")
    same_index = device.index in (None, accelerator.index or 0)
    if device.type != accelerator.type or not same_index:
        raise ConfigError(
            f"--memory selects the device itself, {accelerator}",
            where=f"--device {flag}",
            fix="remove one of the two flags",
        )


def guidance_arguments(
    pipe: Any, family: Family, plan: GenerationPlan
) -> tuple[dict[str, Any], float | None]:
    """Return the call's arguments for guidance and negative prompt, and the guidance scale.

    Returns:
        The arguments, and the effective scale; None if the pipeline applies no guidance by default.

    Raises:
        ConfigError: The pipeline lacks such an argument, or would ignore its value.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    arguments = family.guidance_kwargs(plan.guidance, plan.negative)
    for name in arguments:
        if name not in parameters:
            raise ConfigError(
                f"the base's {type(pipe).__name__} has no argument {name}",
                where="--negative" if name == "negative_prompt" else "--guidance",
                fix="remove the flag",
            )
    default = parameters[family.guidance_argument].default
    scale, off = float(arguments.get(family.guidance_argument, default)), family.no_guidance
    if family.is_guided(scale):
        needs_negative = (
            family.guidance_needs_negative_prompt and "negative_prompt" not in arguments
        )
        return arguments, None if needs_negative else scale
    if plan.guidance is not None and scale > off and not family.has_guidance_input:
        raise ConfigError(
            "the base is distilled for sampling without guidance, and ignores it",
            where="--guidance",
            fix="remove the flag",
        )
    if plan.negative is not None:
        raise ConfigError(
            f"the base ignores negative prompts at guidance scale {scale:g}",
            where="--negative",
            fix=f"add --guidance above {off:g}, or remove --negative"
            if family.is_guided(off + 1.0)
            else "remove the flag",
        )
    return arguments, scale


def warn_of_triggers(
    pipe: Any, prompts: Sequence[str], concepts: Sequence[Adaptation | LoraFile]
) -> None:
    """Note prompts with unknown triggers, and prompts without the trigger of any concept.

    A base with fused concepts has their triggers in its tokenizer.
    """
    from customize.concepts.tokens.token_rows import known_tokens
    from customize.families import family_of
    from customize.pipeline.state import get_tokenizers

    triggers = [trigger for concept in concepts for trigger in concept.info.triggers]
    # A LoRA without a trigger affects every prompt.
    any_without_trigger = any(not concept.info.triggers for concept in concepts)
    tokenizers = get_tokenizers(family_of(pipe.components, pipe.config)).values()
    for prompt in prompts:
        unknown = [
            word
            for word in re.findall(r"<[a-z0-9_-]+>", prompt)
            if word not in triggers and not any(known_tokens(t, [word]) for t in tokenizers)
        ]
        if unknown:
            if not concepts:  # with concepts attached, the call itself warns
                print_line(
                    f"note: no concept is loaded, so {', '.join(unknown)} has no effect",
                    stderr=True,
                )
        elif triggers and not any_without_trigger and not any(t in prompt for t in triggers):
            print_line(
                f"note: the prompt {prompt!r} contains none of the triggers {', '.join(triggers)}",
                stderr=True,
            )
