"""Events of the release before and of the next one: whatever takes an event takes them all, down to mail and label.

The variants are made from the schemas and the handlers from their folder, so a new event type or handler is in as well.
"""

import copy
import importlib
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import mongomock
import pytest

from core.base.ids import now
from core.base.settings import ROOT
from core.order.answers import check_answers
from core.order.events import parse
from core.order.schemas import event_schemas
from core.order.view import view
from core.running.discovery import discover
from core.store.store import Store
from tests import fakes
from tests.support.consumer import Desk
from tests.support.lambda_runtimes import keep_to
from tests.support.samples import api_event, place
from tools.chaos.system import wait_for

HANDLERS = discover(ROOT / "handlers")
TAKEN = [(handler, type) for handler, taken in HANDLERS.items() for type in taken]
SUBSCRIBERS = {type: handler for handler, type in TAKEN}
SURPRISE = "surprise"
SURPRISES = {"x-text": SURPRISE, "x-flag": True, "x-none": None, "x-object": {SURPRISE: [1.5]}, "x-list": [SURPRISE]}
KNOWN = {  # values where a schema asks for more than just any text
    "id": fakes.ORDER["id"], "subject": fakes.ORDER["id"], "source": "/orderproc/handlers/any", "currency": "EUR",
    "time": "2026-01-31T09:30:00.000Z", "email": "ada@example.com", "sku": "A1",
    "shippingAddress": {"name": "Ada", "line1": "1 Mill", "city": "York", "postalCode": "Y1", "country": "GB"},
}  # fmt: skip


# --- events made from their schemas


def whole(schema: dict[str, Any], name: str = "") -> Any:
    """A value with every field the schema names."""
    if name in KNOWN and "const" not in schema:
        return copy.deepcopy(KNOWN[name])
    if "properties" in schema:
        return {field: whole(part, field) for field, part in schema["properties"].items()}
    if "items" in schema:
        return [whole(schema["items"])]
    if "enum" in schema:
        return schema["enum"][0]
    return schema["const"] if "const" in schema else {"string": "a text", "object": {}}.get(schema["type"], 1)


def bare(schema: dict[str, Any], name: str = "") -> Any:
    """A value with no field that the schema can do without."""
    if "properties" in schema:
        return {field: bare(schema["properties"][field], field) for field in schema["required"]}
    return [bare(schema["items"])] if "items" in schema else whole(schema, name)


def with_surprises(value: Any) -> Any:
    """The value with fields that nobody knows in every object."""
    if isinstance(value, dict):
        return {name: with_surprises(part) for name, part in value.items()} | SURPRISES
    return [with_surprises(part) for part in value] if isinstance(value, list) else value


def required(schema: dict[str, Any], *path: str | int) -> Iterator[tuple[str | int, ...]]:
    """Where the fields are that must be there, however deep."""
    for name in schema.get("required", ()):
        yield *path, name
    for name, part in schema.get("properties", {}).items():
        yield from required(part, *path, name)
    if "items" in schema:
        yield from required(schema["items"], *path, 0)


def without(value: Any, *path: str | int) -> Any:
    value = place = copy.deepcopy(value)
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return value


def schema(type: str) -> dict[str, Any]:
    return event_schemas()[type].schema


# --- what a handler makes of them


@pytest.fixture
def handle(tmp_path, monkeypatch):
    """Runs a handler on an event as it travels, with the real functions in a folder of their own; gives its answers,
    the units left, and what was written: mails without their date, labels."""

    def run(handler: str, envelope: dict[str, Any], name: str) -> tuple[list, dict[str, int], list[str]]:
        keep_to(tmp_path / name, monkeypatch)
        given = fakes.services(stock={"A1": 5}, holds={"A1": 1})
        given.invoke = lambda function, payload: importlib.import_module(f"lambdas.{function}").handler(payload, None)
        event = parse(json.dumps(envelope).encode())
        answer = HANDLERS[handler][event.type](event, given)
        answers = check_answers(event, handler, answer)
        written = [path.read_text() for path in sorted((tmp_path / name).rglob("*.*")) if path.is_file()]
        return [(each.type, each.data) for each in answers], given.stock.units, written

    return run


