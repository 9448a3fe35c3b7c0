"""Validation of a base's configuration, which would otherwise fail during training or sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from customize.errors import PipelineError
from customize.text import quote

#: Prediction types of diffusers' schedulers.
_PREDICTIONS = ("epsilon", "sample", "original_sample", "v_prediction", "flow_prediction")
#: Start token, end token, and one token between them.
_MIN_TOKENS = 3
_COUNTS = ("num_train_timesteps", "sample_size")


def check_config_values(pipe: Any, where: str) -> None:
    """Check a base's configuration for invalid values.

    Invalid are NaN in diffusers' configurations, counts and sizes below 1, a VAE scaling factor
    that is 0 or not a number, an unknown prediction type, and a CLIP tokenizer's maximum length
    above its encoder's.

    Args:
        pipe: The pipeline.
        where: The base, for the error.

    Raises:
        PipelineError: A value is invalid.
    """
    for file, name, value in _find_invalid_values(pipe.components):
        raise PipelineError(
            f"the base's {file} has the invalid value {name} {quote(value)}",
            where=where,
            fix="get an unchanged copy of the base",
        )


def _find_invalid_values(components: Mapping[str, Any]) -> Iterator[tuple[str, str, object]]:
    for key, component in components.items():
        config = getattr(component, "config", None)
        if isinstance(config, Mapping):  # diffusers; transformers has objects
            for name, value in config.items():
                if _is_invalid(name, value):
                    yield f"{key} configuration", name, value
        if type(component).__name__.startswith("CLIPTokenizer"):
            encoder = components.get(key.replace("tokenizer", "text_encoder"))
            positions = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
            limit, max_limit = component.model_max_length, positions or 10**6
            if not isinstance(limit, int) or not _MIN_TOKENS <= limit <= max_limit:
                yield f"{key}/tokenizer_config.json", "model_max_length", limit


def _is_invalid(name: str, value: object) -> bool:
    if isinstance(value, float) and math.isnan(value):
        return True
    if name in _COUNTS and value is not None:
        counts = value if isinstance(value, list | tuple) else [value]
        return not counts or not all(isinstance(n, int) and n >= 1 for n in counts)
    if name == "scaling_factor":
        return not isinstance(value, int | float) or value == 0 or math.isinf(value)
    return name == "prediction_type" and value not in _PREDICTIONS
