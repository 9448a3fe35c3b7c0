"""What a LoRA file says about itself beside its tensors."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from customize.concepts.concept import MAX_NAME
from customize.concepts.layout import PEFT_HEADER
from customize.errors import ConceptError


@dataclass(frozen=True)
class Metadata:
    """Facts that are read, of what header and configuration say.

    Attributes:
        base: of the base model.
        words: for the prompt.
        configs: component -> peft's configuration; "" for that of the whole file.
    """

    base: str
    words: str
    configs: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(
        cls, header: Mapping[str, str], adapter_config: Mapping[str, Any] | None, where: object
    ) -> Metadata:
        """From a safetensors header and, where there is one, peft's ``adapter_config.json``.

        Raises:
            ConceptError: peft's part of the header is no JSON object, or its numbers are wrong.
        """
        keys = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
        base = next((header[key] for key in keys if header.get(key)), "")
        configs: dict[str, dict[str, Any]] = {}
        if PEFT_HEADER in header:
            try:
                stated = json.loads(header[PEFT_HEADER])
                for key, value in stated.items():
                    component, _, name = key.partition(".")
                    configs.setdefault(component, {})[name] = value
            except (ValueError, AttributeError, RecursionError) as error:
                raise ConceptError(
                    "the adapter's header cannot be parsed", where=where, fix="get the file anew"
                ) from error
        if adapter_config is not None:
            configs[""] = dict(adapter_config)
        for config in configs.values():
            _check(config, where)
        return cls(_line(base), _line(header.get("modelspec.trigger_phrase", "")), configs)

    def scale(self, component: str, module: str, rank: int | None) -> float:
        """What a layer's product is multiplied with, where no key gives its alpha.

        By peft's configuration alpha / rank, or alpha / sqrt(rank) with rank-stabilized LoRA
        (arXiv 2312.03732). Without one alpha is the rank, as diffusers has it.

        Args:
            rank: None for a product that has none, which peft scales by its nominal one.
        """
        config = self.configs.get(component, self.configs.get("", {}))
        alpha = _for_layer(config.get("alpha_pattern"), module, config.get("lora_alpha"))
        alpha = config.get("alpha") if alpha is None else alpha  # of peft's LoHa and LoKr
        nominal = _for_layer(config.get("rank_pattern"), module, config.get("r"))
        size = nominal if rank is None else rank
        if alpha is None or not size:
            return 1.0
        return float(alpha) / (math.sqrt(size) if config.get("use_rslora") else size)


def _for_layer(pattern: Any, module: str, default: Any) -> Any:
    """peft's own rule: the first key that is the layer's name, or the end of it."""
    for key, value in (pattern or {}).items():
        name = _plain_name(key)
        if module == name or (not key.startswith("^") and module.endswith(f".{name}")):
            return value
    return default


def _check(config: Mapping[str, Any], where: object) -> None:
    patterns = [config.get(name) or {} for name in ("alpha_pattern", "rank_pattern")]
    whole = all(isinstance(pattern, dict) for pattern in patterns)
    numbers = [config.get(name) for name in ("r", "lora_alpha", "alpha")]
    if whole:
        numbers += [value for pattern in patterns for value in pattern.values()]
    # JSON's whole numbers may be beyond what a float holds.
    most = sys.float_info.max
    good = all(n is None or (type(n) in (int, float) and 0 <= n <= most) for n in numbers)
    if not whole or not good:
        raise ConceptError(
            "the adapter's configuration has a rank or alpha that is not a number",
            where=where,
            fix="get the file anew",
        )
    for key in (key for pattern in patterns for key in pattern):
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", _plain_name(key)):
            raise ConceptError(
                "the adapter's configuration has a pattern that is no layer's name: "
                f"{key[:MAX_NAME]}",
                where=where,
                fix="ask its maker for a file whose configuration names each layer",
            )


def _plain_name(pattern: str) -> str:
    """The layer's name in a pattern: peft takes regular expressions, which are not run here."""
    return pattern.removeprefix("^").removesuffix("$").replace("\\", "")


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:500]
