"""Volumes as JSON, kept: of ten thousand in a list nearly all are what they were when it was asked for last."""

from typing import Final

import msgspec

from elemento_storage.api.schemas import encode, volume_answer
from elemento_storage.model import Volume

_MOST: Final = 50_000  # some 0.7 kB each


class ListedVolumes:
    """Answers by volume. A ``Volume`` never changes: one that is seen differently is another object."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Volume, msgspec.Raw]] = {}

    def answer(self, volume: Volume) -> msgspec.Raw:
        """The volume as ``volume_answer`` shows it. The time of its locks is not in it."""
        kept = self._kept.get(volume.volume_id)
        if kept is not None and kept[0] is volume:
            return kept[1]
        if len(self._kept) >= _MOST:
            self._kept.clear()
        made = msgspec.Raw(encode(volume_answer(volume)))
        self._kept[volume.volume_id] = volume, made
        return made
