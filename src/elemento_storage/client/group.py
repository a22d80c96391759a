"""What all groups of calls share: requests with JSON, answers as types, jobs."""

import functools
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, TypeVar, cast

import msgspec

from elemento_storage.client.errors import BadAnswer, NotFound, OutcomeUnknown, StillRunning, error_of_job
from elemento_storage.client.exchange import Bound, Long, M, Plan, Repeat, Request, Response, Sleep
from elemento_storage.client.retry import Retries, exchange
from elemento_storage.client.types import Job, OnProgress
from elemento_storage.model import GIGABYTE, normalise_uid, parse_size

T = TypeVar("T")

_JSON: Final = {"Content-Type": "application/json"}
_AT_ONCE: Final = {**_JSON, "Prefer": "respond-async"}
_FIRST_LOOK_S: Final = 0.01
_SLOWEST_LOOK_S: Final = 1.0
_BETWEEN_LOOKS: Final = 0.25  #: of the time that the job has taken so far

Size = int | str  #: bytes, or a text such as 20G (10^9) or 20GiB (2^30)


class Group(Bound[M]):
    """Calls about one kind of things, on behalf of one client."""

    def __init__(self, runner: M, client: str | None, retries: Retries) -> None:
        self.runner = runner
        self.uid = client  #: on whose behalf
        self._retries = retries

    # -- plans -----------------------------------------------------------------------------------------------

    def _read(self, path: str, answer: type[T], **body: Any) -> Plan[T]:
        """A call that changes nothing."""
        response = yield from self._send(json_request(path, body, Repeat.SAFE))
        return cast("T", decoded(response, answer))

    def _look(self, path: str, answer: type[T], **query: Any) -> Plan[T]:
        """A GET with query parameters, on behalf of the client."""
        response = yield from self._send(Request("GET", path, query=self._query(**query), repeat=Repeat.SAFE))
        return cast("T", decoded(response, answer))

    def _change(self, path: str, answer: type[T], **body: Any) -> Plan[T]:
        """A call that is never sent again once it may have arrived."""
        response = yield from self._send(json_request(path, body, Repeat.NEVER))
        return cast("T", decoded(response, answer))

    def _keyed(self, path: str, answer: type[T], key: str | None, **body: Any) -> Plan[T]:
        """A call that creates something, once only, however often it is sent."""
        headers = {"Idempotency-Key": key or new_key()}
        response = yield from self._send(json_request(path, body, Repeat.SAFE, headers))
        return cast("T", decoded(response, answer))

    def _send(self, request: Request) -> Plan[Response]:
        return exchange(request, self._retries)

    # -- long calls ------------------------------------------------------------------------------------------

    def begin(self, call: Long[Any]) -> Plan[Job]:
        """See Bound.begin."""
        response = yield from self._send(_long_request(replace(call, is_short=False)))
        if response.status == 202:
            job_id = decoded(response, dict).get("job", "")
            job: Job = yield from self._job(str(job_id), ours=True)
            return job
        return Job(job="", purpose=call.path, state="done", progress=1.0, result=decoded(response, Any))

    def carry_out(self, call: Long[T]) -> Plan[T]:
        """See Bound.carry_out. A job that its server forgot, by dying, is asked for again by its key, if it has one."""
        may_repeat = call.method == "GET" or call.keyed is not None
        if call.keyed == "":
            call = replace(call, keyed=new_key())
        for _ in range(self._retries.attempts):
            response = yield from self._send(_long_request(call))
            if response.status != 202:
                return decoded(response, call.answer)  # type: ignore[no-any-return]
            job_id = str(decoded(response, dict).get("job", ""))
            try:
                job: Job = yield from self.until_over(job_id, call.on_progress, ours=True)
            except NotFound:
                if may_repeat:
                    continue
                break
            if job.result is not None:
                return converted(job.result, call.answer)  # type: ignore[no-any-return]
            if not may_repeat:
                return _answer_of(call)  # type: ignore[no-any-return]
        raise OutcomeUnknown(f"the server was restarted over {call.path}: look at the volume before you try again")

    def until_over(
        self,
        job_id: str,
        on_progress: OnProgress | None = None,
        timeout_s: float | None = None,
        *,
        ours: bool = False,
    ) -> Plan[Job]:
        """The job when it is done. Raises the error that it ended with, NotFound, StillRunning.

        ``ours``: this call began it, so nothing has to be asked on anybody's behalf. Of several volumes at once the job
        is nobody's on a trusted network, and would not be found otherwise.
        """
        started = time.monotonic()
        while True:
            job: Job = yield from self._job(job_id, ours=ours)
            if on_progress is not None:
                on_progress(job.how_far)
            if job.state == "done":
                return job
            if job.has_ended:
                raise error_of_job(job.error or {}, job_id)
            passed_s = time.monotonic() - started
            pause_s = min(max(passed_s * _BETWEEN_LOOKS, _FIRST_LOOK_S), _SLOWEST_LOOK_S)
            if timeout_s is not None:
                if passed_s >= timeout_s:
                    raise StillRunning(f"job {job_id} is not over after {timeout_s:g} s; it goes on")
                pause_s = min(pause_s, timeout_s - passed_s)
            yield Sleep(pause_s)

    def _job(self, job_id: str, *, ours: bool = False) -> Plan[Job]:
        query = None if ours else self._query()
        request = Request("GET", f"jobs/{uid(job_id)}", query=query, repeat=Repeat.SAFE)
        response = yield from self._send(request)
        return cast("Job", decoded(response, Job))

    def _query(self, **more: Any) -> dict[str, str] | None:
        told = {"client_uid": self.uid, **more}
        return {key: _text(value) for key, value in told.items() if value is not None} or None


