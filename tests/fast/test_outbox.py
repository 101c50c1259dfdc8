"""From the outbox to the bus: what is sent, and that only a confirmed event leaves."""

import gc
import json
import threading
import weakref

import mongomock
import pytest
from prometheus_client import REGISTRY

from core.flow.outbox import Outbox
from core.order.answers import follow_up
from core.order.events import Event, parse
from core.store.connection import StoreBusy
from core.store.group_commit import LARGEST_QUEUE
from core.store.store import Store
from tests.support.buses import FakeBus
from tests.support.samples import a_step, api_event, event_of, place, stored_order
from tools.chaos.system import wait_for


@pytest.fixture
def store():
    return Store(mongomock.MongoClient()["orderproc"])


@pytest.fixture
def orders(store):
    return store.orders


@pytest.fixture
def bus():
    return FakeBus()


@pytest.fixture
def document(store):
    return place(store)


def left(orders, document) -> list[str]:
    """What is in the outbox, read after whatever was to be cleared is cleared."""
    return orders.get(document["_id"])["outbox"]


def counted(type: str, outcome: str) -> float:
    return REGISTRY.get_sample_value("orderproc_events_total", {"type": type, "outcome": outcome}) or 0


def test_a_sent_event_has_id_type_and_order_without_timeline(store, bus, document):
    Outbox(store, bus).publish_pending(document)
    [message] = bus.sent
    assert (message.id, message.type, message.handler) == (document["events"][0]["id"], "order_created", "")
    event = parse(message.body)
    assert (event.id, event.subject, event.orderstatus) == (message.id, document["_id"], "pending")
    assert event.order["total"] == 39.98 and event.order["status"] == "pending"
    assert "timeline" not in event.order and "outbox" not in event.order


def test_a_confirmed_event_leaves_the_outbox_but_not_the_order(store, orders, bus, document):
    Outbox(store, bus).publish_pending(document)
    wait_for(lambda: left(orders, document) == [])
    assert [event["id"] for event in orders.get(document["_id"])["events"]] == document["outbox"]


@pytest.mark.parametrize("outcome", ["unroutable", "unsent"])
def test_an_unconfirmed_event_stays_in_the_outbox_and_is_logged(store, orders, bus, document, outcome, caplog):
    bus.outcome = outcome
    Outbox(store, bus).publish_pending(document)
    assert left(orders, document) == document["outbox"]
    assert "it waits in its outbox" in caplog.text
    bus.outcome = "confirmed"
    Outbox(store, bus).publish_pending(document)
    wait_for(lambda: left(orders, document) == [])


def test_only_the_named_events_that_still_wait_are_sent(store, orders, bus, document):
    created = event_of(document)
    cancelled = api_event("order_cancelled", document["_id"], created.traceparent)
    both, _ = orders.cancel(cancelled)
    Outbox(store, bus).publish_pending(both, [])
    Outbox(store, bus).publish_pending({**both, "outbox": [created.id]}, [cancelled])
    assert bus.sent == []
    Outbox(store, bus).publish_pending(both, [cancelled])
    assert [message.id for message in bus.sent] == [cancelled.id]


def test_nothing_leaves_before_the_bus_says_so(store, orders, bus, document):
    bus.outcome = None
    Outbox(store, bus).publish_pending(document)
    assert left(orders, document) == document["outbox"]
    bus.report("confirmed")
    wait_for(lambda: left(orders, document) == [])


def test_an_event_that_left_the_outbox_is_not_sent_again(store, bus, document):
    Outbox(store, bus).publish_pending({**document, "outbox": []})
    assert bus.sent == []


def test_two_events_are_sent_in_order_and_cleared_separately(store, orders, bus, document):
    created = event_of(document)
    answers = [follow_up(created, "inventory", 0, Event("inventory_reserved"), "pending")]
    document = orders.record(created, a_step("inventory", created), answers)
    bus.outcome = None
    Outbox(store, bus).publish_pending(document)
    assert [message.type for message in bus.sent] == ["order_created", "inventory_reserved"]
    bus.report("confirmed", 1)
    wait_for(lambda: left(orders, document) == [created.id])


def test_the_order_inside_is_as_new_as_the_event(store, orders, bus, document):
    created = event_of(document)
    failed = follow_up(created, "inventory", 0, Event("order_failed", reason="out_of_stock"), "failed")
    document = orders.record(created, a_step("inventory", created), [failed])
    Outbox(store, bus).publish_pending(document)
    body = json.loads(bus.sent[-1].body)
    assert body["data"]["reason"] == body["data"]["order"]["failureReason"] == "out_of_stock"
    assert body["data"]["order"]["status"] == body["orderstatus"] == "failed"


@pytest.mark.parametrize(
    ("subscribed", "mandatory"), [(None, True), ({"order_created"}, True), ({"order_failed"}, False), (set(), False)]
)
def test_only_an_event_without_subscribers_may_go_nowhere(store, bus, document, subscribed, mandatory):
    Outbox(store, bus, subscribed).publish_pending(document)
    assert [message.mandatory for message in bus.sent] == [mandatory]


def test_an_event_without_subscribers_leaves_the_outbox_once_confirmed(store, orders, bus, document):
    Outbox(store, bus, subscribed=set()).publish_pending(document)
    wait_for(lambda: left(orders, document) == [])


def test_a_resend_to_one_handler_is_mandatory_and_clears_nothing(store, orders, bus, document):
    Outbox(store, bus, subscribed=set()).publish_one(document, document["events"][0], "email")
    [message] = bus.sent
    assert message.handler == "email" and message.mandatory
    assert left(orders, document) == document["outbox"]


def test_a_store_that_has_no_time_to_clear_troubles_nobody(store, orders, bus, document, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr("core.store.group_commit.bulk_write", lambda collection, writes: go_on.wait(10) and {})
    for _ in range(LARGEST_QUEUE + 1000):
        orders.clear("no order", "no event")
    with pytest.raises(StoreBusy):
        orders.get("no order")
    Outbox(store, bus).publish_pending(document)
    assert len(bus.sent) == 1
    go_on.set()


def test_what_is_published_confirmed_and_unroutable_is_counted(store, bus, document):
    before = [counted("order_created", outcome) for outcome in ("published", "confirmed", "unroutable")]
    Outbox(store, bus).publish_pending(document)
    bus.outcome = "unroutable"
    Outbox(store, bus).publish_pending(document)
    bus.outcome = "unsent"
    Outbox(store, bus).publish_pending(document)
    after = [counted("order_created", outcome) for outcome in ("published", "confirmed", "unroutable")]
    assert [now - then for now, then in zip(after, before, strict=True)] == [3, 1, 1]


@pytest.mark.parametrize(("subscribed", "rebuilt"), [(None, 0), ({"order_created"}, 1)])
def test_on_an_unroutable_event_whoever_declares_queues_redeclares_them(store, document, subscribed, rebuilt):
    bus = FakeBus("unroutable")
    Outbox(store, bus, subscribed).publish_pending(document)
    assert bus.rebuilt == rebuilt


class Document(dict):
    """One that can be watched."""


def test_what_waits_for_its_confirm_holds_no_order():
    store, bus = Store(mongomock.MongoClient()["orderproc"]), FakeBus(outcome=None)
    order = Document(stored_order(store.orders))
    watched = weakref.ref(order)
    Outbox(store, bus).publish_pending(order)
    del order
    gc.collect()
    assert watched() is None and len(bus.sent) == 1
    bus.report("confirmed")
    wait_for(lambda: store.orders.get(json.loads(bus.sent[0].body)["subject"])["outbox"] == [], 5)
