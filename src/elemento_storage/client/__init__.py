"""The client library: ``Client`` and ``AsyncClient`` (docs/client.md).

It speaks HTTP with the server and imports nothing of it but the words in ``model.py``.
"""

from typing import TYPE_CHECKING, Any

from elemento_storage.client.blocking import Client
from elemento_storage.client.errors import (
    ApiError,
    BadAnswer,
    ClientError,
    Conflict,
    ConnectionBroken,
    Corrupted,
    DownloadFailed,
    FileChanged,
    Forbidden,
    Gone,
    Interrupted,
    InvalidRequest,
    Locked,
    NoRoom,
    NotFound,
    OutcomeUnknown,
    PreconditionFailed,
    Refused,
    ServerFault,
    StillRunning,
    Unauthenticated,
    Unavailable,
    Unreachable,
)
from elemento_storage.client.retry import Retries
from elemento_storage.client.types import Limits, Progress

if TYPE_CHECKING:
    from elemento_storage.client.awaiting import AsyncClient


def __getattr__(name: str) -> Any:
    # Who waits for each answer need not wait for asyncio to be imported.
    if name == "AsyncClient":
        from elemento_storage.client.awaiting import AsyncClient  # noqa: PLC0415

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ApiError",
    "AsyncClient",
    "BadAnswer",
    "Client",
    "ClientError",
    "Conflict",
    "ConnectionBroken",
    "Corrupted",
    "DownloadFailed",
    "FileChanged",
    "Forbidden",
    "Gone",
    "Interrupted",
    "InvalidRequest",
    "Limits",
    "Locked",
    "NoRoom",
    "NotFound",
    "OutcomeUnknown",
    "PreconditionFailed",
    "Progress",
    "Refused",
    "Retries",
    "ServerFault",
    "StillRunning",
    "Unauthenticated",
    "Unavailable",
    "Unreachable",
]
