"""Keys of endpoints: read from the environment when they are needed, and kept out of texts."""

from __future__ import annotations

import os
import re

from customize.errors import ConfigError, EndpointError

#: Shorter keys are placeholders, such as vLLM's ``EMPTY``, which occur in texts by chance. Parts of
#: a key of this length are secret as well.
MIN_SECRET_LENGTH = 8
KEY_REPLACEMENT = "[key]"


def check_variable_name(variable: object) -> None:
    """Check the name of the environment variable that has the key; None is for no key.

    Raises:
        ConfigError: It is no such name. The message does not quote it: it may be a key.
    """
    # Capitals alone, as keys such as hf_... would otherwise be valid names.
    is_name = isinstance(variable, str) and re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable)
    if variable is None or is_name:
        return
    raise ConfigError(
        "the name of the environment variable with the key is invalid",
        where="api_key_variable",
        fix='give the name of a variable in capitals, such as "OPENAI_API_KEY", and set that '
        "variable to the key; None sends no key",
    )


def read_api_key(variable: str | None) -> str | None:
    """Return the key from an environment variable, or None if it is not set or blank.

    Raises:
        EndpointError: The key has characters that an HTTP header cannot have.
    """
    key = os.environ.get(variable, "").strip() if variable else ""
    if key and not (key.isascii() and key.isprintable()):
        raise EndpointError(
            "the key has characters other than printable ASCII",
            where=variable,
            fix="set the variable to the key alone, on one line",
        )
    return key or None


def redact(text: str, key: str | None) -> str:
    """Replace a key and its parts of 8 or more characters in a text."""
    if not key:
        return text
    starts = range(len(key) - MIN_SECRET_LENGTH + 1)
    parts = [key, *(key[start : start + MIN_SECRET_LENGTH] for start in starts)]
    return re.sub("|".join(map(re.escape, parts)), KEY_REPLACEMENT, text, flags=re.IGNORECASE)
