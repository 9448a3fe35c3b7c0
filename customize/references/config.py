"""The configuration of a reference encoder and its adapter: ``references.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from customize.core.scalars import as_float, is_integer
from customize.errors import ConfigError
from customize.near_names import did_you_mean
from customize.text import quote

Attention = Literal["causal", "bidirectional"]
Positions = Literal["running", "image_grid"]

#: The sentence before the prompt for weights that are trained here.
INSTRUCTION = "draw what these images share :"


@dataclass(frozen=True)
class ReferencesConfig:
    """How groups of images are read, and which denoisers take the result.

    Attributes:
        family: Model family of the denoiser, such as "sdxl".
        width: Width of the reference tokens; that of the denoiser's encoded prompts.
        num_tokens: Number of reference tokens of a group, whatever its size.
        attention: Attention of the reference tokens among themselves in the final layer. "causal"
            is what EasyRef's weights were trained with.
        positions: Rotary positions of image tokens. "running": their index in the sequence, as
            EasyRef's weights; "image_grid": row and column, as the MLLM was trained.
        normalize_twice: Whether the states are normalized before the final layer as well as after
            it, as EasyRef's weights.
        instruction: The sentence that follows the images.
        includes_prompt: Whether the prompt follows the instruction on a line of its own. If not,
            the tokens of a group are those of every prompt.
        max_references: Largest number of images of a group.
        lora_rank: Rank of the adapter's LoRA on the attention projections; 0 for none.
        lora_alpha: Its alpha, above 0; the factor of its product is ``alpha / rank``.
        attributes: The words for attributes of images that the model was trained with, such as
            "colour"; empty for a model that was trained without, None if they are unknown.

    Raises:
        ConfigError: A value is out of its range.
    """

    family: str
    width: int
    num_tokens: int = 64
    attention: Attention = "causal"
    positions: Positions = "running"
    normalize_twice: bool = True
    instruction: str = INSTRUCTION
    includes_prompt: bool = True
    max_references: int = 28
    lora_rank: int = 0
    lora_alpha: float = 1.0
    attributes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        fixes: dict[str, str] = {}  # of invalid values
        for name, choices in (("attention", get_args(Attention)), ("positions", _POSITIONS)):
            value = getattr(self, name)
            if value not in choices:
                fixes[name] = did_you_mean(value, choices) or f"choose from {', '.join(choices)}"
        for kind, names, fix in (
            (str, ("family", "instruction"), "give a text"),
            (bool, ("normalize_twice", "includes_prompt"), "give true or false"),
        ):
            fixes |= {name: fix for name in names if not isinstance(getattr(self, name), kind)}
        lowest = {"width": 1, "num_tokens": 1, "max_references": 1, "lora_rank": 0}
        for name, low in lowest.items():
            if not is_integer(getattr(self, name), low, 2**16):
                fixes[name] = f"give an integer from {low} to {2**16:,}"
        if not as_float(self.lora_alpha) > 0:
            fixes["lora_alpha"] = "give a number above 0"
        if self.attributes is not None and not _are_texts(self.attributes):
            fixes["attributes"] = "give a list of words"
        for name, fix in fixes.items():
            raise ConfigError(f"invalid {name} {quote(getattr(self, name))}", where=name, fix=fix)
        if self.attributes is not None:  # a list in JSON
            object.__setattr__(self, "attributes", tuple(self.attributes))

    def to_json(self) -> str:
        """Return the configuration as JSON text."""
        values = dataclasses.asdict(self)
        if self.attributes is None:
            del values["attributes"]
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


_POSITIONS = get_args(Positions)


def _are_texts(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(v, str) and v for v in values)


def parse_config(values: Mapping[str, Any], where: Any) -> ReferencesConfig:
    """Convert the values of a ``references.json``.

    Args:
        values: Name -> value.
        where: The file, for messages.

    Raises:
        ConfigError: A value is missing, unknown or out of its range.
    """
    fields = {field.name: field for field in dataclasses.fields(ReferencesConfig)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(
            f"unknown settings of references: {', '.join(map(quote, unknown))}",
            where=where,
            fix="update customize, or restore the file",
        )
    missing = sorted({"family", "width"} - set(values))
    if missing:
        raise ConfigError(f"{' and '.join(missing)} is missing", where=where, fix="restore it")
    try:
        return ReferencesConfig(**values)
    except ConfigError as error:
        raise ConfigError(error.problem, where=where, fix=error.fix) from None
