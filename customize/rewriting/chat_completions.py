"""Requests and answers of OpenAI's chat-completions interface, as JSON."""

from __future__ import annotations

import json
from typing import Any

from customize.errors import EndpointError
from customize.rewriting.language_model import Chat, Completion, Sampling

#: Reasons for which a text ends before its model ends it.
CUT_REASONS = ("length", "content_filter")


def encode_request(model: str, chat: Chat, sampling: Sampling) -> bytes:
    """Return the body of a request: the fields that all servers know."""
    request = {
        "model": model,
        "messages": [
            {"role": message.role, "content": _replace_surrogates(message.content)}
            for message in chat.messages
        ],
        "temperature": sampling.temperature,
        "seed": chat.seed,
        "max_tokens": sampling.max_new_tokens,
    }
    return json.dumps(request).encode("ascii")


def decode_completion(body: bytes, where: str) -> Completion:
    """Return the completion that an answer has.

    Args:
        body: The body of the answer.
        where: The endpoint, for messages, which do not quote the answer.

    Raises:
        EndpointError: It is not JSON, or JSON without a completion.
    """
    answer = _decode_json(body)
    choice = _get(_get(answer, "choices"), 0)
    content, reason = _get(_get(choice, "message"), "content"), _get(choice, "finish_reason")
    if isinstance(content, str):
        return Completion(_replace_surrogates(content), reason not in CUT_REASONS)
    fix = "check that base_url is that of an OpenAI-compatible server, such as vLLM or Ollama"
    if answer is None:
        raise EndpointError("the answer is not JSON", where=where, fix=fix)
    if not isinstance(_get(choice, "message"), dict):
        raise EndpointError("the answer has no completion", where=where, fix=fix)
    if content is None and reason == "length":
        raise EndpointError(
            "the completion has no text: its tokens went into reasoning",
            where=where,
            fix="raise max_new_tokens, or choose a model without reasoning",
        )
    raise EndpointError(
        f"the completion's content is {type(content).__name__}, not a text",
        where=where,
        fix="choose a model that answers in text",
    )


def decode_error(body: bytes) -> str:
    """Return what a server says about an error; an empty text for completions and other answers."""
    answer = _decode_json(body)
    if _get(answer, "choices"):
        return ""
    error = _get(answer, "error")
    texts = (_get(error, "message"), error, _get(answer, "message"), _get(answer, "detail"))
    return next((text for text in texts if isinstance(text, str)), "")


def _decode_json(body: bytes) -> Any:
    """Return the value, or None for what is not JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _get(value: Any, key: str | int) -> Any:
    """Return an entry of a JSON object or array, or None."""
    if isinstance(value, dict):
        return value.get(key)
    if isinstance(value, list) and isinstance(key, int):
        return value[key] if key < len(value) else None
    return None


def _replace_surrogates(text: str) -> str:
    """Join pairs of surrogates, and replace lone ones, which no encoding has, with U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
