"""The numbers of tokens that the text encoders of a pipeline read."""

from __future__ import annotations

import inspect
from typing import Any

from customize.concepts.tokens.token_limit import TokenLimit
from customize.errors import PipelineError
from customize.pipeline.stage import CallArguments, CallContext
from customize.pipeline.state import AttachedState, get_state


def token_limits(context: CallContext, call: CallArguments) -> list[TokenLimit]:
    """Return the limit of each text encoder; none where a pipeline splits long prompts.

    Args:
        context: The pipeline that is called.
        call: The arguments of the call.

    Raises:
        PipelineError: The family of the pipeline is unknown.
    """
    if "max_embeddings_multiples" in context.parameters:
        return []  # a community pipeline that splits long prompts
    family = context.family
    tokenizers = {key: family.tokenizer_for(key) for key in family.all_text_encoders}
    return [
        TokenLimit(key, tokenizer, _limit(context, call, key, tokenizer))
        for key, tokenizer in tokenizers.items()
    ]


def default_token_limits(pipe: Any) -> list[TokenLimit]:
    """Return the limit of each text encoder in a call by defaults; none in unknown families."""
    signature = inspect.signature(type(pipe).__call__)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    try:
        return token_limits(CallContext(pipe, get_state(pipe) or AttachedState(), defaults), {})
    except PipelineError:
        return []


def own_argument(encoder: str, argument: str = "prompt") -> str:
    """Return the call argument that replaces a prompt for one encoder, such as ``prompt_2``."""
    return argument + encoder.removeprefix("text_encoder")


def _limit(context: CallContext, call: CallArguments, key: str, tokenizer: Any) -> int | None:
    if not hasattr(tokenizer, "num_special_tokens_to_add"):
        return None
    if key in context.family.clip_encoders:
        return int(tokenizer.model_max_length)
    length = call.get("max_sequence_length", context.parameters.get("max_sequence_length"))
    return length if isinstance(length, int) else None
