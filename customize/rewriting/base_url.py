"""Addresses of endpoints."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit

from customize.errors import ConfigError

_EXAMPLE = 'give an address such as "http://localhost:11434/v1"'


def normalize_base_url(url: object) -> str:
    """Return the address of an endpoint with its host in lower case and without its last slash.

    Raises:
        ConfigError: It is not http:// or https:// with a host, has credentials or a query, or is
            that of one function. The message does not quote it: it may have a key.
    """

    def refuse(problem: str, fix: str = _EXAMPLE) -> ConfigError:
        return ConfigError(problem, where="base_url", fix=fix)

    if not isinstance(url, str) or not url.isascii() or not url.isprintable() or " " in url:
        raise refuse("the address is not a text of printable ASCII characters without spaces")
    parts = _split(url)
    if parts is None:
        raise refuse("the address has an invalid host or port")
    if "@" in parts.netloc:
        raise refuse(
            "the address has credentials, which would be saved with it",
            "leave them out, and set the environment variable that api_key_variable names",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise refuse("the address is not http:// or https:// with a host")
    if "?" in url or "#" in url:
        raise refuse("the address has a query or a fragment", "leave out what follows the path")
    path = parts.path.rstrip("/")
    if path.endswith("/chat/completions"):
        raise refuse("the address ends in /chat/completions", "leave that out")
    return f"{parts.scheme}://{parts.netloc.lower()}{path}"


def _split(url: str) -> SplitResult | None:
    """Split an address; None for a port such as 99999, or a label of 64 characters."""
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")
        return parts if parts.port is None or parts.port > 0 else None
    except ValueError:
        return None


def is_local_host(host: str) -> bool:
    """Whether a host is this computer or one of a private network, by its name or address."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".localhost", ".local", ".internal"))
