"""A location that stands for a pool: its directory mirrors the pool's index.

For each volume in the index there is a directory as for any other volume, with its meta.json and a ``data.rbd``, so
that whatever works with volumes finds them where it always does. Both are copies and nothing else: they can be deleted,
and come back. Lock files and export markers are this server's own.

A volume that something here is working on, or making, is left alone until that is over.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Collection
from datetime import UTC, datetime

from elemento_storage.catalog import bin_names
from elemento_storage.catalog.guard import WORK_DIRECTORY, try_volume_guard
from elemento_storage.catalog.volume_directory import LOCK_PREFIX, LOCK_SUFFIX, META_FILE
from elemento_storage.ceph import images
from elemento_storage.ceph.faults import CephFault, ImageGone
from elemento_storage.ceph.index import Record, State
from elemento_storage.ceph.pool import Pool, read_ref
from elemento_storage.durable import create, replace
from elemento_storage.model import (
    MARKER_SUFFIX,
    TARGET_PREFIX,
    VolumeFormat,
    new_uid,
    volume_directory_name,
    volume_id_of_directory,
)

log = logging.getLogger(__name__)


class PoolMirror:
    """One location's copy of a pool's index. Every method blocks, and raises CephFault and OSError."""

    def __init__(self, pool: Pool, path: str, making: Collection[str]) -> None:
        self.pool = pool
        self._path = path
        self._making = making  #: volumes that an operation of this process is making
        self._looked_at_all = False

    def sync(self) -> bool:
        """Do here what was changed in the pool, whoever did it; whether anything was."""
        index = self.pool.index
        if not self._looked_at_all:
            self.pool.claims.renew()  # a key that may only read is found out here
        index.refresh()
        if not index.exists:
            self.pool.rebuild()
        changed = index.take_changes()
        if not self._looked_at_all:
            changed |= {one for one in map(volume_id_of_directory, os.listdir(self._path)) if one is not None}
        left: set[str] = set()
        binned = bin_names.by_volume(self._path) if changed else {}
        try:
            for volume_id in changed:
                if not self._apply_guarded(volume_id, binned.get(volume_id, [])):
                    left.add(volume_id)
        except BaseException:
            index.give_back(changed)
            raise
        index.give_back(left)
        self._looked_at_all = True
        return len(changed) > len(left)

    def sync_one(self, volume_id: str) -> None:
        """The same for a volume whose guard and claim are held."""
        self.pool.index.refresh()
        self._apply(volume_id, bin_names.by_volume(self._path, volume_id).get(volume_id, []))

    def _apply_guarded(self, volume_id: str, in_bin: list[str]) -> bool:
        if volume_id in self._making:
            return False
        guard = try_volume_guard(self._path, volume_id)
        if guard is None:
            return False
        with guard:
            self._apply(volume_id, in_bin)
        return True

    def _apply(self, volume_id: str, in_bin: list[str]) -> None:
        record = self.pool.index.records.get(volume_id)
        directory = f"{self._path}/{volume_directory_name(volume_id)}"
        binned = [path for one in in_bin if os.path.lexists(path := f"{self._path}/{one}")]
        if record is None or record.state is State.CREATING:
            if os.path.lexists(directory) or binned:
                self._remove_copies(volume_id, [directory, *binned], doomed=record is not None)
        elif record.state is State.READY:
            if binned and not os.path.lexists(directory):
                os.rename(binned.pop(), directory)
            self._write(directory, volume_id, record)
            for one in binned:
                self._throw_away(one)
        elif os.path.lexists(directory) or not binned:
            where = f"{self._path}/{bin_names.name_in_bin(volume_id, _moment(record.since))}"
            os.makedirs(os.path.dirname(where), exist_ok=True)
            if os.path.lexists(directory) and not binned:
                os.rename(directory, where)
            self._write(where if not binned else binned[-1], volume_id, record)

    def _write(self, directory: str, volume_id: str, record: Record) -> None:
        meta, ref = bytes(record.meta), self.pool.ref(volume_id).encode()
        contents = {META_FILE: meta, VolumeFormat.RBD.data_file: ref}
        if os.path.isdir(directory):
            for name, content in contents.items():
                if _read(f"{directory}/{name}") != content:
                    replace(f"{directory}/{name}", content, sync_name=False)
            return
        new = f"{self._path}/{WORK_DIRECTORY}/trash/{new_uid()}"  # where it is deleted if we die here
        os.mkdir(new, 0o755)
        for name, content in contents.items():
            create(f"{new}/{name}", content)
        os.rename(new, directory)

    def _remove_copies(self, volume_id: str, directories: list[str], *, doomed: bool) -> None:
        """Of a volume that is not in the index any more. What is not such a copy is left where it is."""
        if not doomed:
            with contextlib.suppress(ImageGone):
                self.pool.run(lambda handle: images.read_meta(handle, volume_id))
                return  # the image is there: the index lacks it, and rescan takes it in again
        for directory in directories:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, CephFault):
                if read_ref(directory) == self.pool.ref(volume_id) and not is_in_use(directory):
                    self._throw_away(directory)

    def _throw_away(self, directory: str) -> None:
        trash = f"{self._path}/{WORK_DIRECTORY}/trash/{new_uid()}"
        os.rename(directory, trash)
        shutil.rmtree(trash, ignore_errors=True)


def is_in_use(directory: str) -> bool:
    """Whether there are lock files or export markers in a volume's directory. Blocks. Raises OSError."""
    return any(
        (name.startswith(LOCK_PREFIX) and name.endswith(LOCK_SUFFIX))
        or (name.startswith(TARGET_PREFIX) and name.endswith(MARKER_SUFFIX))
        for name in os.listdir(directory)
    )


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _moment(since: str) -> datetime:
    try:
        return datetime.fromisoformat(since)
    except ValueError:
        return datetime.now(UTC)
