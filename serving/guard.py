"""What stands before the endpoints: bounds of requests and bodies, keys, security headers, counts."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

from serving.metrics import Metrics
from serving.replies import refusal
from serving.requests import Refused

BODY_SECONDS = 60  # in which a body must arrive
BODIES = 8  # largest bodies that are held at a time
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "frame-ancestors 'none'",
}


class Guard:
    """ASGI middleware: bounds requests and bodies, adds security headers, counts by route and status.

    A request without a valid key is refused before its body is read.
    """

    def __init__(
        self,
        app: Any,
        key_of: Callable[[Request], str],
        body_bytes: int,
        max_requests: int,
        metrics: Metrics,
    ) -> None:
        self.app, self.key_of, self.metrics = app, key_of, metrics
        self.body_bytes, self.max_requests = body_bytes, max_requests
        self.running = 0  # requests
        self.held = 0  # bytes of their bodies

    def check(self, request: Request) -> None:
        """`Refused` for a request whose body need not be read."""
        if request.scope["path"].startswith("/v1/"):  # `request.url` is made of the Host header, too
            self.key_of(request)
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.body_bytes:
            raise Refused(413, "too_large", "the request is too large")
        if self.running > self.max_requests and request.method == "POST":
            raise Refused(429, "too_many_requests", "the server is busy: try again later")

    async def __call__(
        self, scope: dict[str, Any], receive: Any, send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received, reading, status = 0, True, 500
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        async def bounded() -> Any:
            nonlocal received, reading
            try:
                async with asyncio.timeout_at(deadline if reading else None):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the request took too long to arrive") from None
            size = len(message.get("body", b""))
            received, self.held = received + size, self.held + size
            reading = message.get("more_body", False)
            if received > self.body_bytes:
                raise HTTPException(413, "the request is too large")
            if self.held > BODIES * self.body_bytes:
                raise HTTPException(429, "the server is busy: try again later")
            return message

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                secure = [(k.lower().encode(), v.encode()) for k, v in SECURITY.items()]
                message = {**message, "headers": [*message["headers"], *secure]}
            await send(message)

        self.running += 1
        try:
            self.check(Request(scope))
            await self.app(scope, bounded, counted)
        except Refused as error:
            await refusal(error)(scope, receive, counted)
        finally:
            self.running -= 1
            self.held -= received
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
