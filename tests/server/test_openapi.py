"""The server against its own description: every route is described, and any request that fits the description, or is
near it, gets a described status and a reply of the described shape."""

from __future__ import annotations

from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from k2lite.engine import Engine
from k2lite.server.app import Server
from k2lite.server.openapi import described
from k2lite.server.service import Service
from tests.samples import examples

DESCRIPTION = described()
ASKED = [(path, verbs["post"]) for path, verbs in DESCRIPTION["paths"].items() if "post" in verbs]
anything = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.just([]), st.just({}))


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return DESCRIPTION["components"]["schemas"][name] if name else schema


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What fits a schema, of the kinds that the description uses."""
    schema = resolved(schema)
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    if "anyOf" in schema:
        return st.one_of(*map(values, schema["anyOf"]))
    kind = schema["type"]
    if kind == "string":
        return st.from_regex(schema["pattern"], fullmatch=True) if "pattern" in schema else texts(schema)
    if kind == "integer":
        return st.integers(schema.get("minimum"), schema.get("maximum", 1 << 20))
    if kind == "number":
        return st.floats(schema["minimum"], schema["maximum"])
    if kind == "boolean":
        return st.booleans()
    if kind == "array":
        return st.lists(values(schema.get("items", {"type": "object"})), min_size=schema.get("minItems", 0), max_size=2)
    properties = {name: values(part) for name, part in schema.get("properties", {}).items()}
    required = {name: properties.pop(name) for name in schema.get("required", [])}
    return st.fixed_dictionaries(required, optional=properties)


def texts(schema: dict[str, Any]) -> st.SearchStrategy[str]:
    letters = st.characters(exclude_categories=["Cs"])
    return st.text(letters, min_size=schema.get("minLength", 0), max_size=20)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A path, what is described of it, and a body that fits or has one wrong field."""
    path, operation = draw(st.sampled_from(ASKED))
    body = draw(values(operation["requestBody"]["content"]["application/json"]["schema"]))
    if draw(st.integers(0, 3)) == 0:
        body[draw(st.sampled_from(sorted(body)))] = draw(anything)
    return path, operation, body


def test_every_route_is_described(tiny_engine: Engine) -> None:
    app = Server(Service(tiny_engine, name="kimi")).app()
    served = {route.path.replace(":path", "") for route in app.routes}  # type: ignore[attr-defined]
    assert served - {"/", "/openapi.json"} == set(DESCRIPTION["paths"])


def test_the_description_is_served_and_its_schemas_are_valid(tiny_server: tuple[str, Service]) -> None:
    assert httpx.get(f"{tiny_server[0]}/openapi.json").json() == DESCRIPTION
    for schema in DESCRIPTION["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/kimi", "/v1/models/x", "/api/state", "/health", "/ready"])
def test_what_is_read_has_the_described_shape(tiny_server: tuple[str, Service], path: str) -> None:
    described_path = "/v1/models/{name}" if path.startswith("/v1/models/") else path
    judge(httpx.get(tiny_server[0] + path), DESCRIPTION["paths"][described_path]["get"])


def test_any_request_gets_a_described_reply(tiny_server: tuple[str, Service], monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.check_request
    monkeypatch.setattr(Engine, "check_request", lambda self, have, want: min(real(self, have, want), 8))
    statuses = []
    with httpx.Client(base_url=tiny_server[0], timeout=60) as client:

        @given(requests())
        @settings(
            max_examples=examples(25),
            database=None,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        def ask(request: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
            path, operation, body = request
            reply = client.post(path, json=body)
            assert reply.status_code in (200, 400), reply.text
            judge(reply, operation)
            statuses.append(reply.status_code)

        ask()
    assert {200, 400} <= set(statuses)


def judge(reply: httpx.Response, operation: dict[str, Any]) -> None:
    """Fail for a status or a shape that is not described."""
    kinds = operation["responses"][str(reply.status_code)]["content"]
    kind = reply.headers["content-type"].partition(";")[0]
    assert kind in kinds
    if kind == "application/json":
        schema = {**kinds[kind]["schema"], "components": DESCRIPTION["components"]}
        jsonschema.validate(reply.json(), schema)
