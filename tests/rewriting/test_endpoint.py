import json
import pickle
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPConnection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.errors import ConfigError, CustomizeError, EndpointError
from customize.rewriting import endpoint as endpoint_module
from customize.rewriting.api_key import redact
from customize.rewriting.bounded_http import MAX_RESPONSE_BYTES
from customize.rewriting.chat_completions import decode_completion, decode_error
from customize.rewriting.endpoint import Endpoint, retry_delay
from customize.rewriting.language_model import Chat, Completion, Message, Sampling
from tests.rewriting.local_server import Handler, completion, drip, send, serve, wait

KEY = "sk-proj-0123456789abcdefghijklmnopqrstuv"
CHAT = Chat((Message("system", "Rewrite."), Message("user", "a fox")), seed=7)
OK = send(completion())
TOO_MANY = send({"error": {"message": "slow down"}}, 429)


@pytest.fixture(autouse=True)
def no_key_and_no_delay(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint_module, "RETRY_DELAYS", (0.0, 0.0, 0.0))


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return KEY


@pytest.fixture
def start():
    with ExitStack() as stack:
        yield lambda *answers, **options: stack.enter_context(serve(*answers, **options))


def complete(url, chat=CHAT, sampling=Sampling(), **options):  # noqa: B008
    return Endpoint(url, "tiny", **options).complete([chat], sampling)[0]


def failure(url, **options) -> EndpointError:
    error = complete(url, **options)
    assert isinstance(error, EndpointError)
    assert error.problem and error.where and error.fix
    assert error.__traceback__ is None
    return error


def assert_has_no_key(value: object) -> None:
    texts = [str(value), repr(value), repr(vars(value)), pickle.dumps(value).decode("latin-1")]
    if isinstance(value, BaseException):
        assert value.__context__ is None and value.__cause__ is None
    for text in texts:
        assert all(KEY[i : i + 8].lower() not in text.lower() for i in range(len(KEY) - 7))


# What is sent, and what comes back


def test_completion(start):
    server = start(OK)
    assert complete(server.url) == Completion("a red fox", is_complete=True)
    [(path, headers, body)] = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Content-Type"] == "application/json"
    assert headers["Host"] == f"127.0.0.1:{server.port}"
    assert body == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Rewrite."},
            {"role": "user", "content": "a fox"},
        ],
        "temperature": 0,
        "seed": 7,
        "max_tokens": 160,
    }


def test_sampling_is_sent(start):
    server = start(OK)
    complete(server.url + "/", sampling=Sampling(temperature=0.7, max_new_tokens=12))
    path, _, body = server.requests[0]
    assert (path, body["temperature"], body["max_tokens"]) == ("/v1/chat/completions", 0.7, 12)


@pytest.mark.parametrize(
    ("reason", "is_complete"),
    [("stop", True), ("length", False), ("content_filter", False), (None, True), (["x"], True)],
)
def test_finish_reason(start, reason, is_complete):
    server = start(send(completion("a fox", reason)))
    assert complete(server.url).is_complete is is_complete


def test_empty_text_is_a_completion(start):
    assert complete(start(send(completion(""))).url) == Completion("", True)


def test_unknown_fields_and_empty_errors_are_ignored(start):
    server = start(send(completion() | {"error": None, "message": "x", "usage": {}}))
    assert complete(server.url).text == "a red fox"


def test_several_chats_keep_their_order(start):
    lock, active, most = threading.Lock(), 0, 0

    def echo_slowly(handler: Handler) -> None:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        text = handler.request_body["messages"][0]["content"]
        time.sleep((10 - int(text)) / 200)
        with lock:
            active -= 1
        send(completion(text))(handler)

    server = start(echo_slowly)
    chats = [Chat((Message("user", str(i)),), seed=i) for i in range(10)]
    completions = Endpoint(server.url, "tiny").complete(chats, Sampling())
    assert [int(c.text) for c in completions] == list(range(10))
    assert sorted(body["seed"] for _, _, body in server.requests) == list(range(10))
    assert 1 < most <= 4


def test_a_failing_chat_leaves_the_others(start):
    server = start(OK, OK, send({}, 400), OK)
    found = Endpoint(server.url, "tiny").complete([CHAT] * 5, Sampling())
    (error,) = (each for each in found if isinstance(each, EndpointError))
    assert "400" in error.problem
    assert sum(each == Completion("a red fox", True) for each in found) == 4
    assert Endpoint(server.url, "tiny").complete([], Sampling()) == []


def test_threads_and_pickled_copies_give_the_same(start):
    server = start(OK)
    endpoint = pickle.loads(pickle.dumps(Endpoint(server.url, "tiny", timeout=9)))
    assert endpoint == Endpoint(server.url, "tiny", timeout=9)
    with ThreadPoolExecutor(4) as pool:
        completions = list(pool.map(lambda _: endpoint.complete([CHAT], Sampling()), range(8)))
    assert completions == [[Completion("a red fox", True)]] * 8
    with endpoint.use("cuda", "unload"):  # nothing is there to move or free
        assert endpoint.complete([CHAT], Sampling()) == [Completion("a red fox", True)]