def json_request(
    path: str, body: Mapping[str, Any], repeat: Repeat, headers: Mapping[str, str] | None = None
) -> Request:
    """A POST with a JSON object. Keys that are None are left out."""
    content = msgspec.json.encode({key: value for key, value in body.items() if value is not None})
    return Request("POST", path, content, _JSON if headers is None else {**_JSON, **headers}, None, repeat)


def decoded(response: Response, answer: Any) -> Any:
    """The answer's body as a type. Raises BadAnswer."""
    try:
        return _decoder(answer).decode(response.body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadAnswer(f"the answer is not what a storage server says: {error}") from error


def converted(result: Any, answer: Any) -> Any:
    """JSON that was decoded already as a type. Raises BadAnswer."""
    try:
        return msgspec.convert(result, answer)
    except msgspec.ValidationError as error:
        raise BadAnswer(f"the answer is not what a storage server says: {error}") from error


def new_key() -> str:
    """A fresh Idempotency-Key."""
    return secrets.token_hex(16)


def gigabytes(size: Size | None) -> int | float | None:
    """A size as the API takes it, in GB of 10^9 bytes. Raises ValueError."""
    if size is None:
        return None
    size_bytes = parse_size(size)
    return size_bytes / GIGABYTE if size_bytes % GIGABYTE else size_bytes // GIGABYTE


def uid(text: str) -> str:
    """32 hex digits from a uid in any form. Raises ValueError."""
    found = normalise_uid(text)
    if found is None:
        raise ValueError(f"{text[:80]!r} is no id: it has 32 hex digits, or is a UUID with dashes")
    return found


def _long_request(call: Long[Any]) -> Request:
    if call.method == "GET":
        query = {key: _text(value) for key, value in call.body.items() if value is not None}
        return Request("GET", call.path, b"", {"Prefer": "respond-async"}, query, Repeat.SAFE)
    content = msgspec.json.encode({key: value for key, value in call.body.items() if value is not None})
    headers = _JSON if call.is_short else _AT_ONCE
    if call.keyed is None:
        return Request("POST", call.path, content, headers, None, Repeat.NEVER)
    headers = {**headers, "Idempotency-Key": call.keyed or new_key()}
    return Request("POST", call.path, content, headers, None, Repeat.SAFE)


def _answer_of(call: Long[Any]) -> Any:
    """What the server would have said of a job that a restart has finished, from the keys of the request."""
    try:
        return msgspec.convert(dict(call.body), call.answer)
    except msgspec.ValidationError:
        raise OutcomeUnknown(f"{call.path} was done, but a restart of the server lost its answer") from None


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@functools.cache
def _decoder(answer: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(answer)
