"""The client library: ``Client`` and ``AsyncClient`` (docs/client.md).

It speaks HTTP with the server and imports nothing of it but the words in ``model.py``.
"""

from elemento_storage.client.awaiting import AsyncClient
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
