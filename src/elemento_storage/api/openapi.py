"""OpenAPI 3.1 of the calls, made from the same table that serves them, and a page to read it."""

import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from elemento_storage import __version__
from elemento_storage.api.call import Call, Kind
from elemento_storage.api.errors import status_of
from elemento_storage.api.route import Route, Routes
from elemento_storage.api.schemas import ErrorAnswer, Request
from elemento_storage.errors import (
    BodyTooLarge,
    Forbidden,
    InternalFault,
    InvalidRequest,
    LocationUnavailable,
    StorageError,
    Unauthenticated,
    UnsupportedMediaType,
)

Json = dict[str, Any]

_NULL: Json = {"type": "null"}

ALWAYS: tuple[type[StorageError], ...] = (
    InvalidRequest,
    Unauthenticated,
    Forbidden,
    InternalFault,
    LocationUnavailable,
)
_WITH_BODY: tuple[type[StorageError], ...] = (BodyTooLarge, UnsupportedMediaType)


def document(calls: Iterable[Call[Any]], routes: Routes, base: str) -> Json:
    """The OpenAPI document."""
    calls = list(calls)
    types = [kind for call in calls for kind in (call.request, call.answer)]
    types += [kind for route in routes.routes for kind in route.types]
    schemas, components = msgspec.json.schema_components(
        [*types, ErrorAnswer], ref_template="#/components/schemas/{name}"
    )
    for name in {kind.__name__ for kind in types if isinstance(kind, type) and issubclass(kind, Request)}:
        _allow_null(components[name])
    paths: dict[str, Json] = {}
    for position, call in enumerate(calls):
        request, answer = schemas[2 * position], schemas[2 * position + 1]
        for path in (call.path, *call.aliases):
            needs_body = any(key.required for key in msgspec.structs.fields(call.request))
            item: Json = {"post": _operation(call, path, "post", answer, request=request, needs_body=needs_body)}
            if call.answers_get:
                parameters = _query_parameters(components, request)
                item["get"] = _operation(call, path, "get", answer, parameters=parameters)
            paths[f"{base}/{path}"] = item
    for path, methods in routes.paths():
        paths[f"{base}/{path.replace('...}', '}')}"] = {
            method.lower(): _route_operation(route) for method, route in methods.items()
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Elemento Storage Server",
            "version": __version__,
            "description": "Keeps the disks of virtual machines. Sizes in requests are GB of 10^9 bytes.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def error_responses(errors: Iterable[type[StorageError]]) -> Json:
    """The error answers by status, each with the codes it can carry."""
    codes: dict[int, set[str]] = {}
    for error in errors:
        codes.setdefault(status_of(error), set()).add(error.code)
    return {
        str(status): {
            "description": ", ".join(sorted(names)),
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}},
        }
        for status, names in sorted(codes.items())
    }


def _route_operation(route: Route) -> Json:
    summary, _, rest = route.doc.partition("\n")
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)(?:\.\.\.)?}", route.path)
    ]
    operation: Json = {
        "operationId": f"{route.method.lower()}_{re.sub(r'[^a-z]+', '_', route.path).strip('_')}",
        "summary": summary,
        "responses": {**route.answers, **error_responses((*ALWAYS, *route.errors))},
    }
    if description := " ".join(rest.split()):
        operation["description"] = description
    if parameters := [*in_path, *route.parameters]:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = route.body
    return operation