def test_surrogates_are_replaced(start):
    server = start(send(b'{"choices": [{"message": {"content": "x\\ud800y"}}]}'))
    chat = Chat((Message("user", "lone \ud800, pair \ud83d\ude00, \U0001f98a"),))
    assert complete(server.url, chat).text == "x\ufffdy"
    sent = server.requests[0][2]["messages"][0]["content"]
    assert sent == "lone \ufffd, pair \U0001f600, \U0001f98a"


def test_name_and_digest():
    url = "http://localhost:8000/v1"
    endpoint = Endpoint(url, "tiny")
    assert endpoint.name == "tiny at localhost:8000"
    assert endpoint.digest == Endpoint(url + "/", "tiny", timeout=3).digest
    others = {Endpoint(url, "large").digest, Endpoint("http://localhost:8001/v1", "tiny").digest}
    assert len(others | {endpoint.digest}) == 3


# Keys


def test_key_is_read_at_each_call(start, monkeypatch):
    server = start(OK)
    endpoint = Endpoint(server.url, "tiny", api_key_variable="FOX_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "another-key")
    monkeypatch.setenv("HF_TOKEN", "hf_token_of_the_user")
    for value in (None, KEY, f" {KEY}\n", "  "):
        monkeypatch.delenv("FOX_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("FOX_KEY", value)
        endpoint.complete([CHAT], Sampling())
    sent = [headers["Authorization"] for _, headers, _ in server.requests]
    assert sent == [None, f"Bearer {KEY}", f"Bearer {KEY}", None]
    received = " ".join(str(headers) for _, headers, _ in server.requests)
    assert "hf_token" not in received and "another-key" not in received
    assert_has_no_key(endpoint)


def test_no_variable_sends_no_key(start, key):
    server = start(OK)
    complete(server.url, api_key_variable=None)
    assert server.requests[0][1]["Authorization"] is None


@pytest.mark.parametrize("value", [f"{KEY}\n{KEY}", f"{KEY}é", f"{KEY}\r\nX: y"])
def test_keys_that_no_header_can_have(start, monkeypatch, value):
    monkeypatch.setenv("OPENAI_API_KEY", value)
    server = start(OK)
    error = failure(server.url)
    assert "OPENAI_API_KEY" in str(error) and not server.requests
    assert_has_no_key(error)


@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_echoed_keys_are_removed_from_errors(start, key, status):
    def echo(handler: Handler) -> None:
        header = handler.headers["Authorization"]
        text = f"{header} {header.upper()} {header[9:30]} " * 3
        send({"error": {"message": text}}, status)(handler)

    error = failure(start(echo).url)
    assert "[key]" in str(error)
    assert_has_no_key(error)


@pytest.mark.parametrize("kind", ["garbage", "status line", "redirect", "half"])
def test_echoed_keys_elsewhere_are_not_quoted(start, key, kind):
    answers = {
        "garbage": send(KEY.encode()),
        "status line": lambda handler: handler.wfile.write(f"{KEY} {KEY}\r\n\r\n".encode()),
        "redirect": send(b"", 302, Location=f"http://{KEY}.invalid/?{KEY}"),
        "half": send(f'{{"error": "{KEY}'.encode(), 403),
    }
    assert_has_no_key(failure(start(answers[kind]).url))


def test_echoed_keys_are_removed_from_completions(start, key):
    assert complete(start(send(completion(f"it is {KEY}!"))).url).text == "it is [key]!"


def test_placeholders_for_keys_stay_in_completions(start, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    assert complete(start(send(completion("an EMPTY street"))).url).text == "an EMPTY street"


def test_headers_are_not_printed_when_http_debugging_is_on(start, key, monkeypatch, capsys):
    monkeypatch.setattr(HTTPConnection, "debuglevel", 1)
    complete(start(OK).url)
    assert KEY not in capsys.readouterr().out


def test_keys_over_plain_http_warn_once(monkeypatch, key, recwarn):
    endpoint_module._warn_of_plain_http.cache_clear()
    monkeypatch.setattr(Endpoint, "_request", lambda *_: json.dumps(completion()).encode())
    local = ["localhost:1", "127.0.0.1", "[::1]:1", "192.168.0.7", "ollama", "box.local"]
    for host in [*local, "llm.example.org", "llm.example.org", "203.0.114.9"]:
        complete(f"http://{host}/v1")
    complete("https://secure.example.org/v1")
    messages = [str(warning.message) for warning in recwarn]
    assert ["llm.example.org" in messages[0], "203.0.114.9" in messages[1]] == [True, True]
    assert len(messages) == 2 and recwarn[0].filename == __file__


@pytest.mark.parametrize("key", [None, "", "a", "ab.*(", KEY])
def test_redacted_texts_have_no_key(key):
    for text in ("", "a fox", f"{key}", f"{key}{key} {str(key)[3:]}"):
        redacted = redact(text, key)
        assert redacted == text if not key else key not in redacted.replace("[key]", "")


# Statuses and retries


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_temporary_statuses_are_retried(start, status):
    busy = send({"error": {"message": "busy"}}, status)
    server = start(busy, busy, OK)
    assert complete(server.url).text == "a red fox"
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [429, 500])
def test_retries_end(start, status):
    server = start(send({"error": "busy"}, status))
    error = failure(server.url)
    assert len(server.requests) == 4
    assert str(status) in str(error) and "busy" in str(error) and "4 attempts" in str(error)


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (400, "max_tokens"),
        (401, "OPENAI_API_KEY"),
        (403, "OPENAI_API_KEY"),
        (404, "/v1"),
        (405, "base_url"),
        (418, "base_url"),
        (204, "base_url"),
        (799, "server"),
    ],
)
def test_other_statuses_are_not_retried(start, status, advice):
    server = start(send({"detail": "no"}, status), OK)
    error = failure(server.url)
    assert len(server.requests) == 1
    assert str(status) in error.problem and advice in error.fix
    assert error.where == f"127.0.0.1:{server.port}"


