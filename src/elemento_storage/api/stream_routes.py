"""Routes about jobs, what changed, and figures: what lives under an id, and answers that are streams."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from elemento_storage.api import schemas
from elemento_storage.api.decode import UID_PATTERN
from elemento_storage.api.metrics import CONTENT_TYPE
from elemento_storage.api.route import Exchange, Json, Route
from elemento_storage.api.server_calls import job_answer
from elemento_storage.api.sse import event_stream
from elemento_storage.errors import InvalidValue, JobEnded, JobNotFound
from elemento_storage.feed import Event
from elemento_storage.jobs import Job


async def job(exchange: Exchange) -> Response:
    """One job, with its result or error once it is over."""
    return _job_answer(_job(exchange))


async def cancel_job(exchange: Exchange) -> Response:
    """Cancel a job; the volume is left as it was."""
    found = _job(exchange)
    exchange.services.core.jobs.cancel(found)
    return _job_answer(found)


async def job_events(exchange: Exchange) -> Response:
    """A job's progress as server-sent events, until it is over."""
    found, feed = _job(exchange), exchange.services.core.feed

    def seen_as(event: Event) -> str | None:
        return "job" if event.kind == "job" and event.subject == found.job_id else None

    since = _last_event_id(exchange.request, default=feed.revision)
    return event_stream(
        feed, since, seen_as, exchange.stopping, first=lambda: ("job", found.facts()), until=found.finished.is_set
    )


async def events(exchange: Exchange) -> Response:
    """Everything that happens to volumes and jobs, as server-sent events with replay."""
    return _events(exchange, volumes_only=False)


async def revisions_stream(exchange: Exchange) -> Response:
    """Changes of volumes as server-sent events; the id is the revision."""
    return _events(exchange, volumes_only=True)


async def metrics(exchange: Exchange) -> Response:
    """Figures for Prometheus, in OpenMetrics text."""
    return Response(await exchange.metrics.text(), media_type=CONTENT_TYPE)


def _job(exchange: Exchange) -> Job:
    return exchange.services.core.jobs.get(exchange.parameters["id"], exchange.actor().client)


def _job_answer(found: Job) -> Response:
    return Response(schemas.encode(job_answer(found)), media_type="application/json")


def _events(exchange: Exchange, *, volumes_only: bool) -> Response:
    client, feed = exchange.actor().client, exchange.services.core.feed

    def seen_as(event: Event) -> str | None:
        kind = event.seen_by(client)
        return kind if kind and (not volumes_only or kind.startswith("volume.")) else None

    return event_stream(feed, _last_event_id(exchange.request, default=feed.revision), seen_as, exchange.stopping)


def _last_event_id(request: Request, *, default: int) -> int:
    text = request.headers.get("last-event-id") or request.query_params.get("since")
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InvalidValue("'since' and Last-Event-ID have to be a revision this server gave out", key="since")
    return int(text)


_CLIENT: Final[Json] = {"name": "client_uid", "in": "query", "schema": {"type": "string", "pattern": UID_PATTERN}}
_SINCE: Final[Json] = {
    "name": "Last-Event-ID",
    "in": "header",
    "schema": {"type": "string", "pattern": "^[0-9]{1,19}$"},
}
_EVENT_STREAM: Final[Json] = {
    "200": {"description": "a stream of events", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
}
_JOB: Final[Json] = {
    "200": {
        "description": "the job",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobAnswer"}}},
    }
}
_METRICS: Final[Json] = {
    "200": {
        "description": "the exposition",
        "content": {"application/openmetrics-text": {"schema": {"type": "string"}}},
    }
}

STREAM_ROUTES: Final = (
    Route("GET", "jobs/{id}", job, _JOB, (JobNotFound, InvalidValue), (_CLIENT,)),
    Route("DELETE", "jobs/{id}", cancel_job, _JOB, (JobNotFound, JobEnded, InvalidValue), (_CLIENT,)),
    Route("GET", "jobs/{id}/events", job_events, _EVENT_STREAM, (JobNotFound, InvalidValue), (_CLIENT, _SINCE)),
    Route("GET", "events", events, _EVENT_STREAM, (InvalidValue,), (_CLIENT, _SINCE)),
    Route("GET", "revisions/stream", revisions_stream, _EVENT_STREAM, (InvalidValue,), (_CLIENT, _SINCE)),
    Route("GET", "metrics", metrics, _METRICS, admin_only=True),
)
