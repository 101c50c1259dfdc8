"""`openapi.json` says what the API does: its routes, every status of every call, and the shape of every answer."""

import json
import re
import uuid

import pytest
from jsonschema import Draft202012Validator

from core.base.settings import ROOT
from core.order.schemas import event_schemas, schema
from core.order.state_machine import STATUSES
from core.order.view import SHOWN
from core.store.connection import StoreUnavailable
from tests.support.api import ORDER, Client, Shop
from tests.support.samples import ADDRESS

SPEC = json.loads((ROOT / "openapi.json").read_text())
METHODS = ("get", "put", "post", "delete", "patch", "head", "options")
OPERATIONS = [(m.upper(), path) for path, item in SPEC["paths"].items() for m in item if m in METHODS]


def plain(path):
    """A path without the names of its parameters."""
    return re.sub("<[^>]*>|{[^}]*}", "{}", path)


def resolved(node):
    """The spec's node with references followed and OpenAPI 3.0's `nullable` written as JSON Schema writes it."""
    if isinstance(node, list):
        return [resolved(each) for each in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = SPEC
        for part in node["$ref"].split("/")[1:]:
            target = target[part]
        return resolved(target)
    node = {name: resolved(each) for name, each in node.items()}
    if node.pop("nullable", False):
        node["type"] = [node["type"], "null"]
    return node


def documented(method, path, status):
    """What the spec says about an answer, or None."""
    for known, item in SPEC["paths"].items():
        if re.fullmatch(re.sub("{[^}]*}", "[^/]+", re.escape(known).replace(r"\{", "{").replace(r"\}", "}")), path):
            operation = item.get(method.lower()) or (item.get("get") if method == "HEAD" else None)
            one = operation or next(
                item[each] for each in METHODS if each in item
            )  # a 405 is documented by any of them
            return resolved(one["responses"].get(str(status))) if operation or status == 405 else None
    return None


def test_routes_and_spec_name_the_same_calls():
    routes = {(route.method, plain(route.rule)) for route in Shop().app.routes if not route.rule.startswith("/docs/")}
    assert routes == {(method, plain(path)) for method, path in OPERATIONS}


def provoke(shop, monkeypatch):
    """Every status of every call; gives (method, path, answer)."""
    made = shop.client.create({**ORDER, "email": "a@b.cd", "shippingAddress": ADDRESS}, idempotency_key="used")["id"]
    final = shop.client.create()["id"]
    shop.database["orders"].update_one({"_id": final}, {"$set": {"status": "processed"}})
    shop.stock.fill({"A1": 1, "B2": 1})
    one, gone = f"/orders/{made}", f"/orders/{uuid.uuid4()}"
    etag, any_tag = shop.client("GET", one).headers["etag"], {"if_none_match": "*"}
    calls = [
        (shop.client, "POST", "/orders", ORDER, {}), (shop.client, "POST", "/orders", b"{", {}),
        (shop.nobody, "POST", "/orders", ORDER, {}), (shop.reader, "POST", "/orders", ORDER, {}),
        (shop.client, "POST", "/orders", ORDER, {"content_type": "text/plain"}), (shop.client, "POST",
        "/orders", {}, {}),
        (shop.client, "POST", "/orders", b" " * 70000, {}), (shop.client, "POST",
        "/orders", ORDER, {"idempotency_key": "used"}),
        (shop.client, "GET", "/orders", None, {}), (shop.client, "GET", "/orders?limit=1", None, {}),
        (shop.client, "GET", "/orders?x=1", None, {}), (shop.nobody, "GET", "/orders", None, {}),
        (shop.client, "GET", one, None, {}), (shop.client, "HEAD", one, None, {}),
        (shop.client, "GET", one, None, {"if_none_match": etag}), (shop.client, "GET", f"{one}?x=1", None, {}),
        (shop.nobody, "GET", one, None, {}), (shop.client, "GET", gone, None, {}), (shop.rival, "GET", one, None, {}),
        (shop.client, "POST", f"{one}/cancel", None, {}), (shop.client, "POST", f"{one}/cancel", None, {}),
        (shop.client, "POST", f"{one}/cancel?x=1", None, {}), (shop.nobody, "POST", f"{one}/cancel", None, {}),
        (shop.reader, "POST", f"{one}/cancel", None, {}), (shop.client, "POST", f"{gone}/cancel", None, {}),
        (shop.client, "POST", f"/orders/{final}/cancel", None, {}),
        (shop.client, "GET", "/stock", None, {}), (shop.client, "GET", "/stock?limit=1", None, {}),
        (shop.client, "GET", "/stock?cursor=-", None, {}), (shop.nobody, "GET", "/stock", None, {}),
        (shop.client, "GET", "/stock/A1", None, {}), (shop.client, "GET", "/stock/none", None, {}),
        (shop.client, "GET", "/stock/A1?x=1", None, {}), (shop.nobody, "GET", "/stock/A1", None, {}),
        *[(shop.client, "GET", path, None, any_tag) for path in ("/orders", "/stock", "/stock/A1")],
        (shop.admin, "PUT", "/stock/A1", {"available": 1}, {}), (shop.admin, "PUT", "/stock/A1", {}, {}),
        (shop.admin, "PUT", "/stock/C3", {"available": 1}, {}),
        (shop.admin, "PUT", "/stock/A1", {"available": 1}, {"if_match": '"old"'}),
        (shop.admin, "PUT", "/stock/A1", b"", {}), (shop.admin, "PUT", "/stock/A1", b" " * 70000, {}),
        (shop.admin, "PUT", "/stock/A1", {}, {"content_encoding": "gzip"}), (shop.client, "PUT", "/stock/A1", {}, {}),
        (shop.nobody, "PUT", "/stock/A1", {}, {}),
        *[(shop.nobody, "GET", path, None, {}) for path in ("/healthz", "/readyz", "/metrics", "/openapi.json",
        "/docs", "/")],
        *[(shop.nobody, "DELETE", path.format(id=made, sku="A1"), None, {}) for path in SPEC["paths"]],
    ]  # fmt: skip
    for client, method, path, body, headers in calls:
        yield method, path.partition("?")[0], client(method, path, body, **headers)

    def away(*args):
        raise StoreUnavailable

    for part, names in ((shop.orders, ("create", "get", "page", "cancel")), (shop.stock, ("get", "page", "put"))):
        for name in names:
            monkeypatch.setattr(part, name, away)
    for method, path, body in [
        ("POST", "/orders", ORDER), ("GET", "/orders", None), ("GET", one, None), ("POST", f"{one}/cancel", None),
        ("GET", "/stock", None), ("GET", "/stock/A1", None), ("PUT", "/stock/A1", {"available": 1}),
    ]:  # fmt: skip
        yield method, path, shop.admin(method, path, body)
    down = Shop()
    down.break_store(StoreUnavailable())
    yield "GET", "/readyz", down.nobody("GET", "/readyz")


@pytest.fixture(scope="module")
def answers():
    with pytest.MonkeyPatch.context() as monkeypatch:
        return list(provoke(Shop(), monkeypatch))


def test_every_answer_is_documented_with_its_shape(answers):
    for method, path, answer in answers:
        known = documented(method, path, answer.status)
        assert known, f"{method} {path} {answer.status} is not in openapi.json"
        kind = answer.headers.get("content-type", "").partition(";")[0]
        if answer.body and kind.endswith("json") and known.get("content"):
            schema = {**known["content"][kind].get("schema", {}), "components": SPEC["components"]}
            faults = [
                f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(answer.json)
            ]
            assert not faults, (method, path, answer.status, faults)


def test_every_documented_header_is_sent(answers):
    sometimes = {"link", "idempotent-replayed"}
    for method, path, answer in answers:
        named = {name.lower() for name in documented(method, path, answer.status).get("headers", {})}
        assert named - sometimes <= set(answer.headers), (method, path, answer.status)


def test_every_documented_status_can_be_provoked(answers):
    provoked = {(method, path, answer.status) for method, path, answer in answers}
    for method, path in OPERATIONS:
        pattern = re.sub("{[^}]*}", "[^/]+", path)
        happened = {status for m, p, status in provoked if m == method and re.fullmatch(pattern, p)}
        for status in SPEC["paths"][path][method.lower()]["responses"]:
            assert int(status) in happened | {405}, f"{method} {path} never answered {status}"


def test_no_answer_that_any_test_here_got_is_undocumented(answers):
    for method, path, status in Client.seen:
        known = documented(method, path, status) or not any(
            re.fullmatch(re.sub("{[^}]*}", "[^/]+", each), path) for each in SPEC["paths"]
        )
        assert known or status in (404, 500), (method, path, status)


def test_the_examples_in_the_spec_are_true_to_the_code():
    problem = Shop().client("POST", "/orders", {"items": [{"sku": "A1", "quantity": 0, "price": 1}]}).json
    assert problem == SPEC["components"]["responses"]["Unprocessable"]["content"]["application/problem+json"]["example"]


def test_every_field_of_an_order_is_shown_documented_and_in_events():
    sent = set(schema("order").schema["properties"])
    documented = set(SPEC["components"]["schemas"]["Order"]["properties"])
    assert sent <= set(SHOWN) and documented == set(SHOWN)
    for type, each in event_schemas().items():
        assert sent <= set(each.schema["properties"]["data"]["properties"]["order"]["properties"]), type


def test_the_statuses_in_the_spec_are_those_of_the_code():
    assert SPEC["components"]["schemas"]["Status"]["enum"] == STATUSES