def test_refused_keys_name_the_variable_and_whether_it_is_set(start, monkeypatch):
    server = start(send({"error": {"message": "no"}}, 401))
    assert "FOX_KEY to a valid key; now it is not set" in str(
        failure(server.url, api_key_variable="FOX_KEY")
    )
    monkeypatch.setenv("FOX_KEY", KEY)
    assert "has a key that the endpoint refuses" in str(
        failure(server.url, api_key_variable="FOX_KEY")
    )
    assert "api_key_variable" in str(failure(server.url, api_key_variable=None))


def test_retry_after_is_waited_for(start, monkeypatch):
    monkeypatch.setattr(endpoint_module, "RETRY_DELAYS", (100.0,))
    server = start(send({}, 503, Retry_After="0"), OK)
    assert complete(server.url).text == "a red fox"


def test_delays():
    assert [retry_delay(i) for i in range(4)] == [0.0, 0.0, 0.0, None]
    assert [retry_delay(0, text) for text in ("3", "60", "9" * 999)] == [3.0, 10.0, 10.0]
    assert retry_delay(3, "1") is None
    for text in ("-1", "nan", "1e3", "", "²", "Wed, 21 Oct 2026 07:28:00 GMT"):
        assert retry_delay(0, text) == 0.0


def test_delays_past_the_timeout_are_not_waited_for(start):
    server = start(send({}, 429, Retry_After="10"))
    assert "429" in str(failure(server.url, timeout=5))
    assert len(server.requests) == 1


def test_refused_connections_are_retried(start, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    assert "refused, after 4 attempts" in str(failure(url))
    monkeypatch.setattr(endpoint_module.time, "sleep", lambda _: start(OK, port=port))
    assert complete(url).text == "a red fox"


# Whatever servers do


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"1" * 10_000,
        json.dumps(completion()).encode()[:-9],
        *(json.dumps(value).encode() for value in (None, 1, "x", [], {}, [[]])),
        *(
            json.dumps(value).encode()
            for value in (
                {"choices": None},
                {"choices": []},
                {"choices": {}},
                {"choices": "abc"},
                {"choices": [None]},
                {"choices": [{}]},
                {"choices": [{"text": "old interface"}]},
                {"choices": [{"message": None}]},
                {"choices": [{"message": []}]},
                {"choices": [{"message": {}}]},
                {"error": {"message": "out of memory"}},
                completion(None),
                completion(5),
                completion(["a"]),
                completion([{"type": "text", "text": "a"}]),
            )
        ),
    ],
)
def test_answers_without_a_completion(start, body):
    server = start(send(body))
    failure(server.url)
    assert len(server.requests) == 1


def test_reasoning_that_takes_all_tokens_is_named(start):
    assert "max_new_tokens" in failure(start(send(completion(None, "length"))).url).fix


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "finish_reason", "error", "detail"]),
            inner,
        )
    ),
)


@settings(max_examples=50)
@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_all_answers_are_a_completion_or_an_error(body):
    assert isinstance(decode_error(body), str)
    try:
        decode_completion(body, "host").text.encode()
    except EndpointError as error:
        assert error.fix


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_broken_http(start, data):
    failure(start(lambda handler: handler.wfile.write(data)).url)


