"""The newest metrics of a run for Prometheus to fetch, over HTTP."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from blockroll.errors import ConfigError, MissingDependency

_NOT_OF_A_NAME = re.compile(r"[^a-zA-Z0-9_]+")


class Prometheus:
    """Serves every numeric metric as a gauge with the label `run`; a tracker of steps beside metrics.jsonl.

    A gauge has the newest value of its metric: one that a step does not have, as an evaluation's, keeps the
    one before; one that is null or not finite has none until there is a number again.
    """

    def __init__(self, *, run: str, host: str, port: int) -> None:
        """Listen from now on. ConfigError if that cannot be, MissingDependency without the library."""
        library = require_prometheus()
        from prometheus_client.core import GaugeMetricFamily

        self._run, self._values = run, dict[str, float]()
        registry = library.CollectorRegistry(auto_describe=False)
        registry.register(self)
        self._gauge = GaugeMetricFamily
        try:
            self._server, self._thread = library.start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError(
                f"metrics_port {port} of metrics_host {host!r} cannot be listened on "
                f"({error.strerror or error}): give another port, or 0 for none"
            ) from None

    @property
    def address(self) -> str:
        """Where Prometheus finds it."""
        host, port = self._server.server_address[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Take over one step."""
        values = dict(self._values)
        for name, value in metrics.items():
            values.pop(name, None)
            if isinstance(value, int | float) and math.isfinite(value):
                values[name] = float(value)
        self._values = values  # at once: a scrape runs in a thread of its own

    def collect(self) -> Iterable[Any]:
        """What one scrape gets; of metrics whose gauges would have one name, the last."""
        by_name = {gauge_name(metric): (metric, value) for metric, value in self._values.items()}
        for name, (metric, value) in by_name.items():
            gauge = self._gauge(name, f"{metric} of the newest step that has it", labels=["run"])
            gauge.add_metric([self._run], value)
            yield gauge

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def gauge_name(metric: str) -> str:
    """`blockroll_` and the metric with `_` for whatever no name may have; ends in none."""
    return f"blockroll_{_NOT_OF_A_NAME.sub('_', metric).rstrip('_')}"


def require_prometheus() -> Any:
    """The prometheus_client module; MissingDependency, with advice, if it is not installed."""
    try:
        import prometheus_client
    except ImportError as error:
        raise MissingDependency(
            "prometheus_client is not installed; install it with pip install 'blockroll[metrics]', or leave "
            "out --metrics-port"
        ) from error
    return prometheus_client
