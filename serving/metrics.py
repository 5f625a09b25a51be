"""Figures of a server, as Prometheus reads them at /metrics."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one engine, in a registry of their own."""

    def __init__(self, report: Callable[[Exception], None] = lambda error: None) -> None:
        r = self.registry = CollectorRegistry()
        self.report = report  # called with an error of the engine
        self.waiting = Gauge("dualtower_waiting", "Requests that wait for the batch", registry=r)
        self.running = Gauge("dualtower_running", "Answers in the batch", registry=r)
        self.rows = Histogram("dualtower_batch_rows", "Answers in a decode step", buckets=ROWS, registry=r)
        self.step_s = Histogram(
            "dualtower_step_seconds", "Time of a decode step", buckets=SECONDS, registry=r
        )
        self.ttft_s = Histogram(
            "dualtower_first_token_seconds",
            "From the request's arrival to its first token, by the state of its images",
            ["image_kv"],
            buckets=SECONDS,
            registry=r,
        )
        self.tokens = Counter("dualtower_tokens", "Tokens of answers", registry=r)
        self.drafted = Counter("dualtower_drafted", "Drafted tokens", registry=r)
        self.accepted = Counter("dualtower_accepted", "Drafted tokens that were accepted", registry=r)
        self.images = Counter("dualtower_images", "Images of prompts", ["image_kv"], registry=r)
        self.failures = Counter("dualtower_engine_failures", "Turns of the engine that failed", registry=r)
        self.requests = Counter(
            "dualtower_requests", "Requests by route and status", ["route", "status"], registry=r
        )