def test_chunked_answers_are_read(start):
    data = json.dumps(completion()).encode()
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in data)
    server = start(lambda handler: handler.wfile.write(head + chunks + b"0\r\n\r\n"))
    assert complete(server.url).text == "a red fox"


def test_servers_that_never_answer(start):
    assert "within 0.3 s" in str(failure(start(wait).url, timeout=0.3))


BODY = json.dumps(completion()).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 90 + b"\r\n\r\n" + BODY,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 9,
    ],
)
def test_bytes_that_come_one_by_one_end_at_the_timeout(start, data):
    assert "within 0.3 s" in str(failure(start(drip(data)).url, timeout=0.3))


def test_a_body_that_comes_byte_by_byte_ends_at_the_timeout(start):
    def answer(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        drip(BODY)(handler)

    assert "within 0.3 s" in str(failure(start(answer).url, timeout=0.3))


def test_names_that_are_not_resolved_in_time(monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: done.wait(60))
    assert "within 0.1 s" in str(failure("http://slow.example.org/v1", timeout=0.1))
    done.set()


def test_hosts_that_do_not_exist():
    error = failure("http://does-not-exist.invalid/v1", timeout=5)
    assert error.where == "does-not-exist.invalid" and "network" in str(error)


def test_large_answers_are_refused(start):
    largest = json.dumps(completion("")).encode().ljust(MAX_RESPONSE_BYTES)
    assert complete(start(send(largest)).url).text == ""
    assert "1,048,576 bytes" in str(failure(start(send(largest + b" ")).url))

    def endless(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            handler.wfile.write(b" " * 65536)

    assert "1,048,576 bytes" in str(failure(start(endless).url))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(start, key, status):
    other = start(OK)
    location = f"http://localhost:{other.port}/v1/chat/completions?a=b"
    error = failure(start(send(b"", status, Location=location)).url)
    assert f"'{location[:-4]}'" in str(error) and "base_url" in error.fix
    assert not other.requests


def test_tls_on_a_port_without_it(start):
    url = start(OK).url.replace("http:", "https:")
    assert "http://" in failure(url).fix


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl for a certificate")
def test_certificates_are_checked(start, tmp_path, monkeypatch, key):
    files = str(tmp_path / "certificate.pem"), str(tmp_path / "key.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        [*command.split(), *names, "-out", files[0], "-keyout", files[1]],
        check=True,
        capture_output=True,
    )
    server = start(OK, certificate=files)
    url = f"https://localhost:{server.port}/v1"
    assert "SSL_CERT_FILE" in str(failure(url)) and not server.requests
    monkeypatch.setenv("SSL_CERT_FILE", files[0])
    assert complete(url).text == "a red fox"
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    assert "certificate" in str(failure(url.replace("localhost", "127.0.0.1")))


# Arguments


@pytest.mark.parametrize(
    "url",
    [
        *(None, 5, "", "localhost", "localhost:8000/v1", "ftp://host/v1", "file:///etc/passwd"),
        *("http://", "http:///v1", "http://:80/v1", "http://host:99999/v1", "http://host:x/v1"),
        *("http://host:0/v1", "http://[::1/v1", "http://a..b/v1", f"http://{'a' * 64}.b/v1"),
        *("http://ho st/v1", "http://host/v1\n", "http://host/\x00", "http://hôst/v1", "\ud800"),
        *("http://host/v1?key=x", "http://host/v1#x", "http://host/v1?", "http://host/v1#"),
        *(f"http://user:{KEY}@host/v1", f"http://{KEY}@host/v1", f"https://host/v1?key={KEY}"),
        *(f"{KEY}://host/v1", "http://host/v1/chat/completions", "http://host/chat/completions/"),
    ],
)
def test_invalid_addresses(url):
    with pytest.raises(ConfigError) as caught:
        Endpoint(url, "tiny")
    assert caught.value.where == "base_url" and caught.value.fix
    assert_has_no_key(caught.value)


@pytest.mark.parametrize(
    ("url", "normalized"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com/v1"),
        ("HTTP://LocalHost:8000/V1//", "http://localhost:8000/V1"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_valid_addresses(url, normalized):
    assert Endpoint(url, "tiny").base_url == normalized


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model", [None, 5, "", "  ", "a\nb", "\ud800", b"x"]),
        ("timeout", [None, "3", True, 0, -1, float("nan"), float("inf"), 3601, 10**400]),
        ("api_key_variable", [5, "", "a b", "A=B", "hf_aBcDeF", KEY, "sk_live", "A\n"]),
    ],
)
def test_invalid_arguments(name, values):
    for value in values:
        with pytest.raises(ConfigError) as caught:
            Endpoint(**({"base_url": "http://localhost/v1", "model": "tiny"} | {name: value}))
        assert caught.value.where == name and caught.value.fix
        assert_has_no_key(caught.value)


def test_errors_are_of_the_family():
    assert issubclass(EndpointError, CustomizeError)
