"""What Prometheus reads at /metrics.

Every runtime has a registry of its own, so two servers in one process do not add up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sqlalchemy import func, select

from data.tables import Job

if TYPE_CHECKING:
    from serve.runtime import Runtime


class Metrics:
    """Counters kept while requests run, and gauges read when asked."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "hone_requests", "HTTP requests.", ("route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "hone_request_seconds",
            "Duration of HTTP requests.",
            ("route",),
            registry=self._registry,
        )
        self._engine = Gauge(
            "hone_engine", "What the engine tells of itself.", ("stat",), registry=self._registry
        )
        self._jobs = Gauge(
            "hone_jobs", "Fine-tuning jobs by status.", ("status",), registry=self._registry
        )

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Count one request; `route` is the pattern, never the path."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def render(self, runtime: Runtime) -> bytes:
        """Return all of it in Prometheus' text format."""
        for name, value in runtime.engine.stats().items():
            self._engine.labels(name).set(value)
        with runtime.database.read() as session:
            counted = session.execute(select(Job.status, func.count()).group_by(Job.status)).all()
        self._jobs.clear()
        for status, count in counted:
            self._jobs.labels(status).set(count)
        return generate_latest(self._registry)
