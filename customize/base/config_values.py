"""Values in a base's configuration that nothing can be drawn or learned with.

Files of others may hold anything. What is refused here would end in an error of another library
in the middle of a run, or in pictures of NaN for which learning rates would be blamed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from customize.errors import PipelineError
from customize.text import quote

#: What diffusers' schedulers know.
_PREDICTIONS = ("epsilon", "sample", "original_sample", "v_prediction", "flow_prediction")
#: A beginning, an end, and a token between them.
_MIN_TOKENS = 3
_COUNTS = ("num_train_timesteps", "sample_size")


def check_config_values(pipe: Any, where: str) -> None:
    """Refuse a base whose configurations have a value that makes no sense.

    That is NaN anywhere in diffusers' configurations, counts and sizes below 1, a VAE's scaling
    factor that is 0 or no number, an unknown prediction type, and limits of CLIP tokenizers that
    their encoders cannot read.

    Raises:
        PipelineError: naming the first.
    """
    for file, name, value in _odd_values(pipe.components):
        raise PipelineError(
            f"the base's {file} has {name} {quote(value)}, which cannot be used",
            where=where,
            fix="get an unchanged copy of the base",
        )


def _odd_values(parts: Mapping[str, Any]) -> Iterator[tuple[str, str, object]]:
    for key, part in parts.items():
        config = getattr(part, "config", None)
        if isinstance(config, Mapping):  # diffusers'; those of transformers are objects
            for name, value in config.items():
                if _is_odd(name, value):
                    yield f"{key} configuration", name, value
        if type(part).__name__.startswith("CLIPTokenizer"):
            encoder = parts.get(key.replace("tokenizer", "text_encoder"))
            positions = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
            limit, most = part.model_max_length, positions or 10**6
            if not isinstance(limit, int) or not _MIN_TOKENS <= limit <= most:
                yield f"{key}/tokenizer_config.json", "model_max_length", limit


def _is_odd(name: str, value: object) -> bool:
    if isinstance(value, float) and math.isnan(value):
        return True
    if name in _COUNTS and value is not None:
        counts = value if isinstance(value, list | tuple) else [value]
        return not counts or not all(isinstance(n, int) and n >= 1 for n in counts)
    if name == "scaling_factor":
        return not isinstance(value, int | float) or value == 0 or math.isinf(value)
    return name == "prediction_type" and value not in _PREDICTIONS
