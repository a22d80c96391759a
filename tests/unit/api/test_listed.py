"""Answers that are kept for the next list."""

import msgspec

from elemento_storage.api.listed import ListedVolumes
from elemento_storage.api.schemas import encode, volume_answer
from elemento_storage.model import Volume, VolumeFormat, VolumeMeta, new_uid


def volume(**more: object) -> Volume:
    meta = VolumeMeta(
        volume_id=new_uid(), creator_id=new_uid(), name="one", format=VolumeFormat.RAW, private=True, size=10**9
    )
    made = Volume(
        meta=meta, volume_id=meta.volume_id, location="disk", size_bytes=10**9, allocated_bytes=0, modified_ns=10**18
    )
    return msgspec.structs.replace(made, **more)


def test_an_answer_is_made_once_and_is_the_same() -> None:
    listed, one = ListedVolumes(), volume()
    first = listed.answer(one)
    assert bytes(first) == encode(volume_answer(one))
    assert listed.answer(one) is first


def test_a_volume_that_changed_is_answered_anew() -> None:
    listed, one = ListedVolumes(), volume()
    listed.answer(one)
    grown = msgspec.structs.replace(one, size_bytes=2 * 10**9, exported=True)
    assert bytes(listed.answer(grown)) == encode(volume_answer(grown))
