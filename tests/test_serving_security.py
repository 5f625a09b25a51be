"""A hostile client gets 4xx, never 5xx, and the server goes on."""

import io
import json
import socket
import struct
import threading
import time
import zlib
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from serving import media
from serving.api import Settings
from serving.engine import Engine
from serving.media import Limits, fetch
from serving.metrics import Metrics
from serving.requests import Refused
from tests.serving_load import image_part, lively_predictor, png, serving, user

KEY = {"Authorization": "Bearer key"}
HOSTS = ("images.example.com", "*.cdn.example.com")
LIMITS = Limits(HOSTS, image_bytes=200_000, pixels=1_000_000, images=3, seconds=0.6)
CHAT, IMAGES, COMPLETIONS = "/v1/chat/completions", "/v1/images", "/v1/completions"


@pytest.fixture(scope="module")
def client(tokenizer):
    engine = Engine(lively_predictor(tokenizer), Metrics(), max_rows=8)
    options = Settings("tiny", ("key", "other"), LIMITS, body_bytes=1 << 20, max_tokens=2)
    with (
        serving(engine, options) as served,
        httpx.Client(base_url=served.address, headers=KEY, timeout=30) as http,
    ):
        yield http


@pytest.fixture(autouse=True)
def still_answers(client):
    yield
    response = client.post(CHAT, json={"messages": user("is it?"), "max_tokens": 1})
    assert response.status_code == 200, response.text
    assert client.get("/health").json() == {"status": "ok"}


def refused(response: httpx.Response, *statuses: int) -> dict[str, Any]:
    """The error of a response with one of these statuses."""
    assert response.status_code in (statuses or range(400, 500)), (response.status_code, response.text)
    assert response.headers["x-content-type-options"] == "nosniff"
    error = response.json()["error"]
    assert error["message"] and error["code"]
    return error


