"""Images of requests: data URLs, web addresses of allowed hosts, and handles of images that are stored.

A web address is fetched only from an allowed host, and only if all addresses of its name are public. The
connection goes to the address that was checked, and every redirect is checked like a first request.
"""

import hashlib
import hmac
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urljoin, urlsplit

from data.images import SIGNATURES, Tiles, data_url, image_size, open_pixels, to_tiles
from eval.predictor import Predictor
from serving.requests import Refused, StoredImage
from utils.errors import UserError

HANDLE = re.compile(r"img-([0-9a-f]{32})-([0-9]{1,3})x([0-9]{1,3})-([0-9a-f]{32})", re.ASCII)
FORMATS = SIGNATURES[:4]  # others may run programs (EPS), name files (SVG), or hide their size (TIFF)
SCANS = 50  # of a JPEG: each takes the time of a whole image, however short it is
UNICAST = ipaddress.ip_network("2000::/3")  # all public addresses of IPv6
TUNNELS = [ipaddress.ip_network(n) for n in ("2002::/16", "2001::/32")]  # of IPv4 in it: 6to4, Teredo
REDIRECTS = (301, 302, 303, 307, 308)


class Limits(NamedTuple):
    """What a client may send, and what is fetched for it."""

    domains: tuple[str, ...] = ()  # hosts whose images are fetched; none: no address is
    image_bytes: int = 20 << 20
    pixels: int = 40_000_000
    images: int = 16  # of a request
    seconds: float = 10.0  # of a fetch, redirects included
    redirects: int = 3


def refuse(message: str, code: str = "invalid_image", status: int = 400) -> Refused:
    return Refused(status, code, message)


# Handles. They name what the store holds, and no server needs to remember them.


def handle_of(image: StoredImage, api_key: str) -> str:
    """The id of a stored image for the holder of `api_key`."""
    name = f"{image.key}-{image.grid[0]}x{image.grid[1]}"
    return f"img-{name}-{_seal(name, api_key)}"


def stored_image(handle: Any, api_key: str) -> StoredImage:
    """The image that a handle names. `Refused` with 404 for one that is malformed or of another key."""
    match = HANDLE.fullmatch(handle) if isinstance(handle, str) else None
    if match is None or not hmac.compare_digest(
        _seal(f"{match[1]}-{match[2]}x{match[3]}", api_key), match[4]
    ):
        raise refuse("there is no image of this id: upload it again", "image_not_found", 404)
    return StoredImage(match[1], (int(match[2]), int(match[3])))


def _seal(name: str, api_key: str) -> str:
    key = hashlib.blake2b(api_key.encode(), digest_size=32).digest()
    return hashlib.blake2b(name.encode(), key=key, digest_size=16).hexdigest()


# Images.


def image_bytes(part: Any, limits: Limits) -> bytes:
    """The bytes at a part's "url", a data URL or an address on the web, or in its "base64".

    `Refused` says what is wrong with it; a file's path is never opened.
    """
    url = part.get("url") if isinstance(part, dict) else None
    if url is None and isinstance(part, dict) and isinstance(part.get("base64"), str):
        url = f"data:;base64,{part['base64']}"
    if not isinstance(url, str):
        raise refuse("an image needs an 'image_url' (a data URL or an address), or the 'id' of a stored one")
    if not url.startswith("data:"):
        return fetch(url, limits)
    if len(url) > 4 * limits.image_bytes // 3 + 200:
        raise refuse(f"an image has more than {limits.image_bytes:,} bytes", status=413)
    try:
        data: bytes = data_url(url)
    except UserError as error:
        raise refuse(str(error)) from None
    return data


def tiles_of(predictor: Predictor, data: bytes, limits: Limits) -> tuple[Tiles, tuple[int, int]]:
    """Decode an image's bytes; also its width and height. Errors: `Refused`."""
    if len(data) > limits.image_bytes:
        raise refuse(f"an image has more than {limits.image_bytes:,} bytes", status=413)
    if not data.startswith(FORMATS):
        raise refuse("an image is not a PNG, JPEG, WebP or GIF")
    if data.startswith(FORMATS[0]) and data.count(b"\xff\xda") > SCANS:
        raise refuse(f"a JPEG has more than {SCANS} scans")
    try:
        width, height = image_size(data)
        if width * height > limits.pixels:
            raise refuse(f"an image has {width * height:,} pixels, at most {limits.pixels:,} are accepted")
        return to_tiles(open_pixels(data), predictor.model.config.vision), (width, height)
    except UserError as error:
        raise refuse(str(error)) from None


# The web.


def fetch(url: str, limits: Limits) -> bytes:
    """The bytes at an http(s) address. Errors: `Refused`; none of them tells what an address answered."""
    deadline = time.monotonic() + limits.seconds
    for _ in range(limits.redirects + 1):
        parts = _checked(url, limits.domains)
        try:
            status, location, data = _get(parts, limits, deadline)
        except (OSError, http.client.HTTPException, ValueError):
            raise refuse("the image's address cannot be fetched") from None
        if status == 200:
            return data
        if status not in REDIRECTS or not location:
            raise refuse("the image's address gives no image")
        try:
            url = urljoin(url, location)
        except ValueError:
            raise refuse("the image's address redirects to a malformed one") from None
    raise refuse("the image's address redirects too often")


def _checked(url: str, domains: Sequence[str]) -> SplitResult:
    """Split an address of an allowed host."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        raise refuse("the image's address is malformed") from None
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
        raise refuse("an image must be a data URL, or an http or https address without a user")
    if not any(
        host == domain or (domain.startswith("*.") and host.endswith(domain[1:])) for domain in domains
    ):
        raise refuse("images of this host are not fetched: send a data URL", "host_not_allowed")
    if port not in (None, 80, 443):
        raise refuse("an image's address must have the port 80 or 443", "host_not_allowed")
    return parts


def _public_address(host: str, port: int) -> str:
    """An address of a host all of whose addresses are public."""
    addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    for address in addresses:
        ip = ipaddress.ip_address(address.partition("%")[0])
        odd = ip.version == 6 and (ip not in UNICAST or any(ip in network for network in TUNNELS))
        if not ip.is_global or ip.is_multicast or odd:
            raise refuse("images of this host are not fetched: send a data URL", "host_not_allowed")
    return min(addresses)


def _get(parts: SplitResult, limits: Limits, deadline: float) -> tuple[int, str, bytes]:
    """Status, redirect and body of one request."""
    host, secure = (parts.hostname or "").rstrip("."), parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    remaining = max(0.1, deadline - time.monotonic())
    sock = socket.create_connection((_public_address(host, port), port), timeout=remaining)
    # A server that sends a byte now and then would never time out.
    expired = threading.Event()
    end = threading.Timer(remaining, lambda: _shut(sock, expired))
    end.start()
    try:
        if secure:
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
            sock.do_handshake()
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "DualTowerVLM"})
        response = connection.getresponse()
        if response.status != 200:
            return response.status, response.getheader("Location") or "", b""
        data = response.read(limits.image_bytes + 1)
        if len(data) > limits.image_bytes:
            raise refuse(f"an image has more than {limits.image_bytes:,} bytes", status=413)
        if response.length or expired.is_set():
            raise OSError("cut off")
        return 200, "", data
    finally:
        end.cancel()
        sock.close()


def _shut(sock: socket.socket, expired: threading.Event) -> None:
    expired.set()
    with suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_RDWR)
