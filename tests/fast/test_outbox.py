"""From the outbox to the bus: what is sent, and that only a confirmed event leaves."""

import json
import threading

import mongomock
import pytest
from prometheus_client import REGISTRY

from core.batcher import Busy
from core.events import Event, created_by_api, follow_up, parse
from core.outbox import Outbox
from core.store import Orders, step_name
from tests.support.buses import FakeBus
from tests.support.samples import event_of, place
from tools.chaos.system import wait_for


@pytest.fixture
def orders():
    return Orders(mongomock.MongoClient()["orderproc"])


@pytest.fixture
def bus():
    return FakeBus()


@pytest.fixture
def document(orders):
    return place(orders)


def left(orders, document) -> list[str]:
    return orders.get(document["_id"])["outbox"]


def counted(type: str, outcome: str) -> float:
    return REGISTRY.get_sample_value("orderproc_events_total", {"type": type, "outcome": outcome}) or 0


def test_a_sent_event_has_id_type_and_order_without_timeline(orders, bus, document):
    Outbox(orders, bus).announce(document)
    [message] = bus.sent
    assert (message.id, message.type, message.queue) == (document["events"][0]["id"], "order_created", "")
    event = parse(message.body)
    assert (event.id, event.subject, event.orderstatus) == (message.id, document["_id"], "pending")
    assert event.order["total"] == 39.98 and event.order["status"] == "pending"
    assert "timeline" not in event.order and "outbox" not in event.order


def test_a_confirmed_event_leaves_the_outbox_but_not_the_order(orders, bus, document):
    Outbox(orders, bus).announce(document)
    wait_for(lambda: left(orders, document) == [])
    assert [event["id"] for event in orders.get(document["_id"])["events"]] == document["outbox"]


@pytest.mark.parametrize("outcome", ["returned", "nacked", "refused", "dropped"])
def test_an_unconfirmed_event_stays_in_the_outbox_and_is_logged(orders, bus, document, outcome, caplog):
    bus.outcome = outcome
    Outbox(orders, bus).announce(document)
    orders.ping()  # whatever was to be cleared is cleared now
    assert left(orders, document) == document["outbox"]
    assert "it waits in its outbox" in caplog.text
    bus.outcome = "confirmed"
    Outbox(orders, bus).announce(document)
    wait_for(lambda: left(orders, document) == [])


def test_only_the_named_events_that_still_wait_are_sent(orders, bus, document):
    created = event_of(document)
    cancelled = created_by_api("order_cancelled", document["_id"], created.traceparent)
    both = orders.cancel(document["_id"], cancelled)[0]
    Outbox(orders, bus).announce(both, [])
    Outbox(orders, bus).announce({**both, "outbox": [created.id]}, [cancelled])
    assert bus.sent == []
    Outbox(orders, bus).announce(both, [cancelled])
    assert [message.id for message in bus.sent] == [cancelled.id]


def test_nothing_leaves_before_the_bus_says_so(orders, bus, document):
    bus.outcome = None
    Outbox(orders, bus).announce(document)
    orders.ping()
    assert left(orders, document) == document["outbox"]
    bus.report("confirmed")
    wait_for(lambda: left(orders, document) == [])


def test_an_event_that_left_the_outbox_is_not_sent_again(orders, bus, document):
    Outbox(orders, bus).announce({**document, "outbox": []})
    assert bus.sent == []


def test_two_events_are_sent_in_order_and_cleared_separately(orders, bus, document):
    created = event_of(document)
    answers = [follow_up(created, "inventory", 0, Event("inventory_reserved"), "pending")]
    document = orders.record(created, step_name("inventory", created.id), "attempt", answers, [])
    bus.outcome = None
    Outbox(orders, bus).announce(document)
    assert [message.type for message in bus.sent] == ["order_created", "inventory_reserved"]
    bus.report("confirmed", 1)
    wait_for(lambda: left(orders, document) == [created.id])


def test_the_order_inside_is_as_new_as_the_event(orders, bus, document):
    created = event_of(document)
    failed = follow_up(created, "inventory", 0, Event("order_failed", reason="out_of_stock"), "failed")
    document = orders.record(created, step_name("inventory", created.id), "attempt", [failed], [])
    Outbox(orders, bus).announce(document)
    body = json.loads(bus.sent[-1].body)
    assert body["data"]["reason"] == body["data"]["order"]["failureReason"] == "out_of_stock"
    assert body["data"]["order"]["status"] == body["orderstatus"] == "failed"


@pytest.mark.parametrize(
    ("taken", "mandatory"), [(None, True), ({"order_created"}, True), ({"order_failed"}, False), (set(), False)]
)
def test_only_an_event_that_no_handler_takes_may_go_nowhere(orders, bus, document, taken, mandatory):
    Outbox(orders, bus, taken).announce(document)
    assert [message.mandatory for message in bus.sent] == [mandatory]


def test_an_event_without_subscribers_leaves_the_outbox_once_confirmed(orders, bus, document):
    Outbox(orders, bus, taken=set()).announce(document)
    wait_for(lambda: left(orders, document) == [])


def test_a_resend_to_one_queue_is_mandatory_and_clears_nothing(orders, bus, document):
    Outbox(orders, bus, taken=set()).send(document, document["events"][0], "orders.email")
    [message] = bus.sent
    assert message.queue == "orders.email" and message.mandatory
    orders.ping()
    assert left(orders, document) == document["outbox"]


def test_a_store_that_has_no_time_to_clear_troubles_nobody(orders, bus, document, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr("core.batcher.apply", lambda collection, writes: go_on.wait(10) and {})
    for _ in range(3000):  # more than a batcher lets wait
        orders.clear("no order", "no event")
    with pytest.raises(Busy):
        orders.get("no order")
    Outbox(orders, bus).announce(document)
    assert len(bus.sent) == 1
    go_on.set()


def test_what_is_published_confirmed_and_unroutable_is_counted(orders, bus, document):
    before = [counted("order_created", outcome) for outcome in ("published", "confirmed", "returned")]
    Outbox(orders, bus).announce(document)
    bus.outcome = "returned"
    Outbox(orders, bus).announce(document)
    bus.outcome = "dropped"
    Outbox(orders, bus).announce(document)
    after = [counted("order_created", outcome) for outcome in ("published", "confirmed", "returned")]
    assert [now - then for now, then in zip(after, before, strict=True)] == [3, 1, 1]


@pytest.mark.parametrize(("taken", "rebuilt"), [(None, 0), ({"order_created"}, 1)])
def test_on_an_unroutable_event_whoever_declares_queues_redeclares_them(orders, document, taken, rebuilt):
    bus = FakeBus("returned")
    Outbox(orders, bus, taken).announce(document)
    assert bus.rebuilt == rebuilt