def _operation(
    call: Call[Any],
    path: str,
    method: str,
    answer: Json,
    *,
    request: Json | None = None,
    needs_body: bool = False,
    parameters: list[Json] | None = None,
) -> Json:
    summary, _, rest = call.doc.partition("\n")
    errors = (*ALWAYS, *call.errors, *(_WITH_BODY if request else ()))
    operation: Json = {
        "operationId": f"{method}_{path.replace('/', '_')}",
        "summary": summary,
        "responses": {
            "200": {"description": "done", "content": {"application/json": {"schema": answer}}},
            **error_responses(errors),
        },
    }
    description = " ".join(rest.split())
    if description:
        operation["description"] = description
    parameters = list(parameters or [])
    if call.creates:
        parameters.append(
            _header("Idempotency-Key", "The same key and body get the same answer, once only done.", "^[!-~]{1,255}$")
        )
    if call.path == "update":
        parameters.append(_header("If-Match", "Only if the volume's ETag is still this."))
    if call.kind is Kind.LONG:
        parameters.append(_header("Prefer", "`respond-async` answers 202 with the job's address at once."))
        operation["responses"]["202"] = {
            "description": "begun; the Location header is the job's address",
            "content": {"application/json": {"schema": {"type": "object", "properties": {"job": {"type": "string"}}}}},
        }
    if parameters:
        operation["parameters"] = parameters
    if request is not None:
        operation["requestBody"] = {"required": needs_body, "content": {"application/json": {"schema": request}}}
    return operation


def _header(name: str, description: str, pattern: str = "") -> Json:
    schema = {"type": "string", "pattern": pattern} if pattern else {"type": "string"}
    return {"name": name, "in": "header", "description": description, "schema": schema}


def _query_parameters(components: Mapping[str, Any], request: Json) -> list[Json]:
    schema = components[request["$ref"].rpartition("/")[2]]
    required = set(schema.get("required", ()))
    return [
        {"name": name, "in": "query", "required": name in required, "schema": _without_null(schema_of_key)}
        for name, schema_of_key in schema.get("properties", {}).items()
    ]


def _allow_null(request: Json) -> None:
    """A key that is null counts as absent, so every optional key may be null."""
    for name, schema in request.get("properties", {}).items():
        if name not in request.get("required", ()) and _NULL not in schema.get("anyOf", ()):
            default = {"default": schema.pop("default")} if "default" in schema else {}
            request["properties"][name] = {"anyOf": [schema, _NULL], **default}


def _without_null(schema: Json) -> Json:
    kept = [part for part in schema.get("anyOf", ()) if part != _NULL]
    if len(kept) == 1:
        return {**kept[0], **{key: value for key, value in schema.items() if key != "anyOf"}}
    return {**schema, "anyOf": kept} if kept else schema


def page(openapi: Json) -> str:
    """A page for people: every call, what it takes and answers. No scripts, nothing from elsewhere."""
    rows = []
    schemas = openapi["components"]["schemas"]
    for path, item in openapi["paths"].items():
        methods = ", ".join(method.upper() for method in item)
        operation = item.get("post") or item.get("get") or next(iter(item.values()))
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
        keys = _keys_table(schemas.get(body.get("$ref", "").rpartition("/")[2], {}))
        told = "".join(
            f"<li><b>{status}</b> {html.escape(response['description'])}</li>"
            for status, response in sorted(operation["responses"].items())
        )
        rows.append(
            f"<section><h2><code>{methods} {html.escape(path)}</code></h2><p>{html.escape(operation['summary'])} "
            f"{html.escape(operation.get('description', ''))}</p>{keys}<ul>{told}</ul></section>"
        )
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "td,th{text-align:left;padding:.1rem 1rem .1rem 0;vertical-align:top}h2{margin-top:2.5rem;font-size:1.1rem}"
        "@media(prefers-color-scheme:dark){body{background:#151515;color:#eee}}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Elemento Storage API</title>'
        f"<style>{style}</style><h1>Elemento Storage Server {__version__}</h1>"
        f'<p>The same for programs: <a href="/schema/openapi.json">openapi.json</a></p>{"".join(rows)}</html>'
    )


def _keys_table(schema: Mapping[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td>{'required' if name in required else ''}</td>"
        f"<td>{html.escape(_told(key))}</td></tr>"
        for name, key in schema.get("properties", {}).items()
    )
    return f"<table>{rows}</table>" if rows else ""


def _told(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_told(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "enum" in schema:
        return ", ".join(str(value) for value in schema["enum"])
    told = schema.get("description") or schema.get("$ref", "").rpartition("/")[2] or schema.get("type", "")
    return told if isinstance(told, str) else ", ".join(told)


def to_json(openapi: Json) -> bytes:
    """The document's bytes."""
    return msgspec.json.encode(openapi)
