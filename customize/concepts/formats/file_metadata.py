"""What a LoRA file says about itself beside its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from customize.concepts.formats.layer_patterns import PatternMatcher
from customize.concepts.formats.peft_config import (
    Config,
    adapter_scale,
    check_config,
    subtracted_initialization,
)
from customize.concepts.io.file_layout import PEFT_HEADER
from customize.errors import ConceptError

_DENOISERS = ("transformer", "unet", "diffusion_model", "base_model.model")


@dataclass(frozen=True)
class FileMetadata:
    """Facts that are read, of what header and configuration say.

    Attributes:
        base: of the base model.
        words: for the prompt.
        configs: component -> peft's configuration; "" for that of the whole file.
        matcher: of the configurations' patterns.
    """

    base: str
    words: str
    configs: Mapping[str, Config]
    matcher: PatternMatcher = field(compare=False, repr=False)

    @classmethod
    def from_header(
        cls, header: Mapping[str, str], adapter_config: Mapping[str, Any] | None, where: object
    ) -> FileMetadata:
        """From a safetensors header and, where there is one, peft's ``adapter_config.json``.

        What the header says of a component, or without one of all, goes before the file beside it.

        Raises:
            ConceptError: peft's part of the header is no JSON object, its numbers are wrong, or
                the adapter is more than its tensors show (:func:`peft_config.check_config`).
        """
        keys = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
        base = next((header[key] for key in keys if header.get(key)), "")
        configs: dict[str, dict[str, Any]] = {}
        if adapter_config is not None:
            configs[""] = dict(adapter_config)
        configs |= _parse_header_configs(header, where)
        for config in configs.values():
            check_config(config, where)
        words = _single_line(header.get("modelspec.trigger_phrase", ""))
        return cls(_single_line(base), words, configs, PatternMatcher(where))

    def config(self, component: str) -> Config:
        """peft's configuration of a component; empty where there is none."""
        names: tuple[str, ...] = (component, "")
        if not component.startswith("text_encoder"):
            names += _DENOISERS  # as files call it whose layers bear other names
        return next((self.configs[name] for name in names if name in self.configs), {})

    @property
    def needs_base_weights(self) -> bool:
        """Whether an adapter was begun with a part of the base's weights, as with PiSSA."""
        return any(subtracted_initialization(config) for config in self.configs.values())

    def scale(self, component: str, names: Sequence[str], rank: int | None) -> float:
        """What a layer's product is multiplied with, where no key gives its alpha.

        By peft's configuration (:func:`peft_config.scale_of`); without one alpha is the rank, as
        diffusers has it.

        Args:
            names: all names of the layer.
            rank: None for a product that has none.

        Raises:
            ConceptError: the configuration's patterns take too long to match.
        """
        return adapter_scale(self.config(component), names, rank, self.matcher)


def _parse_header_configs(header: Mapping[str, str], where: object) -> dict[str, dict[str, Any]]:
    """Component -> field -> value; the component is "" where the header names none."""
    if PEFT_HEADER not in header:
        return {}
    found: dict[str, dict[str, Any]] = {}
    try:
        for key, value in json.loads(header[PEFT_HEADER]).items():
            component, _, name = key.rpartition(".")
            found.setdefault(component, {})[name] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConceptError(
            "the adapter's header cannot be parsed", where=where, fix="get the file anew"
        ) from error
    return found


def _single_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:500]
