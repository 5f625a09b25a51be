"""Continuous batching: a thread that encodes images, prefills prompts and decodes all answers together.

    submit → waiting → image KVs → ready → prefill, in pieces → batch → decode steps → events
                 (from the store, or encoded)

A turn of the engine does at most one of each, so that running answers never wait for a whole prompt.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.collators import collate_prompts
from data.render import Document
from eval.predictor import Predictor
from models.dual_tower.dual_tower import DualTowerVLM
from models.generation import forward_cached, new_cache, write_images
from models.image_store import ImageBlock, encode_blocks
from models.kv_cache import DecodingCache, ImageKV
from models.masks import NEVER
from serving.batch import Batch, Row, Step
from serving.requests import Delta, Done, Refused, Request, StoredImage, Text

PIECE = 256  # text tokens that a turn prefills


@dataclass(eq=False)
class Prefill:
    """Prompts of which a part is in `cache`: `x` (B, R, D) is embedded, the first `at` columns are done."""

    requests: list["Pending"]
    cache: DecodingCache
    x: Tensor
    positions: Tensor  # (B, R), −1 at padding
    at: int = 0
    states: list[Tensor] = field(default_factory=list)  # of the columns so far


@dataclass(eq=False)
class Pending:
    """A request on its way to the batch."""

    request: Request
    kvs: list[tuple[ImageKV, int]] = field(default_factory=list)
    cached_tokens: int = 0
    computed: bool = False

    @property
    def image_kv(self) -> str:
        return "none" if not self.kvs else "computed" if self.computed else "reused"


@dataclass(eq=False)
class Answer:
    """What a row of the batch has so far."""

    pending: Pending
    text: Text
    steps: int = 0


class Engine:
    """Answers requests of any number of threads, in the order in which they come."""

    def __init__(
        self,
        predictor: Predictor,
        metrics: Any,
        *,
        drafts: str = "auto",
        max_rows: int = 64,
        cache_bytes: int = 1 << 30,
        max_waiting: int = 256,
        threads: int = 0,
    ) -> None:
        """`metrics`: a `serving.metrics.Metrics`. Cache, rows and queue take at most the given sizes.

        `threads`: of torch, in the engine's thread; 0: torch's default.
        """
        self.predictor, self.model, self.metrics = predictor, predictor.model, metrics
        self.batch = Batch(self.model, drafts, max_rows, cache_bytes)
        self.max_waiting, self.threads = max_waiting, threads
        self.turn_end = predictor.renderer.tokenizer.turn_end
        self.waiting: deque[Request] = deque()
        self.ready: deque[Pending] = deque()
        self.joining: list[Pending] = []  # those that are prefilled now
        self.prefill: Prefill | None = None
        self.answers: dict[Row, Answer] = {}
        self.closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # Called by any thread.

    def capacity(self, request: Request) -> int:
        """Slots of the cache that an answer takes."""
        return request.prompt.length + request.settings.max_new_tokens + self.batch.spare

    def submit(self, request: Request) -> None:
        """Queue a request. `Refused` where the queue is full, the engine stops, or the cache is too small."""
        if not request.encode_only and not self.batch.could_fit(self.capacity(request)):
            raise Refused(
                400, "context_length_exceeded", "prompt and answer are larger than the server's cache"
            )
        with self.changed:
            if self.closing:
                raise Refused(503, "stopping", "the server is stopping")
            if len(self.waiting) >= self.max_waiting:
                raise Refused(429, "queue_full", "the queue is full: try again later")
            self.waiting.append(request)
            self.changed.notify()

    def cancel(self, request: Request) -> None:
        """Stop answering a request, wherever it is; it receives no further event."""
        with self.changed:
            request.cancelled = True
            self.changed.notify()

    def start(self) -> None:
        self.thread.start()

    def close(self, timeout_s: float | None = None) -> bool:
        """Accept no more requests, finish what runs and waits; False if that takes longer."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join(timeout_s)
        return not self.thread.is_alive()

    # The engine's thread.

    def _run(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        while True:
            with self.changed:
                while not (self.waiting or self.ready or self.prefill or self.batch.rows):
                    if self.closing:
                        return
                    self.changed.wait()
            try:
                self.turn()
            except Exception as error:  # whatever it was, the clients learn of it and the server goes on
                self._fail_all(error)

    @torch.inference_mode()
    def turn(self) -> None:
        """Encode images, prefill a piece, and decode one step."""
        self._drop_cancelled()
        self._encode()
        self._prefill()
        if self.batch.rows:
            started, rows = time.perf_counter(), len(self.batch.rows)
            self.batch.step()
            self.metrics.step_s.observe(time.perf_counter() - started)
            self.metrics.rows.observe(rows)
        self.metrics.waiting.set(len(self.waiting) + len(self.ready))
        self.metrics.running.set(len(self.batch.rows))

    def _drop_cancelled(self) -> None:
        with self.changed:
            self.waiting = deque(r for r in self.waiting if not r.cancelled)
        self.ready = deque(p for p in self.ready if not p.request.cancelled)
        for row, answer in list(self.answers.items()):
            if answer.pending.request.cancelled:
                row.done = True
                del self.answers[row]
        self.batch.leave()

    def _encode(self) -> None:
        """Make waiting requests ready in their order, up to one whose images were not in the store."""
        encoded = False
        while self.waiting and not encoded and len(self.ready) < self.batch.max_rows:
            with self.changed:
                request = self.waiting.popleft()
            pending = Pending(request)
            try:
                encoded = self._find_images(pending)
            except Refused as refusal:
                request.emit(refusal)
                continue
            except Exception as error:
                request.emit(self._failure(error))
                continue
            if request.encode_only:
                request.emit(Done("encoded", 0, pending.cached_tokens, pending.image_kv, 0, pending.kvs))
            else:
                self.ready.append(pending)

    def _find_images(self, pending: Pending) -> bool:
        """Collect a request's image KVs; True if some had to be computed."""
        request, store, c = pending.request, self.predictor.store, self.model.config.left
        if not request.blocks:
            return False
        assert isinstance(self.model, DualTowerVLM)
        kvs: list[ImageKV | None] = [None] * len(request.blocks)
        for i, block in enumerate(request.blocks):
            if isinstance(block, StoredImage):
                tokens = len(self.predictor.renderer.image_block(block.grid))
                kvs[i] = store.get(block.key, (c.layers, 2, c.kv_heads, tokens, c.head_size))
                if kvs[i] is None:
                    raise Refused(404, "image_not_found", "the image is no longer stored: send it again")
                pending.cached_tokens += tokens
                self.metrics.images.labels("reused").inc()
        blocks = {i: b for i, b in enumerate(request.blocks) if isinstance(b, ImageBlock)}
        if blocks:
            new, computed = encode_blocks(self.model, list(blocks.values()), store)
            for (i, block), kv, was_computed in zip(blocks.items(), new, computed, strict=True):
                kvs[i] = kv
                pending.computed |= was_computed
                pending.cached_tokens += 0 if was_computed else len(block.ids)
                self.metrics.images.labels("computed" if was_computed else "reused").inc()
        starts = self._block_starts(request.prompt)
        pending.kvs = [(kv, start) for kv, start in zip(kvs, starts, strict=True) if kv is not None]
        return pending.computed

    def _block_starts(self, prompt: Document) -> list[int]:
        return [prompt.left_positions[b.start] for b in prompt.blocks(self.model.config.image_isolation)]

    def _prefill(self) -> None:
        if self.prefill is None:
            self.prefill = self._next_prefill()
        if self.prefill is None:
            return
        p = self.prefill
        piece = slice(p.at, p.at + max(1, PIECE // len(p.requests)))
        positions = p.positions[:, piece]
        p.cache.reserve(positions.masked_fill(positions < 0, NEVER))
        p.states.append(forward_cached(self.model.right, p.x[:, piece], positions.clamp(min=0), p.cache))
        p.at = piece.stop
        if p.at >= p.x.shape[1]:
            self.prefill = None
            self._join(p)

    def _next_prefill(self) -> Prefill | None:
        """The first ready request, and those after it whose prompts fit into the same piece."""
        group: list[Pending] = []
        longest, capacities = 0, list[int]()
        while self.ready:
            request = self.ready[0].request
            capacity, longest = self.capacity(request), max(longest, len(request.prompt.right_ids))
            padded = longest * (len(group) + 1)
            if not self.batch.fits(*capacities, capacity) or (group and padded > PIECE):
                break
            group.append(self.ready.popleft())
            capacities.append(capacity)
        if not group:
            return None
        self.joining = group
        device = self.model.device
        batch = {k: v.to(device) for k, v in collate_prompts([p.request.prompt for p in group]).items()}
        images = [p.kvs for p in group]
        slots = batch["ids"].shape[1] + max(sum(kv.tokens for kv, _ in row) for row in images)
        cache = new_cache(self.model, len(group), slots)
        write_images(cache, images, self.model.config)
        tiles = [p.request.tiles for p in group if p.request.tiles is not None]
        x = self.model.embed(batch["ids"], torch.cat(tiles).to(device) if tiles else None)
        return Prefill(group, cache, x, batch["positions"])

    def _join(self, p: Prefill) -> None:
        states = torch.cat(p.states, 1)
        for b, pending in enumerate(p.requests):
            request = pending.request
            if request.cancelled:
                continue
            row = Row(
                request.settings,
                self.capacity(request),
                self._on_step,
                request.top_logprobs,
                request.constraint,
                self._seen(request),
            )
            self.answers[row] = Answer(pending, Text(self.predictor, request.stops))
            end = len(request.prompt.right_ids) - 1
            self.batch.join(
                row, p.cache, b, states[b : b + 1, end : end + 1], request.prompt.right_positions[end]
            )
            self.metrics.ttft_s.labels(pending.image_kv).observe(time.perf_counter() - request.submitted)
        self.joining = []

    def _seen(self, request: Request) -> Tensor | None:
        if request.settings.repetition_penalty == 1.0:
            return None
        seen = torch.zeros(1, len(self.model.right.unembedding), dtype=torch.bool, device=self.model.device)
        text = [i for i in request.prompt.right_ids if i < self.model.vocabulary.text_size]
        seen[0, text] = True
        return seen

    def _on_step(self, row: Row, step: Step) -> bool:
        """Turn a row's new tokens into events → whether its answer is over."""
        answer = self.answers[row]
        request, text, reason = answer.pending.request, answer.text, ""
        answer.steps += 1
        self.metrics.drafted.inc(len(step.drafts))
        self.metrics.accepted.inc(len(step.tokens) - 1)
        if not step.finite:
            del self.answers[row]
            request.emit(Refused(500, "not_finite", "the model's states are not finite"))
            return True
        before = len(text.tokens)
        for token in step.tokens:
            if token == self.turn_end:
                reason = "stop"
                break
            text.add(token)
            if text.stopped or len(text.tokens) == request.settings.max_new_tokens:
                reason = "stop" if text.stopped else "length"
                break
        if reason:  # tokens after the end are no part of the answer
            used = len(text.tokens) - before + (reason == "stop" and not text.stopped)
            step = step._replace(tokens=step.tokens[:used], drafts=step.drafts[: used - 1])
        request.emit(Delta(text.new(over=bool(reason)), step))
        if reason:
            del self.answers[row]
            self.metrics.tokens.inc(len(text.tokens))
            pending = answer.pending
            request.emit(
                Done(reason, len(text.tokens), pending.cached_tokens, pending.image_kv, answer.steps)
            )
        return bool(reason)

    def _fail_all(self, error: Exception) -> None:
        """Tell every client whose answer may be affected, and begin with an empty batch."""
        failure = self._failure(error)
        answered = [answer.pending for answer in self.answers.values()]
        affected = [p.request for p in (*answered, *self.joining, *self.ready)]
        self.answers, self.joining, self.prefill = {}, [], None
        self.ready.clear()
        self.batch.clear()
        for request in affected:
            request.emit(failure)

    def _failure(self, error: Exception) -> Refused:
        self.metrics.failures.inc()
        self.metrics.report(error)
        return Refused(
            500, "engine_error", f"the engine failed ({type(error).__name__}): see the server's log"
        )
