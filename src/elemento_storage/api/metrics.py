"""Figures for Prometheus, in OpenMetrics text."""

import asyncio
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from elemento_storage import __version__
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.placement import Space, read_space
from elemento_storage.disk import within
from elemento_storage.service.core import Core

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of requests, and the state of the catalog at the time of asking."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._registry = CollectorRegistry()
        self._counters: dict[tuple[str, int], Counter] = {}  # looking a child up costs more than counting
        self._histograms: dict[str, Histogram] = {}
        self._catalog = _CatalogCollector(core)
        self._registry.register(self._catalog)
        self.requests = Counter(
            "elemento_storage_requests", "Requests answered", ["call", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "elemento_storage_request_seconds",
            "Time from request to answer",
            ["call"],
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 60),
            registry=self._registry,
        )

    def observe(self, call: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        counter = self._counters.get((call, status))
        if counter is None:
            counter = self._counters[call, status] = self.requests.labels(call, str(status))
        histogram = self._histograms.get(call)
        if histogram is None:
            histogram = self._histograms[call] = self.seconds.labels(call)
        counter.inc()
        histogram.observe(seconds)

    async def text(self) -> bytes:
        """The exposition."""
        await self._catalog.look()
        return bytes(generate_latest(self._registry))  # type: ignore[no-untyped-call]


class _CatalogCollector(Collector):
    def __init__(self, core: Core) -> None:
        self._core = core
        self._spaces: dict[str, Space] = {}

    async def look(self) -> None:
        async def one(location: Location) -> None:
            try:
                self._spaces[location.name] = await within(
                    self._core.catalog.locations.patience_s, location.disk.run(read_space, location.path)
                )
            except OSError:
                self._spaces.pop(location.name, None)

        await asyncio.gather(*(one(location) for location in self._core.catalog.locations.answering()))

    def collect(self) -> Iterable[Metric]:
        yield InfoMetricFamily("elemento_storage", "What runs here", value={"version": __version__})
        prefix = "elemento_storage_location"
        families = {
            name: GaugeMetricFamily(f"{prefix}_{name}", text, labels=["location"])
            for name, text in {
                "up": "1 if the location takes new volumes",
                "volumes": "Volumes, half-made ones included",
                "virtual_bytes": "Virtual size of all volumes",
                "limit_bytes": "max-total-size, if there is one",
                "free_bytes": "Free space of the file system",
                "total_bytes": "Size of the file system",
                "odd_directories": "Directories that look like volumes and are not",
            }.items()
        }
        for location in self._core.catalog.locations.by_name.values():
            labels = [location.name]
            families["up"].add_metric(labels, 0 if location.problem else 1)
            families["volumes"].add_metric(labels, location.volume_count)
            families["virtual_bytes"].add_metric(labels, location.virtual_bytes)
            families["odd_directories"].add_metric(labels, len(location.odd))
            if location.settings.max_total_bytes is not None:
                families["limit_bytes"].add_metric(labels, location.settings.max_total_bytes)
            space = self._spaces.get(location.name)
            if space is not None:
                families["free_bytes"].add_metric(labels, space.free_bytes)
                families["total_bytes"].add_metric(labels, space.total_bytes)
        yield from families.values()
        running = GaugeMetricFamily("elemento_storage_jobs_running", "Jobs that are not over")
        running.add_metric([], self._core.jobs.running_count())
        yield running
        revision = GaugeMetricFamily("elemento_storage_revision", "The newest revision")
        revision.add_metric([], self._core.feed.revision)
        yield revision
