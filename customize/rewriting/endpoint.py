"""Language models behind OpenAI-compatible endpoints: vLLM, Ollama, llama.cpp, OpenAI."""

from __future__ import annotations

import functools
import hashlib
import json
import socket
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass
from http.client import HTTPException, responses
from urllib.parse import urlsplit

from customize.errors import ConfigError, EndpointError
from customize.rewriting.api_key import (
    KEY_REPLACEMENT,
    MIN_SECRET_LENGTH,
    check_variable_name,
    read_api_key,
    redact,
)
from customize.rewriting.base_url import is_local_host, normalize_base_url
from customize.rewriting.bounded_http import MAX_RESPONSE_BYTES, Response, post
from customize.rewriting.chat_completions import decode_completion, decode_error, encode_request
from customize.rewriting.language_model import AfterUse, Chat, Completion, Message, Sampling
from customize.text import plural, quote
from customize.user_warnings import warn_user

#: Seconds before each retry, where the server names none.
RETRY_DELAYS = (0.5, 1.0, 2.0)
#: Largest ``Retry-After`` that is waited for, seconds.
MAX_RETRY_AFTER = 10.0
#: Statuses of overloaded and starting servers.
RETRIED_STATUSES = (429, 500, 502, 503, 504)
#: Maximum number of chats that are sent at the same time.
MAX_CONNECTIONS = 4
#: Largest timeout, seconds.
MAX_TIMEOUT = 3600.0
#: Maximum number of characters of what a server says in messages.
MAX_QUOTED_LENGTH = 500
_WRONG_SERVER = "check that base_url is that of an OpenAI-compatible server, such as vLLM or Ollama"


@dataclass(frozen=True)
class _Failure:
    """Why an attempt failed, what the user can do, and when the next attempt can succeed."""

    problem: str
    fix: str
    is_temporary: bool = False
    retry_after: str | None = None