def lasting(written: list[str]) -> list[str]:
    """Without what differs from mail to mail: its date, and the boundary between its parts."""
    return [line for text in written for line in text.splitlines() if "Date:" not in line and "=====" not in line]


@pytest.mark.parametrize(("handler", "type"), TAKEN)
def test_fields_that_nobody_knows_change_nothing_not_even_the_mail(handler, type, handle):
    today = whole(schema(type))
    answers, units, written = handle(handler, today, "today")
    answers_then, units_then, written_then = handle(handler, with_surprises(today), "next")
    assert (answers_then, units_then, lasting(written_then)) == (answers, units, lasting(written))
    assert SURPRISE in json.dumps(with_surprises(today)) and SURPRISE not in "".join(written_then)


@pytest.mark.parametrize(("handler", "type"), TAKEN)
def test_fields_that_may_be_missing_are_not_missed(handler, type, handle):
    answers, units, _ = handle(handler, whole(schema(type)), "today")
    assert handle(handler, bare(schema(type)), "before")[:2] == (answers, units)


def test_some_fields_are_optional_and_every_type_has_a_subscriber():
    assert {"email", "shippingAddress"} <= set(whole(schema("order_created"))["data"]["order"])
    assert not {"email", "shippingAddress"} & set(bare(schema("order_created"))["data"]["order"])
    assert "traceparent" in whole(schema("order_created")) and "traceparent" not in bare(schema("order_created"))
    assert set(SUBSCRIBERS) == set(event_schemas())


@pytest.mark.parametrize("type", event_schemas())
def test_events_without_a_required_field_are_parked_with_the_reason(type):
    desk = Desk(**HANDLERS)
    bodies = {path: json.dumps(without(whole(schema(type)), *path)).encode() for path in required(schema(type))}
    assert ("data", "order", "items", 0, "sku") in bodies and len(bodies) >= 20
    for path, body in bodies.items():
        delivery = desk.give(SUBSCRIBERS[type], body, id="m")
        wait_for(lambda ends=delivery.ends: ends, 10, "the delivery ended")
        [(end, reason, tries)] = delivery.ends
        assert (end, tries) == ("park", 1)
        missing = f"/{'/'.join(map(str, path))} is required" if path != ("type",) else "KeyError('type')"
        assert missing in reason
    assert desk.bus.sent == []


# --- what another release wrote into an order


def test_an_order_keeps_and_hides_fields_of_the_next_release():
    desk = Desk(**HANDLERS)
    orders = desk.orders
    document = place(desk.store, shippingAddress={"name": "Ada", "x-flag": True}, **SURPRISES)
    line = {"at": now(), "event": "x", "by": "x", "x-when": now()}
    desk.database["orders"].update_one({"_id": document["_id"]}, {"$push": {"timeline": line}})
    shown = view(orders.get(document["_id"]))
    assert not set(SURPRISES) & set(shown)
    assert json.loads(json.dumps(shown))["timeline"][-1]["x-when"].endswith("Z")
    cancelled, _ = orders.cancel(api_event("order_cancelled", document["_id"]))
    assert {name: cancelled[name] for name in SURPRISES} == SURPRISES


def test_sweeps_close_orders_that_another_release_finds_once_due_again():
    database = mongomock.MongoClient()["orderproc"]
    store = Store(database)

    def sweep(**handlers: dict[str, None]) -> list[str]:
        release = Desk(database=database, **handlers)
        release.sweep.round()
        return [message.handler for message in release.bus.sent]

    id, long_ago = place(store)["_id"], now() - timedelta(minutes=2)
    database.orders.update_one({"_id": id}, {"$set": {"due": long_ago, "touched": long_ago, "outbox": []}})
    assert sweep(email={"order_failed": None}) == [] and "due" not in store.orders.get(id)
    assert sweep(points={"order_created": None}) == []
    database.orders.update_many({"due": {"$exists": False}}, {"$set": {"due": now()}, "$inc": {"rev": 1}})
    assert sweep(points={"order_created": None}) == ["points"]
