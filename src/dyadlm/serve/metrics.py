"""What Prometheus is told. Numbers that the threads of the models count anyway are read when it asks."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from dyadlm.serve.server import Server

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Of one server. first: seconds until the first text of an answer. whole: of a request."""

    def __init__(self, server: "Server"):
        self._registry = CollectorRegistry()
        self._registry.register(_State(server))
        self.requests = Counter(
            "dyadlm_requests", "Requests that were answered.", ("path", "status"), registry=self._registry
        )
        self.first = Histogram(
            "dyadlm_first_text_seconds", "Until an answer began.", buckets=SECONDS, registry=self._registry
        )
        self.whole = Histogram(
            "dyadlm_answer_seconds", "Until an answer was complete.", buckets=SECONDS, registry=self._registry
        )

    def answered(self, path: str, status: int) -> None:
        """Count a request. path: of its route, so that there are few of them."""
        self.requests.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """In the format of Prometheus."""
        return generate_latest(self._registry)


class _State(Collector):
    """The models and sessions as they are now."""

    def __init__(self, server: "Server"):
        self._server = server

    def collect(self) -> Iterable[Metric]:
        """All gauges and counters."""
        by_model: tuple[tuple[str, str, type[Any], str], ...] = (
            ("dyadlm_streams", "Requests that are read or written now.", GaugeMetricFamily, "live"),
            ("dyadlm_queue", "Requests that wait.", GaugeMetricFamily, "waiting"),
            ("dyadlm_tokens_read", "Tokens that were read.", CounterMetricFamily, "tokens_read"),
            ("dyadlm_tokens_written", "Tokens that were written.", CounterMetricFamily, "tokens_written"),
            ("dyadlm_steps", "Steps in which all streams moved on by a token.", CounterMetricFamily, "steps"),
        )
        for name, about, kind, attribute in by_model:
            family = kind(name, about, labels=("model",))
            for model in self._server.models.values():
                family.add_metric((model.name,), getattr(model.scheduler, attribute))
            yield family
        store = self._server.store
        places = GaugeMetricFamily("dyadlm_session_bytes", "Bytes of all sessions.", labels=("place",))
        places.add_metric(("memory",), store.memory_bytes)
        places.add_metric(("disk",), store.disk_bytes)
        yield places
        yield GaugeMetricFamily("dyadlm_sessions", "Sessions that are kept.", value=len(store))
