"""Idempotency keys: a call that creates something, sent again with the same key, is not done again.

One file per key below the state directory, written before the work begins. It holds a seed from which the uids of the
volumes to be made are derived: a server that dies between making a volume and answering makes the same volume again on
the retry, finds it there, and answers. Keys are kept for a day, by this server (not by others on the same root).
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Awaitable, Callable

import msgspec

from elemento_storage.disk import Disk
from elemento_storage.durable import replace
from elemento_storage.errors import KeyReused, StorageError
from elemento_storage.faultpoints import reached
from elemento_storage.keyed_locks import KeyedLocks
from elemento_storage.model import new_uid

_KEPT_S = 86400.0
_PRUNE_INTERVAL_S = 3600.0


class _Record(msgspec.Struct):
    fingerprint: str
    seed: str
    answer: str | None = None  #: JSON


def derive_uid(seed: str, index: int) -> str:
    """The uid of the ``index``-th volume of a call."""
    return hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=16).hexdigest()


class IdempotencyKeys:
    """The keys this server has seen."""

    def __init__(self, state_dir: str, disk: Disk) -> None:
        self._directory = f"{state_dir}/idempotency"
        self._disk = disk
        self._locks = KeyedLocks()
        self._pruned = 0.0

    async def start(self) -> None:
        """Make the directory and forget keys older than a day."""
        await self._disk.run(self._prune)

    def _prune(self) -> None:
        self._pruned = time.monotonic()
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        horizon = time.time() - _KEPT_S
        for name in os.listdir(self._directory):
            with contextlib.suppress(FileNotFoundError):
                if os.stat(f"{self._directory}/{name}").st_mtime < horizon:
                    os.unlink(f"{self._directory}/{name}")

    async def once(
        self, scope: str, key: str, body: bytes, work: Callable[[str], Awaitable[bytes]]
    ) -> tuple[bytes, bool]:
        """The JSON answer of ``work(seed)``, and whether it is an earlier one.

        ``scope`` is the client and call the key belongs to. An error is not kept: the next try runs again. Raises
        KeyReused, and what ``work`` raises.
        """
        name = hashlib.sha256(f"{scope}\0{key}".encode()).hexdigest()
        if time.monotonic() - self._pruned > _PRUNE_INTERVAL_S:
            await self._disk.run(self._prune)
        fingerprint = hashlib.sha256(body).hexdigest()
        async with self._locks.hold(name):
            path = f"{self._directory}/{name}"
            record = await self._disk.run(_load, path)
            if record is not None and record.fingerprint != fingerprint:
                raise KeyReused("this Idempotency-Key was used with another body: take a new one")
            if record is not None and record.answer is not None:
                return record.answer.encode(), True
            if record is None:
                record = _Record(fingerprint, new_uid())
                await self._disk.run(replace, path, msgspec.json.encode(record), mode=0o600)
            reached("idempotency.recorded")
            try:
                answer = await work(record.seed)
            except StorageError:
                await self._disk.run(_forget, path)
                raise
            record.answer = answer.decode()
            reached("idempotency.done")
            await self._disk.run(replace, path, msgspec.json.encode(record), mode=0o600)
            return answer, False


def _load(path: str) -> _Record | None:
    try:
        with open(path, "rb") as file:
            record = msgspec.json.decode(file.read(), type=_Record)
    except FileNotFoundError:
        return None
    if time.time() - os.stat(path).st_mtime > _KEPT_S:
        return None
    return record


def _forget(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
