"""What Prometheus is told."""

from typing import Any

import mlx.core as mx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .requests import Usage

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = ("prompt", "cached", "predicted", "recomputed", "completion")


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._ttft = Histogram(
            "kvp_ttft_seconds",
            "Time to first token, the queue not counted.",
            ["path"],
            registry=registry,
            buckets=SECONDS,
        )
        self._queue = Histogram("kvp_queue_seconds", "Time in the queue.", registry=registry, buckets=SECONDS)
        self._tokens = {kind: Counter(f"kvp_{kind}_tokens", f"Tokens, {kind}.", registry=registry) for kind in TOKENS}
        self._responses = Counter("kvp_responses", "HTTP responses.", ["route", "status"], registry=registry)
        self._gauges: dict[str, Gauge] = {}

    def count(self, usage: Usage) -> None:
        """Count an answer."""
        self._ttft.labels(usage.path).observe(usage.ttft_ms / 1e3)
        self._queue.observe(usage.queue_ms / 1e3)
        for kind, counter in self._tokens.items():
            counter.inc(getattr(usage, f"{kind}_tokens"))

    def count_response(self, route: str, status: int) -> None:
        """Count an HTTP response."""
        self._responses.labels(route, str(status)).inc()

    def text(self, statistics: dict[str, Any]) -> bytes:
        """Return everything as Prometheus reads it, with the scheduler's numbers and MLX's memory as they are now."""
        now = statistics | {"memory_bytes": mx.get_active_memory(), "peak_memory_bytes": mx.get_peak_memory()}
        for name, value in now.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"kvp_{name}", name.replace("_", " "), registry=self._registry)
            self._gauges[name].set(value)
        return generate_latest(self._registry)
