"""``AsyncClient``: carries plans out on an event loop. Step for step what ``blocking.py`` does."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

import httpx

from elemento_storage.client.connection import Options, broken, headers_of
from elemento_storage.client.errors import ClientError
from elemento_storage.client.exchange import (
    Awaiting,
    Close,
    Emit,
    Open,
    Parts,
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
        self.parts = response.aiter_raw(chunk)


class Runner:
    """Carries plans out over one pool of connections, on one event loop."""

    def __init__(self, options: Options) -> None:
        self._http = httpx.AsyncClient(**options.for_httpx())
        self._options = options

    async def run(self, plan: Plan[T]) -> T:
        """See exchange.Awaiting."""
        streams: list[_Stream] = []
        try:
            step = next(plan)
            while True:
                try:
                    came = await self._perform(step, streams)
                except (ClientError, OSError) as error:
                    step = plan.throw(error)
                else:
                    step = plan.send(came)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        finally:
            for stream in streams:
                await stream.response.aclose()

    async def items(self, plan: Plan[None]) -> AsyncIterator[Any]:
        """See exchange.Awaiting."""
        streams: list[_Stream] = []
        try:
            step = next(plan)
            while True:
                if isinstance(step, Emit):
                    yield step.item
                    step = plan.send(None)
                    continue
                try:
                    came = await self._perform(step, streams)
                except (ClientError, OSError) as error:
                    step = plan.throw(error)
                else:
                    step = plan.send(came)
        except StopIteration:
            return
        finally:
            for stream in streams:
                await stream.response.aclose()

    async def _perform(self, step: Step, streams: list[_Stream]) -> Any:
        match step:
            case Send(request):
                try:
                    response = await self._http.send(self._built(request))
                except httpx.HTTPError as error:
                    raise broken(error, self._options) from error
                return Response(response.status_code, response.headers, response.content)
            case Open(request, chunk):
                try:
                    stream = _Stream(await self._http.send(self._built(request), stream=True), chunk)
                except httpx.HTTPError as error:
                    raise broken(error, self._options) from error
                streams.append(stream)
                return stream
            case Read(stream):
                try:
                    return await anext(stream.parts, b"")
                except httpx.HTTPError as error:
                    raise broken(error, self._options) from error
            case Close(stream):
                await stream.response.aclose()
                return None
            case Sleep(seconds):
                await asyncio.sleep(seconds)
                return None
            case Work(function):
                return await asyncio.to_thread(function)
            case _:
                raise TypeError(f"{step} has no place here")

    def _built(self, request: Request) -> httpx.Request:
        body = request.body
        return self._http.build_request(
            request.method,
            request.path,
            content=(body if isinstance(body, bytes) else _in_threads(body)) or None,
            headers=request.headers,
            params=request.query,
        )

    async def close(self) -> None:
        """End the connections."""
        await self._http.aclose()


async def _in_threads(parts: Parts) -> AsyncIterator[bytes]:
    """The parts of a body that wait for a disk."""
    iterator: Iterator[bytes] = parts()
    while (part := await asyncio.to_thread(next, iterator, None)) is not None:
        yield part


class AsyncClient(Groups[Awaiting]):
    """A storage server, for programs with an event loop.

    >>> async with AsyncClient("http://127.0.0.1:7772", client="ffffffffffffffffffffffffffffffff") as storage:
    ...     made = await storage.volumes.create("disk", "20G", format="qcow2")
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

    async def close(self) -> None:
        """End the connections."""
        await self._runner.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
