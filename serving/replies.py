"""Answers and errors as OpenAI's JSON, whole or as a stream."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import JSONResponse

from data.tokenizer import Tokenizer
from serving.requests import Delta, Done, Event, Refused


def error_body(error: Refused) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}


def refusal(error: Refused) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)


class Shape:
    """How answers look in JSON: OpenAI's chat completions, and plain ones."""

    def __init__(
        self, tokenizer: Tokenizer, model: str, chat: bool, choices: int, top_logprobs: int | None
    ) -> None:
        """`top_logprobs`: how many of the likeliest tokens to report; None: no logprobs at all."""
        self.chat, self.choices, self.top_logprobs = chat, choices, top_logprobs
        self.logprobs = top_logprobs is not None
        self.tokenizer = tokenizer
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self.started, self.ttft_ms = time.perf_counter(), 0.0
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = self.decode_steps = 0
        self.image_kv = "none"

    def record(self, index: int, event: Event) -> None:
        """Count what the last line reports. Of several answers, only the first may encode the images."""
        if not self.ttft_ms:
            self.ttft_ms = round(1e3 * (time.perf_counter() - self.started), 2)
        if isinstance(event, Done):
            self.completion_tokens += event.tokens
            self.decode_steps += event.decode_steps
            if index == 0:
                self.cached_tokens, self.image_kv = event.cached_tokens, event.image_kv

    @property
    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    @property
    def extension(self) -> dict[str, Any]:
        return {"image_kv": self.image_kv, "decode_steps": self.decode_steps, "ttft_ms": self.ttft_ms}

    async def whole(self, events: AsyncIterator[tuple[int, Event]]) -> dict[str, Any]:
        texts, reasons = [""] * self.choices, [""] * self.choices
        logprobs: list[list[dict[str, Any]]] = [[] for _ in range(self.choices)]
        async for index, event in events:
            if isinstance(event, Refused):
                raise event
            self.record(index, event)
            if isinstance(event, Delta):
                texts[index] += event.text
                logprobs[index] += self.token_logprobs(event)
            else:
                reasons[index] = event.reason
        if not all(reasons):
            raise Refused(499, "gone", "the client has gone")
        choices = [
            self.choice(i, texts[i], reasons[i], logprobs[i] if self.logprobs else None)
            for i in range(self.choices)
        ]
        return {**self.head, "choices": choices, "usage": self.usage, "dualtower": self.extension}

    def choice(
        self, index: int, text: str, reason: str, logprobs: list[dict[str, Any]] | None
    ) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        content: dict[str, Any] = {"message": message} if self.chat else {"text": text}
        return {"index": index, **content, "logprobs": self.shaped(logprobs), "finish_reason": reason}

    async def stream(self, events: AsyncIterator[tuple[int, Event]], with_usage: bool) -> AsyncIterator[str]:
        if self.chat:
            for index in range(self.choices):
                yield self.line(index, {"role": "assistant", "content": ""}, None)
        async for index, event in events:
            self.record(index, event)
            if isinstance(event, Refused):
                yield f"data: {json.dumps(error_body(event))}\n\n"
                return
            if isinstance(event, Delta):
                logprobs = self.token_logprobs(event) if self.logprobs else None
                yield self.line(index, {"content": event.text}, None, logprobs, dualtower=self.drafts(event))
            else:
                yield self.line(index, {}, event.reason)
        if with_usage:
            yield self.chunk(choices=[], usage=self.usage, dualtower=self.extension)
        yield "data: [DONE]\n\n"

    def line(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None,
        logprobs: list[dict[str, Any]] | None = None,
        **more: Any,
    ) -> str:
        content: dict[str, Any] = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice = {"index": index, **content, "logprobs": self.shaped(logprobs), "finish_reason": reason}
        return self.chunk(choices=[choice], **more)

    def chunk(self, **fields: Any) -> str:
        kind = f"{self.head['object']}{'.chunk' * self.chat}"
        return f"data: {json.dumps({**self.head, 'object': kind, **fields})}\n\n"

    def drafts(self, event: Delta) -> dict[str, Any]:
        """The tokens of a decode step; all but the last were drafts, and one more may have been rejected."""
        tokens, drafts = event.step.tokens, event.step.drafts
        rejected = drafts[len(tokens) - 1 : len(tokens)]
        return {
            "tokens": [self.tokenizer.decode([token]) for token in tokens],  # "" for the end of the turn
            "rejected": self.tokenizer.decode(rejected) if rejected else None,
        }

    def token_logprobs(self, event: Delta) -> list[dict[str, Any]]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token])
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

        out = []
        for token, likeliest in zip(event.step.tokens, event.step.logprobs, strict=False):
            if token == self.tokenizer.turn_end:
                break
            ranked = sorted(likeliest.items(), key=lambda pair: -pair[1])[: self.top_logprobs]
            top = [entry(*pair) for pair in ranked]
            out.append({**entry(token, likeliest[token]), "top_logprobs": top})
        return out

    def shaped(self, entries: list[dict[str, Any]] | None) -> dict[str, Any] | None:
        """Log-probabilities in the form of chat or plain completions."""
        if entries is None:
            return None
        if self.chat:
            return {"content": entries}
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries
            ],
        }