# Keys.


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer kei", "Basic key", "Bearer key key", "Bearer KEY", "Bearer é", "key"],
)
def test_missing_and_wrong_keys(client, header):
    headers = {"Authorization": header.encode()}
    for path in (CHAT, IMAGES, COMPLETIONS, "/v1/attention", "/v1/none"):
        response = client.post(path, content=b"not even JSON", headers=headers)
        assert refused(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    refused(client.get("/v1/models", headers=headers), 401)


def test_without_a_key_no_body_is_read(client):
    """The answer comes while the body is still on its way."""
    with raw(client, f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n{{") as sock:
        assert sock.recv(100).startswith(b"HTTP/1.1 401")


# Addresses.

PRIVATE = [
    "http://127.0.0.1/x",
    "http://localhost/x",
    "http://127.1/x",
    "http://2130706433/x",
    "http://0x7f.0.0.1/x",
    "http://0177.0.0.1/x",
    "http://0/x",
    "http://0.0.0.0/x",
    "http://[::1]/x",
    "http://[::]/x",
    "http://10.0.0.1/x",
    "http://[::ffff:127.0.0.1]/x",
    "http://[::127.0.0.1]/x",
    "http://[64:ff9b::7f00:1]/x",
    "http://[2002:7f00:1::]/x",
    "http://[fe80::1]/x",
    "http://[fc00::1]/x",
    "http://[fec0::1]/x",
    "http://169.254.169.254/latest/meta-data",
    "http://192.168.0.1/x",
    "http://172.16.0.1/x",
    "http://100.64.0.1/x",
    "http://224.0.0.1/x",
    "http://255.255.255.255/x",
]
ODD = [
    "file:///etc/passwd",
    "/etc/passwd",
    "../../etc/passwd",
    "ftp://images.example.com/x",
    "gopher://127.0.0.1/",
    "//images.example.com/x",
    "http://",
    "http://:80/",
    "https://user@images.example.com/x",
    "http://[",
    "https://[::1",
    "https://images.example.com:22/x",
    "https://images.example.com:99999/x",
    "https://images.example.com:port/x",
    "https://images.example.com@127.0.0.1/x",
    "https://evil.example/images.example.com",
    "https://images.example.com.evil.example/x",
    "https://xcdn.example.com/x",
    "https://cdn.example.com/x",
    "https://images.example.com\\@127.0.0.1/x",
    "javascript:alert(1)",
    "unix:/var/run/docker.sock",
]


@pytest.mark.parametrize("url", PRIVATE + ODD)
def test_addresses_that_are_not_allowed(client, url, monkeypatch):
    without_network(monkeypatch)
    part = {"type": "image_url", "image_url": {"url": url}}
    refused(client.post(CHAT, json={"messages": user("x?", part)}), 400)
    refused(client.post(IMAGES, json={"url": url}), 400)


def network(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Give serving/media.py other functions of `socket`."""
    monkeypatch.setattr(media, "socket", SimpleNamespace(**{**vars(socket), **functions}))


def without_network(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    def connect(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    network(monkeypatch, create_connection=connect, **functions)


@pytest.mark.parametrize("url", PRIVATE)
def test_allowed_names_of_private_addresses(url, monkeypatch):
    """Even an address that the operator allows is not fetched if it is private; nor is one behind a name."""
    host = urlsplit(url).hostname
    try:
        addresses = socket.getaddrinfo(host, 80, type=socket.SOCK_STREAM)
    except OSError:
        pytest.skip("the resolver does not know this form")
    without_network(monkeypatch, getaddrinfo=lambda *_, **__: [PUBLIC, *addresses])
    with pytest.raises(Refused, match="not fetched"):
        fetch("http://images.example.com/x", LIMITS)
    with pytest.raises(Refused, match="not fetched"):
        fetch(url, LIMITS._replace(domains=(host,)))


PUBLIC = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80))


class Web:
    """A web server on loopback; each connection gets an answer, sent with pauses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.answers: list[tuple[bytes, float]] = []  # a part and the pause after it
        self.requests: list[bytes] = []
        self.resolved: list[str] = []
        connect, port = socket.create_connection, self.sock.getsockname()[1]

        def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
            self.resolved.append(host)
            private = (*PUBLIC[:4], ("10.0.0.1", 80))
            return [private if host == "private.cdn.example.com" else PUBLIC]

        def to_here(_: Any, timeout: float) -> socket.socket:
            return connect(("127.0.0.1", port), timeout)

        network(monkeypatch, getaddrinfo=resolve, create_connection=to_here)
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                sock, _ = self.sock.accept()
            except OSError:
                return
            with sock:
                self.requests.append(sock.recv(10_000))
                try:
                    for part, pause in self.answers:
                        sock.sendall(part)
                        time.sleep(pause)
                except OSError:
                    pass


@pytest.fixture
def web(monkeypatch):
    server = Web(monkeypatch)
    yield server
    server.sock.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"


def test_an_allowed_host_is_fetched(web, client):
    data = png(0)
    web.answers = [(OK + b"Content-Length: %d\r\n\r\n" % len(data) + data, 0)]
    known = client.post(IMAGES, content=data).json()
    part = {"type": "image_url", "image_url": {"url": "http://images.example.com/a%20b?c=d"}}
    answer = client.post(CHAT, json={"messages": user("x?", part)})
    assert answer.json()["dualtower"]["image_kv"] == "reused" and known["tokens"]
    assert web.requests[0].startswith(b"GET /a%20b?c=d HTTP/1.1\r\nHost: images.example.com\r\n")
    assert fetch("http://A.cdn.example.com./x", LIMITS) == data


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/x",
        "http://private.cdn.example.com/x",
        "https://evil.example/",
        "file:///etc/passwd",
        "//[::1]/x",
        "http://[",
        "http://images.example.com:22/",
        "http://images.example.com/again",
        "",
    ],
)
def test_redirects_are_checked(web, location):
    web.answers = [(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\n\r\n".encode(), 0)]
    with pytest.raises(Refused):
        fetch("http://images.example.com/x", LIMITS)
    assert set(web.resolved) <= {"images.example.com", "private.cdn.example.com"}
    assert len(web.requests) <= 1 + LIMITS.redirects


@pytest.mark.parametrize(
    "answers",
    [
        [(OK + b"\r\n", 0), *[(b"x" * 10_000, 0)] * 1000],  # endless
        [(OK + b"Content-Length: 99999999\r\n\r\n", 0), *[(b"x" * 10_000, 0)] * 1000],
        [(OK + b"Content-Length: 1000\r\n\r\n", 0), *[(b"x", 0.05)] * 1000],  # slow
        [(b"H", 0.1), *[(b"T", 0.1)] * 100],
        [(b"HTTP/1.1 100 Continue\r\n\r\n", 0.01)] * 1000,
        [(OK, 0), *[(b"A: b\r\n", 0.01)] * 1000],
        [(OK + b"Content-Length: 50\r\n\r\nshort", 0)],
        [(b"nonsense\r\n\r\n", 0)],
        [(OK + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", 0)],
        [(b"HTTP/1.1 500 Oops\r\n\r\nsecret", 0)],
        [(b"", 5)],
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_slow_endless_and_broken_answers(web, answers, scheme):
    web.answers = answers
    started = time.monotonic()
    with pytest.raises(Refused) as refusal:
        fetch(f"{scheme}://images.example.com/x", LIMITS)
    assert time.monotonic() - started < 3 and "secret" not in str(refusal.value)


# Images.


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)


def bomb(width: int, height: int) -> bytes:
    """A valid PNG of one colour."""
    rows = zlib.compress((b"\0" + b"\0" * (width // 8 + 1)) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def of_format(name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, name, **options)
    return file.getvalue()


def many_scans(count: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    data = of_format("JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd" width="9" height="9"/></svg>'
TEXT_BOMB = bomb(8, 8)[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000), 9)) + bomb(8, 8)[33:]
BROKEN = {
    "bomb": bomb(19_999, 4000),
    "above the limit": bomb(1001, 1000),
    "long": bomb(30_000, 8),
    "huge header": png(0)[:16] + b"\x7f\xff\xff\xff" * 2 + png(0)[24:],
    "no pixels": png(0)[:16] + bytes(8) + png(0)[24:],
    "truncated": png(0)[:5000],
    "header alone": png(0)[:10],
    "too many bytes": png(0) + bytes(200_000),
    "SVG": SVG,
    "SVG behind a comment": b"<!--" + b"x" * 3000 + b"-->" + SVG,
    "EPS": of_format("EPS"),
    "TIFF": of_format("TIFF"),
    "PCX": of_format("PCX"),
    "PDF": b"%PDF-1.4\n",
    "RIFF": b"RIFF\x10\0\0\0WAVEfmt ",
    "GIF": b"GIF89a\xff\xff\xff\xff",
    "JPEG": of_format("JPEG")[:100],
    "many scans": many_scans(60),
    "text": b"/etc/passwd",
    "empty": b"",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images(client, name):
    refused(client.post(IMAGES, content=BROKEN[name]), 400, 413)
    refused(client.post(CHAT, json={"messages": user("x?", image_part(BROKEN[name]))}), 400, 413)


def test_a_bomb_in_the_text_of_a_png_is_harmless(client):
    assert client.post(IMAGES, content=TEXT_BOMB).status_code == 200


def test_a_progressive_jpeg_is_accepted(client):
    assert client.post(IMAGES, content=many_scans(5)).status_code == 200


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image"},
        {"type": "image", "image": "/etc/passwd"},
        {"type": "image", "path": "/etc/passwd"},
        {"type": "image", "url": "/etc/passwd"},
        {"type": "image", "url": ["data:"]},
        {"type": "image", "base64": "/etc/passwd"},
        {"type": "image", "base64": "é"},
        {"type": "image", "bytes": "x"},
        {"type": "image_url", "image_url": "file:///etc/passwd"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@"}},
        {"type": "image_url", "image_url": {"url": "data:image/svg+xml,<svg/>"}},
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "image_url", "image_url": {"url": "x" * 500_000}},
        {"type": "image_url", "image_url": {}},
        {"type": "image_url"},
        {"type": "input_audio", "input_audio": {}},
        {"type": ["image"]},
        {},
    ],
)
def test_image_parts_that_carry_no_image(client, part):
    error = refused(client.post(CHAT, json={"messages": user("x?", part)}), 400)
    assert "root:" not in error["message"]


@pytest.mark.parametrize(
    "handle",
    [
        "img-1",
        "../../../etc/passwd",
        "img-" + "0" * 32 + "-1x1-" + "0" * 32,
        "img-" + "../" * 10 + "00-1x1-" + "0" * 32,
        "img-" + "0" * 32 + "-999x999-" + "0" * 32,
        "img-" + "٠" * 32 + "-1x1-" + "0" * 32,
        "img-x\r\nX-Header: 1",
        "img-\0",
        "img-\ud800",
        "",
        5,
        None,
        ["img"],
        {"a": 1},
    ],
)
def test_malformed_handles(client, handle):
    body = json.dumps({"messages": user("x?", {"type": "image", "id": handle})})
    headers = {"Content-Type": "application/json"}
    error = refused(client.post(CHAT, content=body, headers=headers), 404)
    assert error["code"] == "image_not_found"


def test_handles_with_another_grid_or_another_key(client):
    handle = client.post(IMAGES, content=png(0)).json()["id"]
    asked = {"messages": user("x?", {"type": "image", "id": handle})}
    assert client.post(CHAT, json=asked).status_code == 200
    refused(client.post(CHAT, json=asked, headers={"Authorization": "Bearer other"}), 404)
    other = {"type": "image", "id": handle.replace("-1x1-", "-2x1-")}
    refused(client.post(CHAT, json={"messages": user("x?", other)}), 404)


def test_too_many_images(client):
    parts = [image_part(png(0, 8))] * 4
    assert refused(client.post(CHAT, json={"messages": user("x?", *parts)}))["code"] == "too_many_images"


# Bodies.


def raw(client: httpx.Client, request: str | bytes) -> socket.socket:
    parts = urlsplit(str(client.base_url))
    sock = socket.create_connection((parts.hostname, parts.port), timeout=20)
    sock.sendall(request.encode() if isinstance(request, str) else request)
    return sock


def test_huge_bodies(client):
    data = b'{"messages": "' + b"x" * (2 << 20) + b'"}'
    assert refused(client.post(CHAT, content=data), 413)["code"] == "too_large"
    assert refused(client.post(IMAGES, content=data), 413)["code"] == "too_large"

    def parts():
        for _ in range(40):
            yield b" " * 50_000

    for path in (CHAT, IMAGES, COMPLETIONS):  # chunked: without a length
        headers = {"Content-Type": "application/json"}
        assert refused(client.post(path, content=parts(), headers=headers), 413)["code"] == "too_large"


def test_too_many_bodies_at_a_time(client, monkeypatch):
    monkeypatch.setattr("serving.guard.BODIES", 0)
    response = client.post(CHAT, json={"messages": user("x?")})
    assert refused(response, 429)["code"] == "too_many_requests" and response.headers["retry-after"]


def test_slow_bodies(client, monkeypatch):
    monkeypatch.setattr("serving.guard.BODY_SECONDS", 0.2)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nContent-Length: 99\r\n\r\n"
    with raw(client, head + "{") as sock:
        assert sock.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("head", ["GARBAGE", "POST /v1/images HTTP/1.1\r\nContent-Length: -5"])
def test_requests_that_are_not_http(client, head):
    with raw(client, head + "\r\nHost: x\r\n\r\n") as sock:
        assert b" 400 " in sock.recv(100).splitlines()[0] + b" "


@pytest.mark.parametrize("host", ["[", "a/?b=", "evil.example", "a@b", "x:99999", "\x80"])
@pytest.mark.parametrize("path", ["/v1/models", "/health/", "//evil.example/health/", "/v1/models/"])
def test_the_host_is_not_trusted(client, host, path):
    """It neither hides a path from the key's check, nor becomes the target of a redirect."""
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    with raw(client, request.encode("latin-1")) as sock:
        status = int(sock.recv(100).split()[1])
    assert status in ((401, 400) if path.startswith("/v1/") else (404, 400))


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


def asked(fields: str) -> bytes:
    """A body with further fields."""
    return f'{{"messages": [{{"role": "user", "content": "x"}}], {fields}}}'.encode()


BODIES = {
    "empty": b"",
    "not JSON": b"x",
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "deep": deep(400_000).encode(),
    "deep content": f'{{"messages": [{{"role": "user", "content": {deep(900)}}}]}}'.encode(),
    "deep extra": asked(f'"x": {deep(100_000)}'),
    "invalid UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "half a character": b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
    "half a character in a role": b'{"messages": [{"role": "\\ud83d", "content": "x"}]}',
    "half a character in a key": b'{"messages": [{"\\ud83d": "user", "content": "x"}]}',
    "half a character in a part": b'{"messages": [{"role": "user", "content": [{"type": "\\ud83d"}]}]}',
    "half a character in the model": asked('"model": "\\ud83d"'),
    "half a character in a stop": asked('"stop": ["\\ud83d"]'),
    "line ends in the model": asked('"model": "a\\r\\nX-Header: 1"'),
    "NaN": asked('"temperature": NaN'),
    "Infinity": asked('"temperature": Infinity'),
    "NaN of top_p": asked('"temperature": 1, "top_p": NaN'),
    "NaN of min_p": asked('"temperature": 1, "min_p": NaN'),
    "NaN of repetition_penalty": asked('"repetition_penalty": NaN'),
    "infinite seed": asked('"seed": 1e999'),
    "large seed": asked(f'"seed": {10**30}'),
    "many digits": asked(f'"max_tokens": 1{"0" * 9000}'),
    "no tokens": asked('"max_tokens": 0'),
    "many tokens": asked('"max_tokens": 1000000'),
    "many answers": asked('"n": 1000'),
    "many stops": asked(f'"stop": {json.dumps(["x"] * 99)}'),
    "a long stop": asked(f'"stop": "{"x" * 500_000}"'),
    "a long text": json.dumps({"messages": user("word " * 100_000)}).encode(),
    "many messages": json.dumps({"messages": user("x") * 2000}).encode(),
    "roles": b'{"messages": [{"role": ["user"], "content": "x"}]}',
    "a list as sender": b'{"messages": [{"from": ["human"], "value": "x"}]}',
    "a system message at the end": json.dumps(
        {"messages": [*user("x"), {"role": "system", "content": "x"}]}
    ).encode(),
    "an answer alone": b'{"messages": [{"role": "assistant", "content": "x"}]}',
    "references": b'{"messages": [{"role": "user", "content": "x", "references": 5}]}',
    "tools": asked('"tools": [{"type": "function"}]'),
    "logit_bias": asked('"logit_bias": {"5": 1}'),
}


@pytest.mark.parametrize("name", BODIES)
def test_bad_bodies(client, name):
    headers = {"Content-Type": "application/json"}
    for path in (CHAT, COMPLETIONS, "/v1/attention"):
        response = client.post(path, content=BODIES[name], headers=headers)
        refused(response)
        assert "x-header" not in response.headers


SCHEMAS = {
    "no object": 5,
    "NaN": {"type": "number", "minimum": float("nan")},
    "unknown type": {"type": "thing"},
    "deep": json.loads('{"items":' * 900 + "{}" + "}" * 900),
    "a reference to nowhere": {"$ref": "#/nowhere"},
    "an address": {"$ref": "http://127.0.0.1/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "a bad pattern": {"type": "string", "pattern": "(("},
    "a pattern that looks back": {"type": "string", "pattern": "(a)\\1"},
    "nothing": {"enum": []},
    "half a character": {"enum": ["\ud800"]},
    "large": {"type": "string", "minLength": 10**9, "maxLength": 10**18},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_bad_schemas(client, name):
    pytest.importorskip("llguidance")
    shape = {"type": "json_schema", "json_schema": {"name": "a\r\nb", "schema": SCHEMAS[name]}}
    body = json.dumps({"messages": user("x"), "response_format": shape})
    refused(client.post(CHAT, content=body, headers={"Content-Type": "application/json"}), 400)


def test_a_schema_that_is_slow_to_follow_does_not_stop_others(client):
    pytest.importorskip("llguidance")
    schema = {"type": "string", "pattern": "^(a|b|ab|ba)*a(a|b){300}(x{1,200}y{1,200}){1,100}$"}
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    started = time.monotonic()
    response = client.post(CHAT, json={"messages": user("x"), "response_format": shape, "max_tokens": 50})
    assert response.status_code < 500 and time.monotonic() - started < 5


# Fuzz.

BODY = {
    "model": "tiny",
    "messages": user("is it?", image_part(png(0, 8))),
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "seed": 1,
    "stop": ["x"],
    "n": 1,
    "stream": False,
    "stream_options": {"include_usage": True},
    "logprobs": True,
    "top_logprobs": 2,
    "response_format": {"type": "json_object"},
    "user": "me",
    "prompt": "is it?",
    "answer": "it is",
    "token": 0,
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
WORDS = st.sampled_from(
    ["role", "content", "user", "assistant", "system", "type", "text", "image", "image_url", "url", "id"]
)
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A valid body, of which some values are others."""

    def change(value: Any) -> Any:
        if draw(st.integers(0, 7)) == 0:
            return draw(VALUES)
        if isinstance(value, dict):
            return {k: change(v) for k, v in value.items()}
        return [change(v) for v in value] if isinstance(value, list) else value

    return {key: change(value) for key, value in BODY.items() if draw(st.integers(0, 3))}


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(body=mutated() | VALUES, path=st.sampled_from([CHAT, CHAT, COMPLETIONS, "/v1/attention", IMAGES]))
def test_fuzzed_bodies(client, body, path):
    data = json.dumps(body)
    response = client.post(path, content=data, headers={"Content-Type": "application/json"})
    assert response.status_code < 500, (response.text, data)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200), cut=st.integers(0, 4000), at=st.integers(0, 400))
def test_fuzzed_images(client, data, cut, at):
    whole = png(1, 16)
    whole = whole[:at] + data + whole[at + len(data) :]
    response = client.post(IMAGES, content=whole[: max(1, cut)])
    assert response.status_code in (200, 400, 413), response.text


def test_no_header_or_path_reaches_a_file_or_the_log(client, capfd):
    for path in (
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/..%2f..%2fetc/passwd",
        "/serving/run.py",
    ):
        assert client.get(path).status_code == 404
    with raw(
        client, b"GET /a%0d%0aINJECTED HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\rINJECTED\r\n\r\n"
    ) as sock:
        assert sock.recv(100).split()[1] in (b"400", b"404")
    assert "INJECTED" not in "".join(capfd.readouterr())
    assert "INJECTED" not in client.get("/metrics").text
