"""A local HTTP server with scripted answers, which records what it receives."""

from __future__ import annotations

import json
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message as Headers
from http.server import BaseHTTPRequestHandler
from typing import Any

Answer = Callable[["Handler"], None]


@dataclass
class Server:
    """What a server has received, and how it answers.

    Attributes:
        answers: The answers in order; the last one is repeated.
        requests: Path, headers and body of each request.
        stopped: Set when the test ends, so that handlers stop waiting.
    """

    port: int
    answers: Sequence[Answer]
    requests: list[tuple[str, Headers, Any]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


class Handler(BaseHTTPRequestHandler):
    server_state: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        state = self.server_state
        with state.lock:
            answer = state.answers[min(len(state.requests), len(state.answers) - 1)]
            self.request_body = json.loads(body)
            state.requests.append((self.path, self.headers, self.request_body))
        answer(self)

    def log_message(self, *args: object) -> None: ...


class _TCPServer(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads, block_on_close = True, True, False

    def handle_error(self, *args: object) -> None: ...  # clients that leave early


@contextmanager
def serve(
    *answers: Answer, port: int = 0, certificate: tuple[str, str] | None = None
) -> Iterator[Server]:
    """Serve on a free port of the loopback interface, over TLS with a certificate and its key."""
    handler = type("BoundHandler", (Handler,), {})
    with _TCPServer(("127.0.0.1", port), handler) as tcp_server:
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            tcp_server.socket = context.wrap_socket(tcp_server.socket, server_side=True)
        handler.server_state = Server(tcp_server.server_address[1], answers)
        thread = threading.Thread(target=tcp_server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield handler.server_state
        finally:
            handler.server_state.stopped.set()
            tcp_server.shutdown()
            thread.join()


def completion(text: object = "a red fox", reason: object = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": reason}]}


def send(body: object, status: int = 200, **headers: str) -> Answer:
    """Answer with bytes, or with a value as JSON; `_` in names of headers stands for `-`."""

    def answer(handler: Handler) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {**headers, "Content_Length": str(len(data))}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def wait(handler: Handler) -> None:
    """Answer only when the test ends."""
    handler.server_state.stopped.wait(60)


def drip(data: bytes) -> Answer:
    """Send a byte every 50 ms."""

    def answer(handler: Handler) -> None:
        for byte in data:
            if handler.server_state.stopped.wait(0.05):
                return
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()

    return answer
