"""What Prometheus reads of a front end."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from coin.serving.front_end import FrontEnd


class Metrics:
    """The metrics of one front end; all but the latencies are read off it when they are asked for."""

    def __init__(self, front: FrontEnd) -> None:
        self._front = front
        self._registry = CollectorRegistry()
        self._registry.register(self)
        buckets = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
        self.seconds = Histogram(
            "coin_answer_seconds",
            "From a query to its answer",
            ["model", "decoded"],
            registry=self._registry,
            buckets=buckets,
        )

    def collect(self) -> Iterable[Metric]:
        """Yield what prometheus_client asks for."""
        front = self._front
        queries = CounterMetricFamily("coin_queries", "Queries by how they ended", labels=["end"])
        for end in ("answered", "lost", "expired", "overloaded", "cancelled", "undecodable", "stopped"):
            queries.add_metric([end], front.counts[end])
        yield queries
        yield CounterMetricFamily("coin_decoded_answers", "Answers that were decoded", value=front.counts["decoded"])
        up = GaugeMetricFamily("coin_server_up", "Whether a server is believed to be up", labels=["server"])
        requests = GaugeMetricFamily("coin_server_requests", "Requests that wait for a server", labels=["server"])
        for queue in front.queues:
            up.add_metric([queue.name], not queue.breaker.is_down)
            requests.add_metric([queue.name], len(queue))
        yield from (up, requests)
        late = GaugeMetricFamily("coin_late_after_seconds", "When an answer is late", labels=["experts", "size"])
        for (wanted, size), lateness in front.lateness.items():
            late.add_metric([f"{wanted:b}", str(2**size - 1)], lateness.seconds)
        yield late

    def text(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return bytes(generate_latest(self._registry))
