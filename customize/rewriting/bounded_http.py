"""HTTP requests with a limit on their whole duration and on the size of the answer.

The clients of huggingface_hub and urllib3 limit the time between two packets, so that a server that
sends a byte now and then holds them forever; huggingface_hub's also sends the user's token. Here
``http.client`` reads from a socket with a deadline. Redirects are not followed, and the proxies of
the environment are not used.
"""

from __future__ import annotations

import io
import queue
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

#: Maximum size of an answer, bytes.
MAX_RESPONSE_BYTES = 2**20


@dataclass(frozen=True)
class Response:
    """The answer to a request.

    Attributes:
        status: Its HTTP status.
        body: Its first ``MAX_RESPONSE_BYTES`` bytes.
        is_truncated: Whether it has more bytes.
        retry_after: Its header ``Retry-After``.
        location: Its header ``Location``.
    """

    status: int
    body: bytes
    is_truncated: bool = False
    retry_after: str | None = None
    location: str | None = None


def time_left(deadline: float) -> float:
    """Return the seconds until a deadline of ``time.monotonic``.

    Raises:
        TimeoutError: The deadline has passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left


def post(url: str, body: bytes, headers: Mapping[str, str], deadline: float) -> Response:
    """Send a POST request over a connection of its own.

    Args:
        url: An ASCII address with the scheme http or https.
        body: What is sent.
        headers: Its headers; ``Host`` and ``Content-Length`` are added.
        deadline: When the answer must be complete, in seconds of ``time.monotonic``.

    Raises:
        TimeoutError: The answer is not complete at the deadline.
        OSError: The host is unknown or cannot be reached, or has no valid certificate.
        http.client.HTTPException: The answer is not HTTP.
        ValueError: The same.
    """
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    sock = _connect(host, parts.port or (443 if secure else 80), deadline)
    try:
        if secure:
            sock.settimeout(time_left(deadline))
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        connection = HTTPConnection(parts.netloc)
        connection.set_debuglevel(0)  # a program can set it for all connections: it prints headers
        connection.sock = _DeadlineSocket(sock, deadline)
        all_headers = {"Host": parts.netloc, "Connection": "close", **headers}
        connection.request("POST", parts.path, body, all_headers)
        response = connection.getresponse()
        answer = response.read(MAX_RESPONSE_BYTES + 1)
        return Response(
            response.status,
            answer[:MAX_RESPONSE_BYTES],
            len(answer) > MAX_RESPONSE_BYTES,
            response.getheader("Retry-After"),
            response.getheader("Location"),
        )
    finally:
        sock.close()


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    addresses = _resolve(host, port, deadline)
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = socket.socket(family, kind, protocol)
        try:
            # An address that does not answer leaves time for the others.
            sock.settimeout(time_left(deadline) / (len(addresses) - index))
            sock.connect(address)
            return sock
        except OSError:
            sock.close()
            if index == len(addresses) - 1:
                raise
    raise OSError("the host has no address")


def _resolve(host: str, port: int, deadline: float) -> list[Any]:
    """Return what ``socket.getaddrinfo`` does, which has no timeout: a thread calls it."""
    results: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

    def resolve() -> None:
        try:
            results.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            results.put(error)

    threading.Thread(target=resolve, name="resolve-host", daemon=True).start()
    try:
        result = results.get(timeout=time_left(deadline))
    except queue.Empty:
        raise TimeoutError("the name of the host was not resolved in time") from None
    if isinstance(result, Exception):
        raise result
    return result


class _DeadlineSocket(io.RawIOBase):
    """A connected socket whose reads and writes end at a deadline, as ``http.client`` uses it."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(time_left(self._deadline))
        return self._sock.recv_into(buffer)

    def sendall(self, data: bytes) -> None:
        remaining = memoryview(data)
        while remaining:
            self._sock.settimeout(time_left(self._deadline))
            remaining = remaining[self._sock.send(remaining) :]

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def close(self) -> None:
        """Do nothing: http.client closes before it reads the body, and `post` at the end."""
