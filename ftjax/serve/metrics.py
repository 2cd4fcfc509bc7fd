"""What `/metrics` says, for Prometheus."""

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ftjax.generate.scheduler import Job
from ftjax.serve.schedule import EngineThread

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
WINDOW = 10.0  # seconds over which tokens per second are measured


class Metrics:
    """Counts requests, tokens and times of one server."""

    def __init__(self, engine: EngineThread):
        self.registry = CollectorRegistry()
        self._engine = engine
        own = {"registry": self.registry, "namespace": "ftjax"}
        self.requests = Counter("requests", "Requests by path and HTTP status.", ["path", "status"], **own)
        self._tokens = Counter("generated_tokens", "Tokens of answers.", **own)
        self._prompts = Counter("prompt_tokens", "Tokens of prompts.", **own)
        self._cached = Counter("cached_prompt_tokens", "Tokens of prompts whose keys and values were kept.", **own)
        self._first = Histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", buckets=SECONDS, **own
        )
        self._each = Histogram(
            "time_per_token_seconds", "Time between the tokens of an answer, its mean.", buckets=SECONDS, **own
        )
        self._whole = Histogram("request_seconds", "From a request's arrival to its end.", buckets=SECONDS, **own)
        scheduler = engine.scheduler

        def gauge(name: str, says: str, value) -> None:
            Gauge(name, says, **own).set_function(value)

        gauge("requests_running", "Requests that have a row.", lambda: len(scheduler.running))
        gauge("requests_waiting", "Requests in the queue.", lambda: max(0, engine.load - len(scheduler.running)))
        total = sum(pool.total for pool in scheduler.pools)
        gauge("cache_pages", "Pages of keys and values.", lambda: total)
        gauge("cache_used_ratio", "Share of the pages that requests use.", lambda: self._pages("used") / total)
        gauge("cache_kept_ratio", "Share of the pages that ended texts fill.", lambda: self._pages("kept") / total)
        gauge("preempted_requests", "Times that a request gave its pages back.", lambda: scheduler.preempted)
        gauge("tokens_per_second", f"Generated tokens per second, over {WINDOW:.0f} seconds.", self._speed)
        self._decoded: deque[tuple[float, int]] = deque()

    def _pages(self, kind: str) -> int:
        return sum(getattr(pool, kind) for pool in self._engine.scheduler.pools)

    def _speed(self) -> float:
        now = time.monotonic()
        decoded = list(self._decoded)
        return sum(count for at, count in decoded if now - at <= WINDOW) / WINDOW

    def ended(self, job: Job) -> None:
        """Count a job that has ended; called in the engine's thread."""
        now, count = time.monotonic(), len(job.answer.tokens)
        self._prompts.inc(len(job.answer.prompt))
        self._cached.inc(job.cached)
        self._tokens.inc(count)
        self._whole.observe(now - job.arrived)
        if job.first is not None:
            self._first.observe(job.first - job.arrived)
            if count > 1:
                self._each.observe((now - job.first) / (count - 1))

    def came(self, tokens: int) -> None:
        """Count new tokens of an answer; called in the engine's thread."""
        now = time.monotonic()
        self._decoded.append((now, tokens))
        while self._decoded and now - self._decoded[0][0] > WINDOW:
            self._decoded.popleft()

    def text(self) -> bytes:
        return generate_latest(self.registry)
