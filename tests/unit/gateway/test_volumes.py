from elemento_storage.gateway.storage_server import StorageServer
from elemento_storage.gateway.volumes import described, is_list_of_volumes, merged

ONE = StorageServer("one", "http://192.0.2.1:7772")
TWO = StorageServer("two", "https://[2001:db8::2]:8443/")
ALICE, BOB = "a" * 32, "b" * 32


def volume(volume_id: str, owner: str = ALICE, size: int = 5) -> dict[str, object]:
    return {"volumeID": volume_id, "creatorID": owner, "size": size}


def test_each_volume_once_with_its_servers() -> None:
    rows = merged([(ONE, [volume("1"), volume("2", BOB)]), (TWO, [volume("2", BOB, 9), volume("3")])], ALICE)
    assert [(one["volumeID"], one["nservers"], one["own"], one["size"]) for one in rows] == [
        ("1", 1, True, 5),
        ("2", 2, False, 5),
        ("3", 1, True, 5),
    ]
    assert rows[1]["servers"] == ["192.0.2.1", "[2001:db8::2]:8443"]
    assert (rows[2]["server"], rows[2]["serverurl"]) == ("[2001:db8::2]:8443", "https://[2001:db8::2]:8443")
    assert merged([], ALICE) == []


def test_what_a_server_says_does_not_replace_what_the_gateway_knows() -> None:
    told = described({**volume("1", BOB), "own": True, "server": "elsewhere", "nservers": 9}, [ONE], ALICE)
    assert (told["own"], told["server"], told["nservers"]) == (False, "192.0.2.1", 1)


def test_what_is_no_list_of_volumes() -> None:
    assert is_list_of_volumes([volume("1")])
    others: list[object] = [None, {}, [1], [{}], [{"volumeID": 5}], "x"]
    for value in others:
        assert not is_list_of_volumes(value)


def test_tokens_go_where_they_are_safe() -> None:
    assert TWO.may_have_tokens
    assert StorageServer("x", "http://127.0.0.1:7772").may_have_tokens
    assert not ONE.may_have_tokens
    assert not StorageServer("x", "http://localhost.example.org").may_have_tokens
