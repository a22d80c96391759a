"""Server-sent events: read, and followed over as many connections as it takes."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from elemento_storage.client.errors import BadAnswer, ConnectionBroken, Unreachable, error_of_answer
from elemento_storage.client.exchange import Close, Emit, Open, Plan, Read, Repeat, Request, Sleep
from elemento_storage.client.group import uid
from elemento_storage.client.retry import Retries
from elemento_storage.client.types import Event

_LONGEST: Final = 4 * 2**20  #: bytes without the end of an event: no server of ours sends so many
_ENDED: Final = frozenset({"done", "failed", "cancelled", "interrupted"})


class Reader:
    """Takes bytes, gives events (WHATWG HTML, section 9.2.6). Comments and fields that nobody uses are passed over."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that are complete now. Raises BadAnswer."""
        self._rest += data
        *blocks, self._rest = self._rest.replace(b"\r\n", b"\n").split(b"\n\n")
        if len(self._rest) > _LONGEST:
            raise BadAnswer("what comes is no stream of events")
        for block in blocks:
            fields: dict[str, list[str]] = {}
            for line in block.decode("utf-8", "replace").split("\n"):
                name, _, value = line.partition(":")
                fields.setdefault(name, []).append(value.removeprefix(" "))
            if "data" in fields:
                yield _event(fields)


def _event(fields: Mapping[str, list[str]]) -> Event:
    try:
        body: dict[str, Any] = msgspec.json.decode("\n".join(fields["data"]))
        revision = int(body.pop("revision", 0))
        subject, time = body.pop("subject", None), body.pop("time", None)
    except (msgspec.DecodeError, AttributeError, ValueError, TypeError) as error:
        raise BadAnswer(f"an event that cannot be read: {error}") from error
    return Event(fields.get("event", ["message"])[-1], revision, subject, time, body)


def follow(path: str, query: Mapping[str, str] | None, since: int | None, retries: Retries) -> Plan[None]:
    """Events without end. Raises what a first connection that fails raises, and when ``retries`` are used up."""
    failures, last = 0, since
    while True:
        headers = {} if last is None else {"Last-Event-ID": str(last)}
        request = Request("GET", path, b"", {"Accept": "text/event-stream", **headers}, query, Repeat.SAFE)
        try:
            stream = yield Open(request)
            yield from _refuse(stream)
            reader = Reader()
            while data := (yield Read(stream)):
                for event in reader.feed(data):
                    failures = 0
                    # The revision of hello is where the server is, not what was told: what was missed follows it.
                    if event.kind != "hello":
                        last = max(last or 0, event.revision)
                    elif last is None or not event.data.get("complete", True):
                        last = event.revision
                    yield Emit(event)
            yield Close(stream)
        except (Unreachable, ConnectionBroken) as error:
            failures += 1
            pause_s = retries.pause_s(failures, None)
            if failures >= retries.attempts or pause_s is None:
                raise
            del error
            yield Sleep(pause_s)
        else:
            # The server ends streams that are too slow, and all when it stops.
            yield Sleep(retries.pause_s(1, None) or 0)


def until_job_is_over(job_id: str, query: Mapping[str, str] | None, retries: Retries) -> Plan[None]:
    """The events of one job, the last of which says how it ended."""
    plan = follow(f"jobs/{uid(job_id)}/events", query, None, retries)
    sent: Any = None
    while True:
        step = plan.send(sent)
        if not isinstance(step, Emit):
            try:
                sent = yield step
            except (Unreachable, ConnectionBroken) as error:
                step = plan.throw(error)
                sent = yield step
            continue
        sent = yield step
        if step.item.kind == "job" and step.item.data.get("state") in _ENDED:
            return


def _refuse(stream: Any) -> Plan[None]:
    if stream.status == 200:
        return
    body = b""
    while len(body) < _LONGEST and (data := (yield Read(stream))):
        body += data
    yield Close(stream)
    raise error_of_answer(stream.status, body, stream.headers.get("x-request-id", ""))
