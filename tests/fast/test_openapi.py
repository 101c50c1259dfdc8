"""`openapi.json` says what the API does: its routes, every status, header and problem of every call, every answer."""

import json
import re
import uuid

import pytest
from jsonschema import Draft202012Validator

from core.base.settings import ROOT
from core.http.problems import PROBLEMS
from core.order.schemas import event_schemas, schema
from core.order.state_machine import STATUSES
from core.order.view import SHOWN
from core.store.connection import StoreUnavailable
from tests.support import contracts
from tests.support.api import ORDER, Client, Shop
from tests.support.samples import ADDRESS

SPEC = json.loads((ROOT / "openapi.json").read_text())
METHODS = ("get", "put", "post", "delete", "patch", "head", "options")
OPERATIONS = [(m.upper(), path) for path, item in SPEC["paths"].items() for m in item if m in METHODS]
WITH_KEY = [(method, path) for method, path in OPERATIONS if "security" not in SPEC["paths"][path][method.lower()]]


def plain(path):
    """A path without the names of its parameters."""
    return re.sub("<[^>]*>|{[^}]*}", "{}", path)


def resolved(node):
    """The spec's node with references followed."""
    if isinstance(node, list):
        return [resolved(each) for each in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = SPEC
        for part in node["$ref"].split("/")[1:]:
            target = target[part]
        return resolved(target)
    return {name: resolved(each) for name, each in node.items()}


def fits(path, known):
    """Whether a path is of this kind, as the spec writes it."""
    return re.fullmatch(re.sub("{[^}]*}", "[^/]+", known), path)


def documented(method, path, status):
    """What the spec says about an answer, or None."""
    item = next((item for known, item in SPEC["paths"].items() if fits(path, known)), {})
    operation = item.get("get" if method == "HEAD" else method.lower())
    if operation is None and status == 405:  # any call of the path describes it
        operation = next((item[each] for each in METHODS if each in item), None)
    return resolved(operation["responses"].get(str(status))) if operation else None


def faults(node, value):
    """What is wrong with a value, by a schema of the spec."""
    return [error.message for error in Draft202012Validator({**node, **SPEC}).iter_errors(value)]


def test_routes_and_spec_name_the_same_calls():
    routes = {(route.method, plain(route.rule)) for route in Shop().app.routes}
    parts = {(method, path) for method, path in routes if path.endswith((".js", ".css"))}  # of the two pages
    assert routes - parts == {(method, plain(path)) for method, path in OPERATIONS}


def provoke(shop, monkeypatch):
    """Every status of every call; gives (method, path, answer)."""
    made = shop.client.create({**ORDER, "email": "a@b.cd", "shippingAddress": ADDRESS}, idempotency_key="used")["id"]
    final = shop.client.create()["id"]
    shop.database["orders"].update_one({"_id": final}, {"$set": {"status": "processed"}})
    shop.stock.fill({"A1": 1, "B2": 1})
    shop.store.reports.put({"email": {"takes": ["order_failed"], "waiting": 0, "dead": 1, "retryDelays": [0.5, 2]}})
    one, gone = f"/orders/{made}", f"/orders/{uuid.uuid4()}"
    etag, any_tag = shop.client("GET", one).headers["etag"], {"if_none_match": "*"}
    key = {"idempotency_key": "used"}
    calls = [
        (shop.client, "POST", "/orders", {**ORDER, "email": "a@b.cd", "shippingAddress": ADDRESS}, key),
        (shop.client, "POST", "/orders", ORDER, {}), (shop.client, "POST", "/orders", b"{", {}),
        (shop.nobody, "POST", "/orders", ORDER, {}), (shop.reader, "POST", "/orders", ORDER, {}),
        (shop.client, "POST", "/orders", ORDER, {"content_type": "text/plain"}),
        (shop.client, "POST", "/orders", {}, {}), (shop.client, "POST", "/orders", b" " * 70000, {}),
        (shop.client, "POST", "/orders", ORDER, key),
        (shop.client, "GET", "/orders?limit=1", None, {}), (shop.client, "HEAD", one, None, {}),
        (shop.client, "GET", "/orders?x=1", None, {}), (shop.client, "GET", "/stock?cursor=-", None, {}),
        (shop.client, "GET", "/stock?limit=1", None, {}), (shop.client, "GET", one, None, {"if_none_match": etag}),
        *[(shop.nobody, method, path.format(id=made, sku="A1"), None, {}) for method, path in WITH_KEY],
        *[(shop.client, "GET", path.format(id=made, sku="A1"), None, {}) for method, path in WITH_KEY
          if method == "GET"],
        *[(shop.client, "GET", path.format(id=made, sku="A1"), None, any_tag) for method, path in WITH_KEY
          if method == "GET"],
        *[(shop.admin, method, path.format(id=made, sku="A1") + "?x=1", {}, {}) for method, path in WITH_KEY],
        (shop.client, "GET", gone, None, {}), (shop.rival, "GET", one, None, {}),
        (shop.client, "GET", f"{gone}/events", None, {}), (shop.client, "GET", "/stock/none", None, {}),
        (shop.client, "POST", f"{one}/redrive", None, {}), (shop.admin, "POST", f"{one}/redrive", None, {}),
        (shop.admin, "POST", f"{gone}/redrive", None, {}),
        (shop.client, "POST", f"{one}/cancel", None, {}), (shop.client, "POST", f"{one}/cancel", None, {}),
        (shop.reader, "POST", f"{one}/cancel", None, {}), (shop.client, "POST", f"{gone}/cancel", None, {}),
        (shop.client, "POST", f"/orders/{final}/cancel", None, {}),
        (shop.admin, "PUT", "/stock/A1", {"available": 1}, {}), (shop.admin, "PUT", "/stock/A1", {}, {}),
        *[(shop.admin, "PUT", "/stock/C3", {"available": units}, key) for units in (1, 2)],
        (shop.admin, "PUT", "/stock/A1", {"available": 1}, {"if_match": '"old"'}),
        (shop.admin, "PUT", "/stock/A1", b"", {}), (shop.admin, "PUT", "/stock/A1", b" " * 70000, {}),
        (shop.admin, "PUT", "/stock/A1", {}, {"content_encoding": "gzip"}), (shop.client, "PUT", "/stock/A1", {}, {}),
        (shop.admin, "PUT", "/stock/%7F", {"available": 1}, {}),
        *[(shop.nobody, method, path, None, {}) for method, path in OPERATIONS if (method, path) not in WITH_KEY],
        *[(shop.nobody, "DELETE", path.format(id=made, sku="A1"), None, {}) for path in SPEC["paths"]],
    ]  # fmt: skip
    for client, method, path, body, headers in calls:
        yield method, path.partition("?")[0], client(method, path, body, **headers)
    for error in (StoreUnavailable, ZeroDivisionError):
        break_all(shop, monkeypatch, error)
        for method, path in WITH_KEY:
            address = path.format(id=made, sku="A1")
            body = {"/orders": ORDER, "/stock/A1": {"available": 1}}.get(address) if method != "GET" else None
            yield method, address, shop.admin(method, address, body)
    down = Shop()
    down.break_store(StoreUnavailable())
    yield "GET", "/readyz", down.nobody("GET", "/readyz")


def break_all(shop, monkeypatch, error):
    """Have whatever the API asks of the store raise."""

    def broken(*args, **more):
        raise error

    for part, names in (
        (shop.orders, ("create", "get", "page", "cancel")), (shop.stock, ("get", "page", "put")),
        (shop.store.reports, ("all",)),
    ):  # fmt: skip
        for name in names:
            monkeypatch.setattr(part, name, broken)


@pytest.fixture(scope="module")
def answers():
    with pytest.MonkeyPatch.context() as monkeypatch:
        return list(provoke(Shop(), monkeypatch))


def test_every_answer_is_documented_with_its_shape(answers):
    for method, path, answer in answers:
        known = documented(method, path, answer.status)
        assert known, f"{method} {path} {answer.status} is not in openapi.json"
        kind = answer.headers.get("content-type", "").partition(";")[0]
        assert kind in known.get("content", {"": {}}) or not answer.body, (method, path, answer.status, kind)
        if answer.body and kind.endswith("json"):
            found = faults(known["content"][kind]["schema"], answer.json)
            assert not found, (method, path, answer.status, found)


def test_a_line_of_the_timeline_says_one_thing(answers):
    # Said in words: where a schema has it, as `oneOf`, generated clients lose the fields.
    things = {"event", "done", "failed", "parked", "lost", "sent"}
    assert things <= set(SPEC["components"]["schemas"]["TimelineEntry"]["properties"])
    of_orders = [answer.json for _, path, answer in answers if path.startswith("/orders") and answer.body]
    orders = contracts.objects([*of_orders, SPEC["components"]["examples"]])
    lines = [line for order in orders for line in order.get("timeline", [])]
    assert lines and all(len(things & set(line)) == 1 for line in lines)


def test_every_problem_is_documented_with_its_type_and_no_other(answers):
    seen = {}
    for method, path, answer in answers:
        if "problem" in answer.headers.get("content-type", "") and answer.body:
            known = documented(method, path, answer.status)["content"]["application/problem+json"]["examples"]
            types = {each["value"]["type"]: each["value"]["title"] for each in known.values()}
            assert answer.problem["title"] == types.get(answer.problem["type"]), (method, path, answer.json)
            seen.setdefault((answer.status, *sorted(types)), set()).add(answer.problem["type"])
    assert all(types == set(named) for (_, *named), types in seen.items())
    of_all = {(type.rpartition(":")[2], status) for (status, *_), types in seen.items() for type in types}
    assert of_all == set(PROBLEMS.items())


def test_every_documented_header_is_sent_and_every_header_that_says_something_is_documented(answers):
    sometimes = {"link", "idempotent-replayed"}
    tell = {"location", "etag", "link", "idempotent-replayed", "retry-after", "www-authenticate", "allow"}
    sent = set()
    for method, path, answer in answers:
        named = {name.lower() for name in documented(method, path, answer.status).get("headers", {})}
        assert named - sometimes <= set(answer.headers), (method, path, answer.status)
        assert set(answer.headers) & tell <= named, (method, path, answer.status)
        sent |= set(answer.headers) & tell
    assert sent == tell


def test_every_header_that_is_read_is_documented():
    program = "".join((ROOT / name).read_text() for name in ("orderproc.py", "core/http/app.py"))
    read = {name.lower().replace("_", "-") for name in re.findall(r'header\("([A-Z_]+)"', program)}
    named = {
        resolved(each)["name"].lower()
        for item in SPEC["paths"].values() for operation in item.values() if isinstance(operation, dict)
        for each in operation.get("parameters", []) if resolved(each)["in"] == "header"
    }  # fmt: skip
    assert named == read - {"authorization", "content-encoding"}  # the security scheme, and the 415, tell of these


def test_every_documented_status_can_be_provoked(answers):
    provoked = {(method, path, answer.status) for method, path, answer in answers}
    for method, path in OPERATIONS:
        happened = {status for m, p, status in provoked if m == method and fits(p, path)}
        for status in SPEC["paths"][path][method.lower()]["responses"]:
            assert int(status) in happened | {405}, f"{method} {path} never answered {status}"


def test_no_answer_that_any_test_here_got_is_undocumented(answers):
    for method, path, status in Client.seen:
        known = documented(method, path, status) or not any(fits(path, each) for each in SPEC["paths"])
        assert known or status in (404, 500), (method, path, status)


def test_every_example_is_valid():
    checked = 0
    for node in contracts.objects(SPEC):
        single = {"": {"value": node["example"]}} if "example" in node and "schema" in node else {}
        for example in [*single.values(), *(node.get("examples", {}).values() if "schema" in node else ())]:
            found = faults(node["schema"], resolved(example)["value"])
            assert not found, (example, found)
            checked += 1
    assert checked > 40


def test_every_reference_leads_somewhere():
    assert all(resolved(node) is not None for node in contracts.objects(SPEC))


def test_the_examples_in_the_spec_are_true_to_the_code():
    problem = Shop().client("POST", "/orders", {"items": [{"sku": "A1", "quantity": 0, "price": 1}]}).json
    content = SPEC["components"]["responses"]["Refused"]["content"]["application/problem+json"]
    assert problem == content["examples"]["invalid"]["value"]


def test_every_field_of_an_order_is_shown_documented_and_in_events():
    sent = set(schema("order").schema["properties"])
    documented = set(SPEC["components"]["schemas"]["Order"]["properties"])
    assert sent <= set(SHOWN) and documented == set(SHOWN)
    for type, each in event_schemas().items():
        assert sent <= set(each.schema["properties"]["data"]["properties"]["order"]["properties"]), type


def test_the_statuses_in_the_spec_are_those_of_the_code():
    assert SPEC["components"]["schemas"]["Status"]["enum"] == STATUSES


def test_the_schemas_in_the_spec_are_the_files_of_the_schemas_folder():
    assert contracts.openapi() == SPEC, "python -m tests.support.contracts"
    assert SPEC["components"]["schemas"]["NewOrder"] == json.loads((ROOT / "schemas/order.json").read_text())
    assert SPEC["components"]["schemas"]["SetStock"] == json.loads((ROOT / "schemas/stock.json").read_text())
    assert {"specversion", "id", "subject", "time", "datacontenttype", "traceparent"} <= set(contracts.attributes())
