import pytest
from starlette.responses import Response

from elemento_storage.api.route import Exchange, Route, Routes
from elemento_storage.errors import MethodNotAllowed


async def nothing(exchange: Exchange) -> Response:
    """Nothing."""
    raise AssertionError(exchange)


ROUTES = Routes(
    (
        Route("GET", "things/{id}", nothing, {}),
        Route("DELETE", "things/{id}", nothing, {}),
        Route("GET", "things/{id}/parts/{part}", nothing, {}),
        Route("GET", "things", nothing, {}),
        Route("POST", "files/{name...}", nothing, {}),
    )
)


def test_a_route_is_found_with_its_parameters() -> None:
    found = ROUTES.find("GET", "things/7/parts/x")
    assert found is not None
    assert found[0].path == "things/{id}/parts/{part}"
    assert found[1] == {"id": "7", "part": "x"}
    assert ROUTES.named("things/7") == "things/<id>"


@pytest.mark.parametrize("rest", ["a", "a/b//c", "a=="])
def test_the_last_part_may_take_what_is_left(rest: str) -> None:
    found = ROUTES.find("POST", f"files/{rest}")
    assert found is not None
    assert found[1] == {"name": rest}
    assert ROUTES.named(f"files/{rest}") == "files/<name>"


@pytest.mark.parametrize(
    "path", ["", "thing", "files", "files/", "things/", "things/7/parts", "things/7/parts/", "things/7/8/9/10"]
)
def test_other_paths_are_none(path: str) -> None:
    assert ROUTES.find("GET", path) is None
    assert ROUTES.named(path) is None


def test_another_method_is_told_which_are_allowed() -> None:
    with pytest.raises(MethodNotAllowed) as refused:
        ROUTES.find("POST", "things/7")
    assert refused.value.details["allowed"] == "DELETE, GET"
