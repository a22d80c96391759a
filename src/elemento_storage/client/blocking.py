"""``Client``: carries plans out while its caller waits."""

import time
from collections.abc import Iterator
from typing import Any, TypeVar

import httpx

from elemento_storage.client.connection import Options, broken, headers_of
from elemento_storage.client.errors import ClientError
from elemento_storage.client.exchange import (
    Blocking,
    Close,
    Emit,
    Open,
    Plan,
    Read,
    Request,
    Response,
    Send,
    Sleep,
    Step,
    Work,
)
from elemento_storage.client.groups import Groups
from elemento_storage.client.retry import Retries

T = TypeVar("T")


class _Stream:
    """An answer that is still coming."""

    def __init__(self, response: httpx.Response, chunk: int | None) -> None:
        self.response = response
        self.status = response.status_code
        self.headers = headers_of(response)
        self.parts = response.iter_raw(chunk)


class Runner:
    """Carries plans out over one pool of connections. Any thread may."""

    def __init__(self, options: Options) -> None:
        self._http = httpx.Client(**options.for_httpx())
        self._options = options

    def run(self, plan: Plan[T]) -> T:
        """See exchange.Blocking."""
        streams: list[_Stream] = []
        try:
            step = next(plan)
            while True:
                try:
                    came = self._perform(step, streams)
                except (ClientError, OSError) as error:
                    step = plan.throw(error)
                else:
                    step = plan.send(came)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        finally:
            for stream in streams:
                stream.response.close()

    def items(self, plan: Plan[None]) -> Iterator[Any]:
        """See exchange.Blocking."""
        streams: list[_Stream] = []
        try:
            step = next(plan)
            while True:
                if isinstance(step, Emit):
                    yield step.item
                    step = plan.send(None)
                    continue
                try:
                    came = self._perform(step, streams)
                except (ClientError, OSError) as error:
                    step = plan.throw(error)
                else:
                    step = plan.send(came)
        except StopIteration:
            return
        finally:
            for stream in streams:
                stream.response.close()

    def _perform(self, step: Step, streams: list[_Stream]) -> Any:
        match step:
            case Send(request):
                try:
                    response = self._http.send(self._built(request))
                except httpx.HTTPError as error:
                    raise broken(error, self._options) from error
                return Response(response.status_code, response.headers, response.content)
            case Open(request, chunk):
                try:
                    stream = _Stream(self._http.send(self._built(request), stream=True), chunk)
                except httpx.HTTPError as error:
                    raise broken(error, self._options) from error
                streams.append(stream)
                return stream
            case Read(stream):
                try:
                    return next(stream.parts, b"")
                except httpx.HTTPError as error:
                    raise broken(error, self._options) from error
            case Close(stream):
                stream.response.close()
                return None
            case Sleep(seconds):
                time.sleep(seconds)
                return None
            case Work(function):
                return function()
            case _:
                raise TypeError(f"{step} has no place here")

    def _built(self, request: Request) -> httpx.Request:
        body = request.body
        return self._http.build_request(
            request.method,
            request.path,
            content=(body if isinstance(body, bytes) else body()) or None,
            headers=request.headers,
            params=request.query,
        )

    def close(self) -> None:
        """End the connections."""
        self._http.close()


class Client(Groups[Blocking]):
    """A storage server, for programs that wait for each answer. Threads may share it.

    >>> with Client("http://127.0.0.1:7772", client="ffffffffffffffffffffffffffffffff") as storage:
    ...     made = storage.volumes.create("disk", "20G", format="qcow2")
    """

    def __init__(
        self,
        server: str = "http://127.0.0.1:7772",
        *,
        client: str | None = None,
        token: str | None = None,
        ca: str | None = None,
        retries: Retries | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self._runner = Runner(Options(server, token, ca, timeout_s))
        super().__init__(self._runner, client, retries or Retries())

    def close(self) -> None:
        """End the connections."""
        self._runner.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
