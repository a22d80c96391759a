import pytest

from elemento_storage.errors import NotOwner, VolumeNotFound
from elemento_storage.model import Volume, VolumeMeta
from elemento_storage.service.access import INFRASTRUCTURE, Actor, audience
from tests.unit.support import ALICE, BOB, uid


def volume(*, private: bool) -> Volume:
    meta = VolumeMeta(volume_id=uid(1), creator_id=ALICE, private=private)
    return Volume(meta=meta, volume_id=uid(1), location="disk", size_bytes=1, allocated_bytes=0, modified_ns=0)


@pytest.mark.parametrize("actor", [Actor(ALICE), INFRASTRUCTURE])
@pytest.mark.parametrize("private", [True, False])
def test_the_owner_and_the_infrastructure_may_do_everything(actor: Actor, private: bool) -> None:
    assert actor.may_see(volume(private=private))
    actor.require_see(volume(private=private))
    actor.require_change(volume(private=private))


def test_others_see_what_is_not_private_and_change_nothing() -> None:
    bob = Actor(BOB)
    assert bob.may_see(volume(private=False))
    bob.require_see(volume(private=False))
    with pytest.raises(NotOwner):
        bob.require_change(volume(private=False))


def test_to_others_a_private_volume_does_not_exist() -> None:
    bob = Actor(BOB)
    assert not bob.may_see(volume(private=True))
    answers = []
    for call in (bob.require_see, bob.require_change):
        with pytest.raises(VolumeNotFound) as caught:
            call(volume(private=True))
        answers.append((caught.value.message, dict(caught.value.details)))
    missing = VolumeNotFound(uid(1))
    assert answers == [(missing.message, dict(missing.details))] * 2, "not to be told from one that is not there"


def test_an_actor_without_a_name_owns_nothing() -> None:
    assert not Actor("").may_see(volume(private=True))


@pytest.mark.parametrize("private", [True, False])
def test_the_feed_tells_exactly_those_who_may_see(private: bool) -> None:
    for client in (ALICE, BOB, None):
        assert audience(volume(private=private)).includes(client) is Actor(client).may_see(volume(private=private))
