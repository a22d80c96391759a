import json
import re
from typing import Any

import jsonschema_rs
import pytest
from starlette.responses import Response

from elemento_storage import errors
from elemento_storage.api import openapi
from elemento_storage.api.app import CALLS, ROUTES
from elemento_storage.api.call import Call, Kind
from elemento_storage.api.errors import status_of
from elemento_storage.api.route import Exchange, Route, Routes
from elemento_storage.errors import StorageError
from tests.unit.support import ALICE, uid

BASE = "/api/v1.0"
DOCUMENT = openapi.document(CALLS, ROUTES, BASE)
ERRORS: list[type[StorageError]] = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, StorageError)
]
CODES: dict[str, type[StorageError]] = {error.code: error for error in ERRORS}
call_of_each_path = pytest.mark.parametrize(
    ("path", "call"), [pytest.param(path, call, id=path) for call in CALLS for path in (call.path, *call.aliases)]
)


def operations() -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, item[method]) for path, item in DOCUMENT["paths"].items() for method in item]


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        here = [value["$ref"]] if "$ref" in value else []
        return here + [found for inner in value.values() for found in references(inner)]
    return [found for inner in value for found in references(inner)] if isinstance(value, list) else []


def validator(schema: dict[str, Any]) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def request_schema(path: str) -> dict[str, Any]:
    schema: dict[str, Any] = DOCUMENT["paths"][f"{BASE}/{path}"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    return schema


def test_it_is_openapi_3_1() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    assert {"title", "version"} <= set(DOCUMENT["info"])
    assert json.loads(openapi.to_json(DOCUMENT)) == DOCUMENT


def test_every_reference_leads_somewhere() -> None:
    found = references(DOCUMENT)
    assert found
    for reference in found:
        prefix, _, name = reference.rpartition("/")
        assert prefix == "#/components/schemas"
        assert name in DOCUMENT["components"]["schemas"]


@pytest.mark.parametrize("name", DOCUMENT["components"]["schemas"])
def test_every_schema_is_json_schema_and_its_patterns_compile(name: str) -> None:
    schema = DOCUMENT["components"]["schemas"][name]
    assert jsonschema_rs.meta.is_valid({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
    validator({"$ref": f"#/components/schemas/{name}"})


@call_of_each_path
def test_every_call_is_there_under_every_name(path: str, call: Call[Any]) -> None:
    item = DOCUMENT["paths"][f"{BASE}/{path}"]
    assert set(item) == ({"get", "post"} if call.answers_get else {"post"})
    assert item["post"]["requestBody"]["content"]["application/json"]["schema"]
    for operation in item.values():
        assert operation["summary"].strip()
        assert operation["responses"]["200"]
        assert ("202" in operation["responses"]) is (call.kind is Kind.LONG)


def test_no_two_calls_share_a_path() -> None:
    paths = [path for call in CALLS for path in (call.path, *call.aliases)]
    assert len(set(paths)) == len(paths)
    assert not set(paths) & {path for path, _ in ROUTES.paths()}


def test_the_calls_of_the_document_are_all_there() -> None:
    made_so_far = {
        "create", "accessible", "info", "destroy", "update", "update/resize", "update/convert", "transfer",
        "update/transfer", "has", "cancreate", "cancreate/multiple", "create/multiple", "revisions",
        "revisions/stream", "version", "delete", "locations", "rescan", "bin", "restore", "jobs", "jobs/{id}",
        "jobs/{id}/events", "events", "health", "metrics",
    }  # fmt: skip
    assert made_so_far <= {path.removeprefix(f"{BASE}/") for path in DOCUMENT["paths"]}


def test_operation_ids_are_unique() -> None:
    ids = [operation["operationId"] for _, _, operation in operations() if "operationId" in operation]
    assert ids
    assert len(set(ids)) == len(ids)


@call_of_each_path
def test_every_error_a_call_may_raise_is_listed_under_its_status(path: str, call: Call[Any]) -> None:
    responses = DOCUMENT["paths"][f"{BASE}/{path}"]["post"]["responses"]
    raised: list[type[StorageError]] = [*call.errors, *openapi.ALWAYS, errors.BodyTooLarge, errors.UnsupportedMediaType]
    for error in raised:
        assert error.code in responses[str(status_of(error))]["description"].split(", ")


def test_every_listed_code_exists_and_has_that_status() -> None:
    for path, method, operation in operations():
        for status, response in operation["responses"].items():
            if int(status) < 400:
                continue
            for code in response["description"].split(", "):
                assert str(status_of(CODES[code])) == status, (path, method, code)
            reference = response["content"]["application/json"]["schema"]["$ref"]
            assert reference.endswith("/ErrorAnswer")


def test_headers_that_change_what_a_call_does_are_told() -> None:
    def headers(path: str) -> set[str]:
        parameters = DOCUMENT["paths"][f"{BASE}/{path}"]["post"].get("parameters", [])
        return {parameter["name"] for parameter in parameters if parameter["in"] == "header"}

    assert headers("create") == {"Idempotency-Key", "Prefer"}
    assert headers("update") == {"If-Match"}
    assert headers("update/convert") == {"Prefer"}
    assert headers("info") == set()


def test_query_parameters_are_the_keys_of_the_body() -> None:
    for call in CALLS:
        if not call.answers_get:
            continue
        name = request_schema(call.path)["$ref"].rpartition("/")[2]
        schema = DOCUMENT["components"]["schemas"][name]
        parameters = DOCUMENT["paths"][f"{BASE}/{call.path}"]["get"].get("parameters", [])
        told = {parameter["name"]: parameter["required"] for parameter in parameters}
        required = set(schema.get("required", ()))
        assert told == {key: key in required for key in schema.get("properties", {})}


@pytest.mark.parametrize(
    ("path", "body", "good"),
    [
        ("create", {"creatorID": ALICE, "name": "x", "size": 1}, True),
        ("create", {"creatorID": ALICE, "name": "x", "size": 0.5, "format": "qcow2", "alg": "no"}, True),
        ("create", {"creatorID": ALICE, "name": "x"}, False),
        ("create", {"creatorID": "x", "name": "x", "size": 1}, False),
        ("create", {"creatorID": ALICE, "name": "x", "size": 0}, False),
        ("create", {"creatorID": ALICE, "name": "x", "size": 1, "bus": "usb"}, False),
        ("info", {"volume_id": "AAAAAAAA-AAAA-AAAA-AAAA-AAAAAAAAAAAA"}, True),
        ("info", {}, False),
        ("accessible", {"client_uid": ALICE, "limit": 10, "sort": "-size"}, True),
        ("accessible", {"client_uid": ALICE, "limit": 0}, False),
        ("update", {"vid": uid(1), "creatorID": ALICE}, True),
        ("update", {"vid": uid(1), "creatorID": ALICE, "private": "no"}, False),
        ("cancreate", {"size": "5"}, True),
        ("cancreate/multiple", {"sizes": []}, False),
    ],
)
def test_the_schemas_know_good_bodies_from_bad_ones(path: str, body: dict[str, Any], good: bool) -> None:
    assert validator(request_schema(path)).is_valid(body) is good


def test_errors_and_answers_of_the_document_fit_their_schemas() -> None:
    answer = {
        "alg": "no", "bootable": False, "bus": "virtio", "clonable": False, "creatorID": ALICE, "img_format": "qcow2",
        "name": "test-create", "private": False, "readonly": False, "shareable": False, "size": 1, "vid": uid(1),
    }  # fmt: skip
    validator({"$ref": "#/components/schemas/CreateAnswer"}).validate(answer)
    del answer["vid"]
    assert not validator({"$ref": "#/components/schemas/CreateAnswer"}).is_valid(answer)
    validator({"$ref": "#/components/schemas/ErrorAnswer"}).validate({"error": "x", "code": "y", "key": "z"})


def test_the_page_names_every_call_and_runs_no_scripts() -> None:
    page = openapi.page(DOCUMENT)
    for path in DOCUMENT["paths"]:
        assert path in page
    assert "<script" not in page.lower()
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page)
    assert page.lower().startswith("<!doctype html>")


def test_the_page_escapes_what_it_shows() -> None:
    async def handle(exchange: Exchange) -> Response:
        """<b>&"""
        raise AssertionError(exchange)

    routes = Routes((Route("GET", "x", handle, {"200": {"description": "<i>"}}),))
    page = openapi.page(openapi.document(CALLS[:1], routes, BASE))
    assert "&lt;b&gt;&amp;" in page
    assert "&lt;i&gt;" in page
    assert "<i>" not in page