@dataclass(frozen=True)
class Endpoint:
    """A language model behind an OpenAI-compatible endpoint.

    The key is read from the environment at each call and stored nowhere. Redirects are not
    followed, and the proxies of the environment are not used. Several chats are sent at the same
    time, at most 4.

    Args:
        base_url: Address of the server's interface, such as ``http://localhost:11434/v1``.
        model: Name of the model on the server.
        timeout: Maximum seconds for the completion of a chat, with all retries.
        api_key_variable: Name of the environment variable with the key. A variable that is not
            set, and None, send no key.

    Raises:
        ConfigError: An argument is invalid, or the address has credentials or a query.
    """

    base_url: str
    model: str
    _: KW_ONLY
    timeout: float = 30.0
    api_key_variable: str | None = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_url", normalize_base_url(self.base_url))
        model, timeout = self.model, self.timeout
        if not isinstance(model, str) or not model.strip() or not model.isprintable():
            raise ConfigError(
                f"invalid name of a model {quote(model)}",
                where="model",
                fix="give a name that the server lists at /v1/models",
            )
        number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if not number or not 0 < timeout <= MAX_TIMEOUT:
            raise ConfigError(
                f"invalid timeout {quote(timeout)}",
                where="timeout",
                fix=f"give a number of seconds above 0, up to {MAX_TIMEOUT:,.0f}",
            )
        check_variable_name(self.api_key_variable)

    @property
    def name(self) -> str:
        """The model and its host."""
        return f"{self.model} at {self._host}"

    @property
    def digest(self) -> str:
        """Digest of the address and the model; whether a server repeats itself is up to it."""
        text = json.dumps(["endpoint", self.base_url, self.model])
        return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]

    @property
    def _host(self) -> str:
        return urlsplit(self.base_url).netloc

    @property
    def can_reload(self) -> bool:
        """True: there are no weights here."""
        return True

    def complete(
        self, chats: Sequence[Chat], sampling: Sampling
    ) -> list[Completion | EndpointError]:
        """Return the completion of each chat, or why the endpoint does not complete it in time.

        Lone surrogates in messages and completions become U+FFFD.
        """
        try:
            key = read_api_key(self.api_key_variable)
        except EndpointError as error:
            return [error.with_traceback(None)] * len(chats)
        if key and self.base_url.startswith("http:"):
            _warn_of_plain_http(urlsplit(self.base_url).hostname or "")

        def complete_chat(chat: Chat) -> Completion | EndpointError:
            try:
                body = self._request(encode_request(self.model, chat, sampling), key)
                completion = decode_completion(body, self._host)
            except EndpointError as error:
                return error.with_traceback(None)  # whose frames have the key
            if key and len(key) >= MIN_SECRET_LENGTH:
                text = completion.text.replace(key, KEY_REPLACEMENT)
                return Completion(text, completion.is_complete)
            return completion

        if len(chats) < 2:
            return [complete_chat(chat) for chat in chats]
        with ThreadPoolExecutor(min(MAX_CONNECTIONS, len(chats)), "endpoint") as pool:
            return list(pool.map(complete_chat, chats))

    def check_length(self, messages: Sequence[Message], max_new_tokens: int) -> None:
        """Do nothing: the server refuses chats that are too long."""

    def use(self, device: object = None, after: AfterUse = "keep") -> AbstractContextManager[None]:
        """Do nothing: the model runs on its server."""
        return nullcontext()

    def _request(self, request: bytes, key: str | None) -> bytes:
        """Send a request until it succeeds, and return the body of the answer."""
        deadline = time.monotonic() + self.timeout
        retries = 0
        while not isinstance(answer := self._attempt(request, key, deadline), bytes):
            delay = retry_delay(retries, answer.retry_after) if answer.is_temporary else None
            if delay is None or time.monotonic() + delay >= deadline:
                tries = f", after {plural(retries + 1, 'attempt')}" if retries else ""
                raise EndpointError(answer.problem + tries, where=self._host, fix=answer.fix)
            time.sleep(delay)
            retries += 1
        return answer

    def _attempt(self, request: bytes, key: str | None, deadline: float) -> bytes | _Failure:
        headers = {"Content-Type": "application/json", "User-Agent": "diffusers-customize"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            response = post(f"{self.base_url}/chat/completions", request, headers, deadline)
        except (OSError, HTTPException, ValueError) as error:
            return _connection_failure(error, self.timeout)
        said = redact(decode_error(response.body)[:MAX_QUOTED_LENGTH], key)
        if response.status != 200:
            return self._status_failure(response, said, key)
        if response.is_truncated:
            return _Failure(f"the answer has more than {MAX_RESPONSE_BYTES:,} bytes", _WRONG_SERVER)
        if said:
            return _Failure(
                f"the endpoint answers an error: {quote(said, MAX_QUOTED_LENGTH)}", _WRONG_SERVER
            )
        return response.body

    def _status_failure(self, response: Response, said: str, key: str | None) -> _Failure:
        status, variable = response.status, self.api_key_variable
        problem = f"the endpoint answers {status} {responses.get(status, '')}".rstrip()
        problem += f": {quote(said, MAX_QUOTED_LENGTH)}" if said else ""
        if 300 <= status < 400:
            target = redact((response.location or "").split("?")[0][:MAX_QUOTED_LENGTH], key)
            problem += f", a redirect to {quote(target)}"
            fix = "give the address after the redirect as base_url"
        elif status in (401, 403) and not variable:
            fix = "pass api_key_variable=, the name of the environment variable with the key"
        elif status in (401, 403):
            state = "has a key that the endpoint refuses" if key else "is not set"
            fix = f"set the environment variable {variable} to a valid key; now it {state}"
        elif status == 404:
            fix = f"check base_url, which usually ends in /v1, and model={quote(self.model)}"
        elif status == 400:
            fix = "choose a model that takes the chat, temperature, seed and max_tokens"
        elif status == 429:
            fix = "wait, or raise the quota of the key"
        elif status >= 500:
            fix = "see the server's log, or try again later"
        else:
            fix = _WRONG_SERVER
        return _Failure(problem, fix, status in RETRIED_STATUSES, response.retry_after)


def retry_delay(retries: int, retry_after: str | None = None) -> float | None:
    """Return the seconds before the next attempt, or None if there is none.

    Args:
        retries: Number of retries so far.
        retry_after: The server's header, of which whole seconds are read, up to 10.
    """
    if retries >= len(RETRY_DELAYS):
        return None
    if retry_after is not None and retry_after.isascii() and retry_after.isdigit():
        return min(float(retry_after), MAX_RETRY_AFTER)
    return RETRY_DELAYS[retries]


def _connection_failure(error: Exception, timeout: float) -> _Failure:
    if isinstance(error, TimeoutError):
        return _Failure(
            f"no complete answer within {timeout:g} s",
            "check that the server is ready, or raise timeout",
        )
    if isinstance(error, ConnectionRefusedError):
        return _Failure(
            "the connection is refused",
            "start the server, or correct the host and port of base_url",
            is_temporary=True,
        )
    if isinstance(error, socket.gaierror | UnicodeError):
        return _Failure("the host is unknown", "correct base_url, or check the network")
    if isinstance(error, ssl.SSLCertVerificationError):
        return _Failure(
            f"the certificate is invalid: {error.verify_message}",
            "correct base_url, or set SSL_CERT_FILE to the certificates of your authority",
        )
    if isinstance(error, ssl.SSLError):
        return _Failure(f"TLS fails: {quote(error.reason)}", "check whether base_url needs http://")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "not HTTP"
    return _Failure(f"the connection fails ({type(error).__name__}: {reason})", _WRONG_SERVER)


@functools.cache
def _warn_of_plain_http(host: str) -> None:
    """Warn once for each host to which a key is sent in plain text."""
    if not is_local_host(host):
        warn_user(f"the key is sent to {host} without encryption: use https://")
