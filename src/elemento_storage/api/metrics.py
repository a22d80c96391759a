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
from elemento_storage.service.access import INFRASTRUCTURE
from elemento_storage.service.backup_schedules import BackupSchedules
from elemento_storage.service.core import Core
from elemento_storage.service.exporting import Exporting
from elemento_storage.service.migration import Migrating

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of requests, and the state of the catalog at the time of asking."""

    def __init__(self, core: Core, exporting: Exporting, migrating: Migrating, schedules: BackupSchedules) -> None:
        self._core = core
        self._registry = CollectorRegistry()
        self._counters: dict[tuple[str, int], Counter] = {}  # looking a child up costs more than counting
        self._histograms: dict[str, Histogram] = {}
        self._catalog = _CatalogCollector(core)
        self._exports = _ExportsCollector(exporting, migrating)
        self._registry.register(self._catalog)
        self._registry.register(self._exports)
        self._registry.register(_BackupsCollector(schedules))
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
        await self._exports.look()
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


class _ExportsCollector(Collector):
    def __init__(self, exporting: Exporting, migrating: Migrating) -> None:
        self._exporting = exporting
        self._migrating = migrating
        self._prepared = 0
        self._overdue = 0

    async def look(self) -> None:
        under_way = await self._migrating.under_way()
        self._prepared, self._overdue = len(under_way), sum(one.overdue for one in under_way)

    def collect(self) -> Iterable[Metric]:
        prefix = "elemento_storage_export"
        labels = ["volume", "client", "protocol"]
        families = {
            name: GaugeMetricFamily(f"{prefix}_{name}", text, labels=labels)
            for name, text in {
                "up": "1 if the export was used successfully at the last look",
                "probe_seconds": "How long reading a sector took at the last look",
                "sessions": "Connections that are open, where the protocol tells",
                "session_read_bytes": "Bytes read by the sessions that are open, where the protocol tells",
                "session_written_bytes": "Bytes written by the sessions that are open, where the protocol tells",
                "repairs": "How often the export had to be mended since this process started",
            }.items()
        }
        for record, status in self._exporting.watched():
            one = [record.volume_id, record.client, record.protocol.value]
            families["up"].add_metric(one, int(status.healthy))
            families["repairs"].add_metric(one, status.repairs)
            for name, value in (
                ("sessions", status.presence.sessions),
                ("session_read_bytes", status.presence.read_bytes),
                ("session_written_bytes", status.presence.written_bytes),
                ("probe_seconds", status.latency_s),
            ):
                if value is not None:
                    families[name].add_metric(one, value)
        yield from families.values()
        for name, text, value in (
            ("elemento_storage_orphans", "What was served at the last look although nobody asked", self._orphans()),
            ("elemento_storage_migrations", "Live migrations that are not over", self._prepared),
            ("elemento_storage_migrations_overdue", "Live migrations past their deadline", self._overdue),
        ):
            gauge = GaugeMetricFamily(name, text)
            gauge.add_metric([], value)
            yield gauge

    def _orphans(self) -> int:
        return len(self._exporting.orphans())


class _BackupsCollector(Collector):
    """Volumes that are backed up by a schedule."""

    def __init__(self, schedules: BackupSchedules) -> None:
        self._schedules = schedules

    def collect(self) -> Iterable[Metric]:
        prefix = "elemento_storage_backup"
        last = GaugeMetricFamily(f"{prefix}_last", "When the last backup by schedule was made", labels=["volume"])
        due = GaugeMetricFamily(f"{prefix}_due", "When the next one is to be made", labels=["volume"])
        failures = GaugeMetricFamily(f"{prefix}_failures", "How often in a row it failed", labels=["volume"])
        for state in self._schedules.visible(INFRASTRUCTURE):
            one = [state.volume.volume_id]
            if state.last is not None:
                last.add_metric(one, state.last)
            due.add_metric(one, state.due)
            failures.add_metric(one, state.failures)
        yield from (last, due, failures)
