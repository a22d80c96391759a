"""``client.server`` and ``client.jobs``: what runs there, what it does, what changes."""

from elemento_storage.client import events
from elemento_storage.client.exchange import Items, Plan, Repeat, Request, iteration, operation
from elemento_storage.client.exchange import M as Kind
from elemento_storage.client.group import Group, decoded, uid
from elemento_storage.client.types import (
    Event,
    Health,
    History,
    Job,
    Location,
    OnProgress,
    Rescan,
    Revisions,
    Version,
    Whoami,
)

# Names for lists, because methods below are called list.
JobList = list[Job]
LocationList = list[Location]


class ServerGroup(Group[Kind]):
    """The server itself. ``locations``, ``rescan``, ``metrics`` and ``history`` are for admins."""

    @operation
    def version(self) -> Plan[Version]:
        """What runs there."""
        return self._read("version", Version)

    @operation
    def whoami(self) -> Plan[Whoami]:
        """Whose token this is, and what it allows."""
        return self._read("whoami", Whoami)

    @operation
    def health(self) -> Plan[Health]:
        """How it is."""
        return self._read("health", Health)

    @operation
    def locations(self) -> Plan[LocationList]:
        """The locations, their limits and what is used of them."""
        return self._read("locations", LocationList)

    @operation
    def rescan(self) -> Plan[Rescan]:
        """Compare everything with the disk now; may be repeated, for it changes nothing but leftovers."""
        return self._read("rescan", Rescan)

    @operation
    def metrics(self) -> Plan[str]:
        """OpenMetrics text."""
        response = yield from self._send(Request("GET", "metrics", repeat=Repeat.SAFE))
        return response.body.decode()

    @operation
    def history(self, hours: float = 1.0) -> Plan[History]:
        """Capacity and traffic of the last hours, 24 at most, as far as the server's process has seen them."""
        return self._read("history", History, hours=hours)

    @operation
    def revisions(self, since: int = 0) -> Plan[Revisions]:
        """Which volumes changed after a revision."""
        return self._read("revisions", Revisions, since=since, client_uid=self.uid)

    @iteration
    def events(self, since: int | None = None, *, volumes_only: bool = False) -> Items[Event]:
        """What happens, as it happens, without end; a connection that breaks is followed by one that goes on.

        Begins with ``hello``, and with another after each new connection: where that is not ``complete``, events were
        lost, and everything has to be read again.
        """
        path = "revisions/stream" if volumes_only else "events"
        return Items(events.follow(path, self._query(), since, self._retries))


class Jobs(Group[Kind]):
    """Long operations."""

    @operation
    def list(self) -> Plan[JobList]:
        """The jobs that run, or ended within the last hour."""
        return self._read("jobs", JobList, client_uid=self.uid)

    @operation
    def get(self, job_id: str) -> Plan[Job]:
        """One job."""
        return self._job(job_id)

    @operation
    def wait(self, job_id: str, *, timeout_s: float | None = None, on_progress: OnProgress | None = None) -> Plan[Job]:
        """The job when it is done. Raises the error that it ended with, StillRunning when ``timeout_s`` is over."""
        return self.until_over(job_id, on_progress, timeout_s)

    @operation
    def cancel(self, job_id: str) -> Plan[Job]:
        """Ask a job to stop."""
        request = Request("DELETE", f"jobs/{uid(job_id)}", query=self._query(), repeat=Repeat.NEVER)
        response = yield from self._send(request)
        job: Job = decoded(response, Job)
        return job

    @iteration
    def events(self, job_id: str) -> Items[Event]:
        """A job's progress as it happens, until it is over."""
        return Items(events.until_job_is_over(job_id, self._query(), self._retries))
