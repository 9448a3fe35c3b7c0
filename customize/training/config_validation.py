"""Validation of settings against one another, and error messages for invalid settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from customize.core.preservation import (
    PHRASE_COMPARISONS,
    PRESERVATIONS,
    TEXT_COMPARISONS,
    select_losses,
)
from customize.errors import ConfigError
from customize.near_names import did_you_mean
from customize.safe_read import real_path
from customize.training.field_values import contains_trigger, format_value


class Problem(NamedTuple):
    """A setting that is missing, invalid or contradicts another."""

    setting: str
    #: What is wrong, with the setting's name and value.
    text: str
    fix: str


def find_contradictions(settings: Mapping[str, Any]) -> list[Problem]:
    """Find settings that are valid alone and contradict others.

    Args:
        settings: All fields of a :class:`customize.training.config.TrainConfig`.

    """
    *first, last = select_losses(PRESERVATIONS, *PHRASE_COMPARISONS)
    images, output = real_path(settings["images"]), real_path(settings["output"])
    masks, prior_images = settings["masks"], settings["prior_images"]
    # Setting -> what is wrong and its fix, starting with a verb: "is not used; set ...".
    checks = {
        "output": images.is_relative_to(output)
        and "contains the training images, which a new concept would replace; choose a separate"
        " folder",
        "masks": masks is not None
        and real_path(masks) == images
        and "is the folder of the training images; put the masks into a separate folder, with the"
        " same file names",
        "preserve": _check_preserve(settings),
        "preserve_phrases": bool(settings["preserve_phrases"])
        and not select_losses(settings["preserve"], *PHRASE_COMPARISONS)
        and f"is not used; set preserve to {', '.join(first)} or {last} (--preserve)",
        "preserve_pooling": settings["preserve_pooling"] == "published"
        and _check_pooling(settings),
        "prior_images": prior_images is not None
        and _check_prior_images(settings, is_concept_folder=real_path(prior_images) == images),
        "prior_prompt": contains_trigger(settings["prior_prompt"] or "", settings["trigger"])
        and f"contains the trigger {settings['trigger']}; name the class alone, as class images"
        " show it without the concept",
        "slice": settings["slice"] is not None
        and settings["method"] == "lora"
        and "has no meaning for method lora; leave it out, or set method to orthogonal"
        " (--method orthogonal)",
        "layerwise_tokens": settings["layerwise_tokens"]
        and not settings["train_tokens"]
        and "needs trained tokens; set train_tokens to true (--train-tokens)",
        "compile": settings["compile"]
        and settings["quantize"].startswith("torchao")
        and f"does not work with {settings['quantize']} weights; set quantize to nf4, int8 or none"
        " (--quantize none)",
        "validation_every": settings["validation_every"] > 0
        and not settings["validation_prompts"]
        and "has no prompts; set validation_prompts (--validation-prompts)",
        "warmup_steps": settings["warmup_steps"] >= settings["steps"]
        and f"must be below the number of steps, {settings['steps']}; lower it, or raise steps",
    }
    problems = []
    for name, check in checks.items():
        if check:
            text, _, fix = check.partition("; ")
            problems.append(
                Problem(name, f"{name} is {format_value(settings[name])}: it {text}", fix)
            )
    return problems


def _check_preserve(settings: Mapping[str, Any]) -> str | None:
    trigger = settings["trigger"]
    if settings["preserve"] and contains_trigger(settings["class_word"], trigger):
        return (
            f"compares with the class, but class_word contains the trigger {trigger}; set"
            " class_word to a word for the class, such as dog (--class-word dog)"
        )
    text_losses = select_losses(settings["preserve"], *TEXT_COMPARISONS)
    if text_losses and not (settings["train_tokens"] or settings["train_text_encoder"]):
        return (
            f"has {' and '.join(text_losses)}, but no text encoder is trained; set train_tokens or"
            " train_text_encoder to true (--train-tokens, --train-text-encoder)"
        )
    return None


def _check_pooling(settings: Mapping[str, Any]) -> str | None:
    if not select_losses(settings["preserve"], "phrase_feature"):
        return "applies to class_text only; set preserve to class_text (--preserve)"
    if not settings["train_tokens"]:
        return "pools at the concept's token; set train_tokens to true (--train-tokens)"
    return None


def _check_prior_images(settings: Mapping[str, Any], is_concept_folder: bool) -> str | None:
    if is_concept_folder:
        return "is the folder of the concept's images; choose a folder of class images"
    if settings["prior_weight"] == 0:
        return "is not used while prior_weight is 0; set prior_weight to 1 (--prior-weight 1)"
    return None


def config_error(error: ValidationError, fields: Mapping[str, FieldInfo]) -> ConfigError:
    """Convert pydantic's error to one ConfigError with a line for each problem.

    Args:
        error: Pydantic's error.
        fields: The fields of the model, for their descriptions.
    """
    problems = []
    for detail in error.errors(include_url=False):
        name = str(detail["loc"][0]) if detail["loc"] else "the configuration"
        field = fields.get(name)
        advice = ""
        if detail["type"] == "extra_forbidden":
            text = f"{format_value(name)} is not a setting"
            advice = did_you_mean(name, fields) or "leave it out"
        elif detail["type"] == "missing":
            text, advice = f"{name} is missing", f"set {name}"
        else:
            message, advice = _describe_value_error(detail)
            text = f"{name} is {format_value(detail['input'])}: {message}"
        advice = advice or f"change {name}"
        if field is not None:
            advice += f"{'' if advice.endswith('?') else '.'} {field.description}"
        problems.append(Problem(name, text, advice))
    return join_problems(problems)


def _describe_value_error(detail: ErrorDetails) -> tuple[str, str]:
    """Return what is wrong with a value, "it ...", and what to do, which may be empty."""
    cause = detail.get("ctx", {}).get("error")
    message = str(cause) if isinstance(cause, ValueError) else detail["msg"]
    message, _, advice = message.partition("; ")
    message = message.replace("Input should", "it should")
    if detail["type"].startswith("path_"):
        message = "it is not a path"
    if message.startswith("String should match pattern"):
        message = "it has an invalid format"
    elif not message.startswith(("it ", "String ", "Value ")):
        message = f"it {message}"
    if detail["type"] == "literal_error":
        expected = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        advice = did_you_mean(detail["input"], expected)
    return message, advice


def join_problems(problems: Sequence[Problem]) -> ConfigError:
    """Return one error for all problems, with a line for each."""
    if len(problems) == 1:
        return ConfigError(problems[0].text, fix=problems[0].fix)
    lines = ";\n".join(problem.text for problem in problems)
    fixes = dict.fromkeys(f"{problem.setting}: {problem.fix}" for problem in problems)
    return ConfigError(
        f"{len(problems)} settings are wrong:\n{lines}",
        fix="; ".join(fixes),
    )
