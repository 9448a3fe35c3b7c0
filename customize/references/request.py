"""What a call asks for: groups of reference images and their scales."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from customize.errors import ConfigError
from customize.references.group import SUFFIX, ReferenceGroup
from customize.references.images import ARGUMENT, Group, read_group, read_groups
from customize.references.scale import SCALE_ARGUMENT, read_scale
from customize.references.seams.attachment import Scale, scale_of
from customize.text import plural, quote

#: A group that is encoded already, or its images.
Source = ReferenceGroup | Group


@dataclass(frozen=True, eq=False)
class ReferenceRequest:
    """The references of a call.

    Attributes:
        sources: For each prompt: words of the prompt, or None for all of it -> group.
        scales: The scale of each, with the same keys.
        layer_scale: Scale in each layer of the denoiser, which these multiply.
    """

    sources: tuple[Mapping[str | None, Source], ...]
    scales: tuple[Mapping[str | None, float], ...]
    layer_scale: Scale

    def is_zero(self, modules: Iterable[str]) -> bool:
        """Whether no group has an effect.

        Args:
            modules: Names of the denoiser's modules that read references, or have a LoRA.
        """
        has_scale = any(any(scales.values()) for scales in self.scales)
        return not has_scale or all(scale_of(self.layer_scale, name) == 0.0 for name in modules)


def parse_request(
    images: Any, scale: Any, num_prompts: int, expand: Callable[[Any], Scale]
) -> ReferenceRequest:
    """Read the arguments ``reference_images=`` and ``reference_scale=`` of a call.

    Args:
        images: What :func:`~customize.references.images.read_groups` reads; or a group, or the path
            of its file; or a dict from words of the prompt to one of these; or a list with one for
            each prompt.
        scale: A number; for several groups a list, or with words a dict, of numbers; or what
            ``expand`` takes. None: 1.
        num_prompts: Number of prompts of the call.
        expand: Converts a scale by block, as diffusers' ``set_ip_adapter_scale`` takes it.

    Raises:
        ConfigError: An argument has another form, or a scale is out of range.
        DataError: An image or a group cannot be read.
    """
    per_prompt = _read_sources(images, num_prompts)
    words = {key for sources in per_prompt for key in sources if key is not None}
    layer_scale: Scale = 1.0
    factors: list[Mapping[str | None, float]]
    if isinstance(scale, Mapping) and not scale:
        raise ConfigError(
            "the dict of scales is empty", where=SCALE_ARGUMENT, fix="leave the argument out"
        )
    if isinstance(scale, Mapping) and words & set(scale):
        _check_words(scale, words)
        factors = [
            {key: read_scale(1.0 if key is None else scale.get(key, 1.0)) for key in sources}
            for sources in per_prompt
        ]
    elif isinstance(scale, Mapping):
        layer_scale = expand(scale)
        factors = [dict.fromkeys(sources, 1.0) for sources in per_prompt]
    elif isinstance(scale, list | tuple):
        if len(scale) != num_prompts:
            raise ConfigError(
                f"{plural(len(scale), 'scale')} in a list for {plural(num_prompts, 'prompt')}",
                where=SCALE_ARGUMENT,
                fix="give one number, or one for each prompt",
            )
        factors = [
            dict.fromkeys(sources, read_scale(number))
            for sources, number in zip(per_prompt, scale, strict=True)
        ]
    else:
        layer_scale = 1.0 if scale is None else read_scale(scale)
        factors = [dict.fromkeys(sources, 1.0) for sources in per_prompt]
    return ReferenceRequest(tuple(per_prompt), tuple(factors), layer_scale)


def _read_sources(images: Any, num_prompts: int) -> list[Mapping[str | None, Source]]:
    """Return the groups of each prompt, by words or None."""
    if isinstance(images, Mapping):
        by_words: dict[str | None, Source] = {
            _check_key(key): _read_source(value, _where(key)) for key, value in images.items()
        }
        if not by_words:
            raise ConfigError(
                "there are no references", where=ARGUMENT, fix="leave the argument out"
            )
        return [by_words] * num_prompts
    if isinstance(images, list | tuple) and any(isinstance(item, Mapping) for item in images):
        _check_number(len(images), num_prompts)
        dicts = [_read_sources(item, 1)[0] for item in images]
        return (dicts * num_prompts)[:num_prompts]
    if is_encoded(images):
        return [{None: _read_source(images, ARGUMENT)}] * num_prompts
    if isinstance(images, list | tuple) and any(map(is_encoded, images)):
        _check_number(len(images), num_prompts)
        groups = [_read_source(item, _where(index)) for index, item in enumerate(images)]
        return [{None: group} for group in (groups * num_prompts)[:num_prompts]]
    read = read_groups(images, num_prompts)
    return [{None: group} for group in (read * num_prompts)[:num_prompts]]


def _read_source(value: Any, where: str) -> Source:
    if isinstance(value, ReferenceGroup):
        return value
    return ReferenceGroup.load(value) if is_encoded(value) else read_group(value, where)


def is_encoded(value: Any) -> bool:
    """Whether a value is an encoded group, or the path of one."""
    if isinstance(value, ReferenceGroup):
        return True
    return isinstance(value, str | os.PathLike) and os.fsdecode(value).lower().endswith(SUFFIX)


def _check_words(scale: Mapping[str, Any], words: Sequence[Any] | set[Any]) -> None:
    unknown = [key for key in scale if key not in words]
    if unknown:
        raise ConfigError(
            f"a scale is given for {quote(unknown[0])}, which has no references",
            where=SCALE_ARGUMENT,
            fix=f"give the words of {ARGUMENT}=",
        )


def _check_key(key: Any) -> str:
    if not isinstance(key, str) or not key.strip():
        raise ConfigError(
            f"the key of a group must be words of the prompt, not {quote(key)}", where=ARGUMENT
        )
    return key


def _check_number(number: int, num_prompts: int) -> None:
    if number not in (1, num_prompts):
        raise ConfigError(
            f"{number} groups of reference images were given for {plural(num_prompts, 'prompt')}",
            where=ARGUMENT,
            fix="give one group for all prompts, or one for each prompt",
        )


def _where(key: Any) -> str:
    return f"{ARGUMENT}[{quote(key) if isinstance(key, str) else key}]"
