"""The language model that a command rewrites prompts with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from customize.errors import ConfigError

if TYPE_CHECKING:
    from customize.stages.rewrite import Rewriter

ENDPOINT_FLAG = "--endpoint-model"


def check_rewriter_flags(source: str | None, endpoint_model: str | None, flag: str) -> None:
    """Refuse an address without the name of a model, and a name without an address.

    Args:
        source: Folder, hub id, GGUF file or name of a model, or the address of an endpoint.
        endpoint_model: Name of the model behind the endpoint.
        flag: Flag of the source.

    Raises:
        ConfigError: One of them is missing.
    """
    if source is not None and is_address(source):
        if endpoint_model is None:
            raise ConfigError(
                "an endpoint has several models, and none is named",
                where=f"{flag} {source}",
                fix=f"add {ENDPOINT_FLAG}, such as {ENDPOINT_FLAG} llama3.2",
            )
    elif endpoint_model is not None:
        raise ConfigError(
            f"{ENDPOINT_FLAG} was given without the address of an endpoint",
            where=ENDPOINT_FLAG,
            fix=f"add for example {flag} http://localhost:11434/v1, or remove {ENDPOINT_FLAG}",
        )


def load_rewriter(source: str, endpoint_model: str | None) -> Rewriter:
    """Load a language model, or name one behind an endpoint.

    Raises:
        CustomizeError: The model cannot be loaded, or the address is wrong.
    """
    from customize.stages.rewrite import Rewriter

    if endpoint_model is not None:
        return Rewriter.from_endpoint(source, endpoint_model)
    return Rewriter.from_pretrained(source)


def is_address(source: str) -> bool:
    """Whether a source is the address of an endpoint."""
    return source.lower().startswith(("http://", "https://"))
