"""The metadata of an adapter file: its safetensors header and peft's configuration."""

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
    """The facts in the header and the configuration that are used.

    Attributes:
        base: Name of the base model; empty if unknown.
        words: Trigger phrase for prompts; empty if there is none.
        configs: Component -> peft's configuration; the component is "" for the whole file.
        matcher: Matches the patterns of the configurations.
    """

    base: str
    words: str
    configs: Mapping[str, Config]
    matcher: PatternMatcher = field(compare=False, repr=False)

    @classmethod
    def from_header(
        cls, header: Mapping[str, str], adapter_config: Mapping[str, Any] | None, where: object
    ) -> FileMetadata:
        """Parse a safetensors header and peft's ``adapter_config.json``.

        A configuration in the header takes precedence over the file.

        Args:
            header: The safetensors header.
            adapter_config: The file beside the tensors; None if there is none.
            where: Path of the file, for messages.

        Raises:
            ConceptError: If peft's part of the header is not a JSON object, or
                :func:`customize.concepts.formats.peft_config.check_config` refuses a configuration.
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
        """Look up peft's configuration of a component; empty if there is none."""
        names: tuple[str, ...] = (component, "")
        if not component.startswith("text_encoder"):
            names += _DENOISERS  # files with other layer names use these for any denoiser
        return next((self.configs[name] for name in names if name in self.configs), {})

    @property
    def needs_base_weights(self) -> bool:
        """Whether the adapter was initialized with a part of the base weights, such as PiSSA."""
        return any(subtracted_initialization(config) for config in self.configs.values())

    def scale(self, component: str, names: Sequence[str], rank: int | None) -> float:
        """Compute the factor of a layer's update, for layers without an alpha of their own.

        It follows peft's configuration
        (:func:`customize.concepts.formats.peft_config.adapter_scale`); without one alpha is the
        rank, as in diffusers.

        Args:
            component: The component of the layer.
            names: All names of the layer.
            rank: The rank of the update; None if it has none.

        Raises:
            ConceptError: If the configuration's patterns take too long to match.
        """
        return adapter_scale(self.config(component), names, rank, self.matcher)


def _parse_header_configs(header: Mapping[str, str], where: object) -> dict[str, dict[str, Any]]:
    """Component -> field -> value; the component is "" if the header does not name it."""
    if PEFT_HEADER not in header:
        return {}
    configs: dict[str, dict[str, Any]] = {}
    try:
        for key, value in json.loads(header[PEFT_HEADER]).items():
            component, _, name = key.rpartition(".")
            configs.setdefault(component, {})[name] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConceptError(
            "the adapter's header cannot be parsed", where=where, fix="download the file again"
        ) from error
    return configs


def _single_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:500]
