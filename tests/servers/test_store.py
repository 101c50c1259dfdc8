"""The orders, on mongomock (no server needed) and on a real store: the same promises on both."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pymongo
import pytest

from core.base.ids import now
from core.order.events import Event
from core.order.state_machine import Step, holdings, outcome_of, step_name, unfinished_steps
from core.order.view import view
from core.store.connection import DocumentRefused, StoreUnavailable, connect, within
from core.store.consumers import EXPIRES, Lease
from core.store.group_commit import GroupCommit
from core.store.open_orders import OPEN, WAITING
from core.store.orders import KeyReused, StatusConflict
from core.store.store import Store
from tests.support.samples import (
    ADDRESS,
    LABEL,
    a_reason,
    an_attempt,
    an_order,
    answer,
    api_event,
    event_of,
    stored_order,
)
from tools.chaos.system import wait_for

HELD = [{"move": "n", "sku": "A1", "quantity": 2}]
BACK = [{"move": "m", "sku": "A1", "quantity": -2}]
SUBSCRIBERS = {
    "order_created": ["inventory"],
    "inventory_reserved": ["shipping"],
    "order_confirmed": ["email"],
    "order_failed": ["inventory", "email"],
    "order_cancelled": ["inventory", "email"],
}


@pytest.fixture
def orders(store):
    return store.orders


@pytest.fixture
def open_orders(store):
    return store.open_orders


def record(orders, event, handler, *answers, moves=(), attempt=None):
    """Record a step as the consumer does; gives (document, what became of this attempt)."""
    step, attempt = step_name(handler, event.id), attempt or an_attempt()
    document = orders.record(event, Step(step=step, attempt=attempt, moves=list(moves), ms=3), answers)
    return document, outcome_of(document, event, step, attempt)


def reserved(orders, **fields):
    """An order whose stock is held; gives (document, its inventory_reserved)."""
    created = event_of(stored_order(orders, **fields))
    document, _ = record(orders, created, "inventory", answer(created, "inventory", "inventory_reserved"), moves=HELD)
    return document, event_of(document)


def cancelled(orders, order_id):
    return orders.cancel(api_event("order_cancelled", order_id))


def fail(orders, event, handler="shipping", tries=1, wait=2.0, attempt=None):
    attempt = attempt or an_attempt()
    orders.record_failure(event, step_name(handler, event.id), attempt, a_reason(tries, "ReadTimeoutError"), wait)


# --- create


def test_an_order_and_its_first_event_are_one_document(orders, database):
    document = stored_order(orders)
    assert document == database["orders"].find_one({"_id": document["_id"]})
    assert document["outbox"] == [document["events"][0]["id"]]
    assert (document["events"][0]["type"], document["status"]) == ("order_created", "pending")


def test_every_order_without_a_key_is_a_new_one(orders):
    assert len({stored_order(orders)["_id"] for _ in range(3)}) == 3


def test_the_same_key_and_body_give_the_orders_current_state(orders):
    first = stored_order(orders, key="k1")
    cancelled(orders, first["_id"])
    order = an_order()
    again = orders.create(order, api_event("order_created", order["_id"]), "k1", "as sent")
    assert (again["_id"], again["status"]) == (first["_id"], "cancelled")


def test_the_same_key_with_another_body_is_refused(orders):
    stored_order(orders, key="k1")
    with pytest.raises(KeyReused):
        stored_order(orders, key="k1", fingerprint="something else")


def test_a_key_belongs_to_its_owner(orders):
    assert stored_order(orders, key="k1", owner="shop")["_id"] != stored_order(orders, key="k1", owner="kiosk")["_id"]


def test_forty_requests_with_one_key_at_once_make_one_order(orders, database):
    barrier = threading.Barrier(40)

    def request():
        order = an_order()
        barrier.wait(10)
        document = orders.create(order, api_event("order_created", order["_id"]), "k1", "as sent")
        return document["_id"], order["_id"]

    with ThreadPoolExecutor(40) as crowd:
        answers = [future.result(20) for future in [crowd.submit(request) for _ in range(40)]]
    assert len({made for made, _ in answers}) == 1
    assert [made == asked for made, asked in answers].count(True) == 1
    assert database["orders"].count_documents({}) == 1


def test_a_create_that_was_written_already_is_no_replay(orders):
    """The first try's answer was lost: the group commit repeats the insert, which finds itself."""
    order = an_order()
    event = api_event("order_created", order["_id"])
    first = orders.create(order, event, "k1", "as sent")
    assert orders.create(order, event, "k1", "as sent") == first and first["_id"] == order["_id"]


# --- cancel


def test_a_pending_order_can_be_cancelled(orders):
    document, by_this_call = cancelled(orders, stored_order(orders)["_id"])
    assert (document["status"], by_this_call) == ("cancelled", True)
    assert document["timeline"][-1].items() >= {"event": "order_cancelled", "by": "api"}.items()
    assert document["outbox"][-1] == document["events"][-1]["id"] and len(document["outbox"]) == 2


def test_cancelling_again_changes_nothing_and_says_so(orders):
    first, _ = cancelled(orders, stored_order(orders)["_id"])
    assert cancelled(orders, first["_id"]) == (first, False)


def test_a_cancel_that_was_written_already_is_still_this_calls(orders):
    order_id = stored_order(orders)["_id"]
    event = api_event("order_cancelled", order_id)
    first = orders.cancel(event)
    assert orders.cancel(event) == first and first[1]


@pytest.mark.parametrize("type", ["order_failed", "order_confirmed"])
def test_an_order_that_ended_otherwise_cannot_be_cancelled(orders, type):
    _, event = reserved(orders)
    before, _ = record(orders, event, "shipping", answer(event, "shipping", type, reason="x", shipment=LABEL))
    with pytest.raises(StatusConflict):
        cancelled(orders, before["_id"])
    assert orders.get(before["_id"]) == before


# --- record


def test_a_recorded_step_puts_what_follows_into_the_outbox(orders):
    created = event_of(stored_order(orders))
    follows = answer(created, "inventory", "inventory_reserved")
    document, where = record(orders, created, "inventory", follows, moves=HELD, attempt="a1")
    assert where == "done" and document["status"] == "pending"
    assert document["steps"] == [{"step": f"inventory/{created.id}", "attempt": "a1", "moves": HELD, "ms": 3}]
    assert document["outbox"] == [created.id, follows.id] and document["events"][-1] == follows.envelope()
    assert document["timeline"][-1].items() >= {"event": "inventory_reserved", "by": "inventory"}.items()


def test_a_step_that_answers_nothing_is_done_in_the_timeline(orders):
    created = event_of(stored_order(orders))
    document, where = record(orders, created, "audit")
    assert where == "done" and document["outbox"] == [created.id]
    assert document["timeline"][-1].items() >= {"done": "order_created", "by": "audit"}.items()


def test_a_confirmed_order_is_processed_and_has_its_shipment(orders):
    _, event = reserved(orders)
    document, _ = record(orders, event, "shipping", answer(event, "shipping", "order_confirmed", shipment=LABEL))
    assert (document["status"], document["shipment"]) == ("processed", LABEL)


def test_a_failed_order_has_its_reason(orders):
    created = event_of(stored_order(orders))
    failed = answer(created, "inventory", "order_failed", reason="out_of_stock", detail="kept in the event")
    document, _ = record(orders, created, "inventory", failed)
    assert (document["status"], document["failureReason"]) == ("failed", "out_of_stock")
    assert "detail" not in document and document["events"][-1]["data"]["detail"] == "kept in the event"


def test_a_record_repeated_changes_nothing(orders):
    created = event_of(stored_order(orders))
    follows = answer(created, "inventory", "inventory_reserved")
    first = record(orders, created, "inventory", follows, moves=HELD, attempt="a1")
    assert record(orders, created, "inventory", follows, moves=HELD, attempt="a1") == first


def test_the_first_of_two_attempts_at_a_step_wins(orders):
    created = event_of(stored_order(orders))
    first, _ = record(orders, created, "inventory", moves=HELD, attempt="a1")
    second, where = record(orders, created, "inventory", Event("order_failed", reason="x"), attempt="a2")
    assert where == "already" and second == first


def test_of_forty_attempts_at_once_one_is_recorded(orders):
    created = event_of(stored_order(orders))
    with ThreadPoolExecutor(40) as crowd:
        futures = [crowd.submit(record, orders, created, "inventory", moves=HELD) for _ in range(40)]
        answers = [future.result(20) for future in futures]
    assert sorted(where for _, where in answers) == ["already"] * 39 + ["done"]
    assert len(orders.get(created.subject)["steps"]) == 1


def test_two_handlers_record_the_same_event_each_for_itself(orders):
    created = event_of(stored_order(orders))
    assert [record(orders, created, handler)[1] for handler in ("inventory", "audit")] == ["done", "done"]


def test_a_step_does_not_count_once_the_status_moved_on(orders):
    created = event_of(stored_order(orders))
    before, _ = cancelled(orders, created.subject)
    document, where = record(
        orders, created, "inventory", answer(created, "inventory", "inventory_reserved"), moves=HELD
    )
    assert where == "lost" and document == before


def test_a_final_status_never_changes(orders):
    _, event = reserved(orders)
    confirmed = answer(event, "shipping", "order_confirmed", shipment=LABEL)
    record(orders, event, "shipping", confirmed)
    record(orders, event, "audit", answer(event, "audit", "order_failed", reason="late"))
    assert orders.get(event.subject)["status"] == "processed"


def test_a_fenced_attempt_never_wins_but_another_may(orders, open_orders):
    created = event_of(stored_order(orders))
    open_orders.fence([(created.subject, "a1")])
    before = orders.get(created.subject)
    assert record(orders, created, "inventory", moves=HELD, attempt="a1") == (before, "fenced")
    assert record(orders, created, "inventory", moves=HELD, attempt="a2")[1] == "done"


def test_what_an_order_holds_is_given_back_once(orders):
    document, _ = reserved(orders)
    ended = event_of(cancelled(orders, document["_id"])[0])
    assert record(orders, ended, "inventory", moves=BACK)[1] == "done"
    before = orders.get(document["_id"])
    assert record(orders, ended, "warehouse", moves=BACK) == (before, None)
    assert record(orders, ended, "warehouse")[1] == "done"


def test_the_timeline_keeps_the_newest_hundred(orders):
    created = event_of(stored_order(orders))
    for number in range(105):
        document, _ = record(orders, created, f"handler{number}")
    assert len(document["timeline"]) == 100 and document["timeline"][-1]["by"] == "handler104"
    assert len(document["steps"]) == 105


@pytest.mark.parametrize("database", ["server"], indirect=True)  # mongomock stores anything
def test_one_write_that_cannot_be_encoded_harms_no_other(orders):
    good, bad = event_of(stored_order(orders)), event_of(stored_order(orders))
    with ThreadPoolExecutor(2) as crowd:
        culprit = crowd.submit(record, orders, bad, "inventory", answer(bad, "inventory", "inventory_reserved", x={1}))
        assert record(orders, good, "inventory")[1] == "done"
        assert isinstance(culprit.exception(10), DocumentRefused)
    assert orders.get(bad.subject)["steps"] == []


# --- failures


def test_a_failed_try_shows_with_the_time_of_the_next(orders):
    document, event = reserved(orders)
    fail(orders, event, tries=2, wait=15.0)
    document = orders.get(document["_id"])
    line = document["timeline"][-1]
    assert (
        line.items()
        >= {"failed": "inventory_reserved", "by": "shipping", "try": 2, "error": "ReadTimeoutError"}.items()
    )
    assert line["next"] == document["touched"] == line["at"] + timedelta(seconds=15)
    assert document["parked"] == [] and document["due"] > document["touched"]


def test_a_step_that_was_parked_shows_until_it_is_done(orders):
    document, event = reserved(orders)
    fail(orders, event, tries=4, wait=None)
    document = orders.get(document["_id"])
    assert view(document)["parked"] == ["shipping"]
    assert document["timeline"][-1].items() >= {"parked": "inventory_reserved", "by": "shipping", "try": 4}.items()
    assert document["timeline"][-1].get("next") is None
    document, _ = record(orders, event, "shipping")
    assert document["parked"] == [] and "parked" not in view(document)


def test_a_step_that_is_tried_again_is_no_longer_parked(orders):
    document, event = reserved(orders)
    fail(orders, event, tries=4, wait=None)
    fail(orders, event, tries=1, wait=2.0)
    assert orders.get(document["_id"])["parked"] == []


def test_what_one_handler_does_leaves_what_another_parked(orders):
    _, event = reserved(orders)
    fail(orders, event, wait=None)
    assert record(orders, event, "audit")[0]["parked"] == [step_name("shipping", event.id)]


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_new_status_forgets_what_was_parked_under_the_old(orders, how):
    document, event = reserved(orders)
    fail(orders, event, wait=None)
    if how == "cancelled":
        cancelled(orders, document["_id"])
    else:
        record(orders, event, "fraud", answer(event, "fraud", "order_failed", reason="fraud"))
    assert orders.get(document["_id"])["parked"] == []


def test_a_failure_written_twice_is_one_line(orders):
    document, event = reserved(orders)
    for _ in range(2):
        fail(orders, event, attempt="a1")
    assert [line.get("failed") for line in orders.get(document["_id"])["timeline"]].count("inventory_reserved") == 1


@pytest.mark.parametrize("wait", [2.0, None])
def test_failures_of_done_or_outdated_steps_do_not_count(orders, wait):
    document, event = reserved(orders)
    record(orders, event, "shipping")
    fail(orders, event, "shipping", wait=wait)
    cancelled(orders, document["_id"])
    before = orders.get(document["_id"])
    fail(orders, event, "audit", wait=wait)
    assert orders.get(document["_id"]) == before
    assert all("failed" not in line and "parked" not in line for line in before["timeline"])


# --- the outbox


def test_a_cleared_event_leaves_the_outbox_and_stays_an_event(orders):
    document, event = reserved(orders)
    orders.clear(document["_id"], event.id)
    wait_for(lambda: orders.get(document["_id"])["outbox"] == document["outbox"][:1], 5)
    assert len(orders.get(document["_id"])["events"]) == 2


def test_the_outbox_size_covers_all_orders_and_tells_the_oldest(orders, open_orders):
    assert open_orders.outbox_size(10) == (0, None)
    first, _ = reserved(orders)
    second = stored_order(orders)
    assert open_orders.outbox_size(10) == (3, min(first["outboxSince"], second["outboxSince"]))
    assert open_orders.outbox_size(1)[0] in (1, 2)
    for document in (first, second):
        for event_id in document["outbox"]:
            orders.clear(document["_id"], event_id)
    wait_for(lambda: open_orders.outbox_size(10) == (0, None), 5)


# --- what is unfinished and held


def test_an_order_has_an_unfinished_step_per_subscriber_until_recorded(orders):
    document = stored_order(orders)
    created = event_of(document)
    assert unfinished_steps(document, SUBSCRIBERS) == [("inventory", document["events"][0])]
    document, _ = record(orders, created, "inventory", answer(created, "inventory", "inventory_reserved"))
    assert unfinished_steps(document, SUBSCRIBERS) == [("shipping", document["events"][1])]
    document, _ = cancelled(orders, document["_id"])
    assert unfinished_steps(document, SUBSCRIBERS) == [
        ("inventory", document["events"][2]),
        ("email", document["events"][2]),
    ]
    for handler in ("inventory", "email"):
        document, _ = record(orders, event_of(document), handler)
    assert unfinished_steps(document, SUBSCRIBERS) == []


def test_a_parked_step_is_not_among_the_unfinished_steps(orders):
    document, event = reserved(orders)
    fail(orders, event, wait=None)
    assert unfinished_steps(orders.get(document["_id"]), SUBSCRIBERS) == []


def test_an_event_without_subscribers_makes_no_unfinished_step(orders):
    assert unfinished_steps(stored_order(orders), {}) == []


def test_an_order_holds_its_recorded_takes_minus_recorded_give_backs(orders):
    document, event = reserved(orders)
    assert holdings(document) == {"A1": 2}
    document, _ = record(orders, event, "gifts", moves=[{"move": "g", "sku": "B2", "quantity": 1}, *HELD])
    assert holdings(document) == {"A1": 4, "B2": 1}
    document, _ = record(orders, event_of(cancelled(orders, document["_id"])[0]), "inventory", moves=BACK + BACK)
    assert holdings(document) == {"B2": 1}


# --- the sweep's writes


def open_ids(open_orders):
    return {document["_id"] for document in open_orders.due(100, now() + timedelta(days=1))}


def test_a_new_order_is_due_after_ten_seconds_untouched(orders, open_orders):
    document = stored_order(orders)
    assert open_orders.due(10, document["touched"] + timedelta(seconds=9.9)) == []
    assert open_orders.due(10, document["touched"] + timedelta(seconds=10)) == [document]


def test_the_orders_due_longest_come_first_up_to_the_limit(orders, open_orders, database):
    documents = [stored_order(orders) for _ in range(5)]
    for age, document in enumerate(documents):
        database["orders"].update_one({"_id": document["_id"]}, {"$set": {"due": now() - timedelta(hours=age)}})
    assert [found["_id"] for found in open_orders.due(3, now())] == [documents[n]["_id"] for n in (4, 3, 2)]


def test_an_order_unchanged_since_it_was_read_is_closed(orders, open_orders):
    document = stored_order(orders)
    open_orders.write([open_orders.look_again(document, None)])
    assert open_ids(open_orders) == set()


@pytest.mark.parametrize("happened", ["recorded", "cancelled", "failed", "parked"])
def test_an_order_changed_since_it_was_read_is_not_closed(orders, open_orders, happened):
    document, event = reserved(orders)
    if happened == "recorded":
        record(orders, event, "shipping")
    elif happened == "cancelled":
        cancelled(orders, document["_id"])
    else:
        fail(orders, event, wait=None if happened == "parked" else 2.0)
    open_orders.write([open_orders.look_again(document, due, 7) for due in (None, now() + timedelta(days=2))])
    assert open_ids(open_orders) == {document["_id"]} and orders.get(document["_id"])["sweeps"] == 0


def test_a_closed_order_opens_when_something_happens_to_it(orders, open_orders):
    document = stored_order(orders)
    open_orders.write([open_orders.look_again(document, None)])
    cancelled(orders, document["_id"])
    assert open_ids(open_orders) == {document["_id"]}


def test_an_order_to_be_looked_at_again_is_due_then(orders, open_orders):
    document, moment = stored_order(orders), now() + timedelta(minutes=2)
    open_orders.write([open_orders.look_again(document, moment, 3)])
    document = orders.get(document["_id"])
    assert (document["due"], document["sweeps"]) == (moment, 3)


def test_fencing_wins_over_an_attempt_that_is_not_recorded(orders, open_orders):
    document = stored_order(orders)
    assert open_orders.fence([(document["_id"], "a1")])[0]["fenced"] == ["a1"]
    assert open_orders.fence([(document["_id"], "a1")])[0]["fenced"] == ["a1"]


def test_fencing_loses_to_an_attempt_that_is_recorded(orders, open_orders):
    created = event_of(stored_order(orders))
    document, _ = record(orders, created, "inventory", attempt="a1")
    assert open_orders.fence([(created.subject, "a1")]) == [document] and document["fenced"] == []


def test_fencing_an_attempt_of_a_missing_order_does_nothing(orders, open_orders):
    assert open_orders.fence([("0193", "a1")]) == [{}]


def test_waking_makes_open_orders_due_and_forgets_parked_steps(orders, open_orders):
    document, event = reserved(orders)
    fail(orders, event, wait=None)
    document, shut = orders.get(document["_id"]), stored_order(orders)
    open_orders.write([open_orders.look_again(shut, None)])
    moment = now() + timedelta(seconds=1)
    assert [open_orders.wake(10, moment) for _ in range(2)] == [1, 0]
    assert [found["_id"] for found in open_orders.due(10, moment)] == [document["_id"]]
    woken = orders.get(document["_id"])
    assert (woken["parked"], woken["sweeps"]) == ([], 0) and woken["touched"] < now() - timedelta(minutes=59)
    assert woken["rev"] == document["rev"] + 1


def test_what_is_due_only_by_a_wrong_clock_is_due(orders, open_orders, database):
    document = stored_order(orders)
    for minutes, found in ((30, []), (32, [document["_id"]])):
        later = now() + timedelta(minutes=minutes)
        database["orders"].update_one({"_id": document["_id"]}, {"$set": {"due": later}})
        assert [order["_id"] for order in open_orders.due(10, now())] == found


def test_an_update_by_a_clock_gone_back_keeps_the_time(orders, database):
    document, later = stored_order(orders), now() + timedelta(hours=1)
    database["orders"].update_one({"_id": document["_id"]}, {"$set": {"updatedAt": later}})
    assert cancelled(orders, document["_id"])[0]["updatedAt"] == later


# --- the lease of the sweep (all of it: tests/fast/test_lease.py)


@pytest.fixture
def hour_hand(monkeypatch):
    """A monotonic clock that goes on by hand, in place of the lease's."""
    hand = SimpleNamespace(now=1000.0, monotonic=lambda: hand.now)
    monkeypatch.setattr("core.store.consumers.time", hand)
    return hand


def test_a_lease_is_held_by_one_and_taken_over(store, hour_hand, database):
    one, other = store.lease, Store(database).lease
    assert [one.beat(), other.beat(), one.beat(), other.beat()] == [1, 0, 1, 0]
    hour_hand.now += EXPIRES + 0.1  # and nobody raised the beat
    assert [other.beat(), one.beat()] == [2, 0]
    one.free()
    assert other.beat() == 2
    other.free()
    hour_hand.now += 0.1
    assert [one.beat(), one.beat()] == [0, 3]
    assert database["leases"].count_documents({}) == 1


def test_a_new_lease_goes_to_one_of_sixteen(store, database):
    crowd, barrier = [Lease(GroupCommit(database["leases"])) for _ in range(16)], threading.Barrier(16)

    def beat(lease):
        barrier.wait(10)
        return lease.beat()

    with ThreadPoolExecutor(16) as pool:
        assert sorted(pool.map(beat, crowd)) == [0] * 15 + [1]


# --- what the engine must do, and the outbox rests on


def test_clearing_the_last_event_forgets_since_when_it_waited(orders):
    document, event = reserved(orders)
    assert document["outboxSince"] == document["createdAt"]
    orders.clear(document["_id"], event.id)
    wait_for(lambda: len(orders.get(document["_id"])["outbox"]) == 1, 5)
    assert orders.get(document["_id"])["outboxSince"] == document["createdAt"], "an older one still waits"
    orders.clear(document["_id"], document["outbox"][0])
    wait_for(lambda: "outboxSince" not in orders.get(document["_id"]), 5)
    assert orders.get(document["_id"])["outbox"] == []


def test_a_new_event_in_an_empty_outbox_waits_since_then(orders):
    document = stored_order(orders)
    orders.clear(document["_id"], document["outbox"][0])
    wait_for(lambda: "outboxSince" not in orders.get(document["_id"]) and now() > document["createdAt"], 5)
    after, _ = cancelled(orders, document["_id"])
    assert after["outboxSince"] == after["updatedAt"] > document["createdAt"]


def test_an_event_that_is_not_in_the_outbox_clears_nothing(orders):
    document, event = reserved(orders)
    orders.clear(document["_id"], "another")
    orders.clear(document["_id"], event.id)
    wait_for(lambda: orders.get(document["_id"])["outbox"] == document["outbox"][:1], 5)


def test_both_past_and_far_future_come_in_one_order(orders, open_orders, database):
    hours = {stored_order(orders)["_id"]: hour for hour in (3, -2, 0.1, -1)}
    for id, hour in hours.items():
        database["orders"].update_one({"_id": id}, {"$set": {"due": now() + timedelta(hours=hour)}})
    assert [hours[order["_id"]] for order in open_orders.due(9, now())] == [-2, -1, 3]
    assert [hours[order["_id"]] for order in open_orders.due(2, now())] == [-2, -1]


def test_a_wrong_clocks_order_is_found_behind_many(orders, open_orders, database):
    hours = {stored_order(orders)["_id"]: hour for hour in (0.1, 0.2, 0.3, 5)}
    for id, hour in hours.items():
        database["orders"].update_one({"_id": id}, {"$set": {"due": now() + timedelta(hours=hour)}})
    assert [hours[order["_id"]] for order in open_orders.due(2, now())] == [5]


@pytest.mark.parametrize("due", ["soon", 0, None, {}, []], ids=repr)
def test_what_is_due_at_no_time_is_passed_over(orders, open_orders, database, due):
    odd, good = stored_order(orders), stored_order(orders)
    database["orders"].update_one({"_id": odd["_id"]}, {"$set": {"due": due}})
    assert [order["_id"] for order in open_orders.due(9, now() + timedelta(minutes=1))] == [good["_id"]]


def test_a_malformed_order_can_be_looked_at_again(open_orders, database):
    database["orders"].insert_one({"_id": "odd", "requestKey": "odd", "due": now(), "outboxSince": now()})
    [order] = open_orders.due(9, now())
    later = now() + timedelta(minutes=30)
    open_orders.write([open_orders.look_again(order, later)])
    assert database["orders"].find_one({"_id": "odd"})["due"] == later
    assert open_orders.outbox_size(9) == (0, None)


# --- listing


def test_pages_come_newest_first_and_begin_behind_a_cursor(orders):
    ids = sorted((stored_order(orders)["_id"] for _ in range(7)), reverse=True)
    pages = [orders.page({}, after, 3) for after in (None, ids[2], ids[5], ids[6])]
    assert [[document["_id"] for document in page] for page in pages] == [ids[:3], ids[3:6], ids[6:], []]


def test_a_page_holds_only_what_matches(orders):
    mine, theirs = stored_order(orders, owner="shop"), stored_order(orders, owner="kiosk", customerId="bob")
    cancelled(orders, mine["_id"])
    assert [d["_id"] for d in orders.page({"owner": "kiosk"}, None, 5)] == [theirs["_id"]]
    assert [d["_id"] for d in orders.page({"customerId": "bob", "status": "pending"}, None, 5)] == [theirs["_id"]]
    assert [d["_id"] for d in orders.page({"status": "cancelled"}, None, 5)] == [mine["_id"]]


# --- what is shown

ALWAYS = {"id", "status", "customerId", "currency", "items", "total", "createdAt", "updatedAt"}


def test_an_order_shows_its_fields_and_nothing_of_the_inside(orders):
    document = stored_order(orders, key="k1")
    assert set(view(document)) == ALWAYS | {"email", "timeline", "outbox"}
    assert set(view(document, progress=False)) == ALWAYS | {"email"}


def test_an_order_with_everything_shows_everything(orders):
    document, event = reserved(orders, shippingAddress=ADDRESS)
    document, _ = record(orders, event, "shipping", answer(event, "shipping", "order_confirmed", shipment=LABEL))
    fail(orders, event_of(document), "email", wait=None)
    shown = view(orders.get(document["_id"]))
    assert set(shown) == ALWAYS | {"email", "shippingAddress", "shipment", "parked", "outbox", "timeline"}
    assert (shown["status"], shown["parked"], shown["shipment"]) == ("processed", ["email"], LABEL)


def test_a_failed_order_shows_why(orders):
    created = event_of(stored_order(orders))
    document, _ = record(
        orders, created, "inventory", answer(created, "inventory", "order_failed", reason="unknown_sku")
    )
    assert view(document)["failureReason"] == "unknown_sku"


def test_the_timeline_shows_what_the_design_says(orders):
    document, event = reserved(orders)
    fail(orders, event, tries=1, wait=2.0)
    fail(orders, event, tries=2, wait=None)
    document, _ = record(orders, event, "shipping", answer(event, "shipping", "order_confirmed", shipment=LABEL))
    document, _ = record(orders, event_of(document), "email")
    assert [set(line) for line in view(document)["timeline"]] == [
        {"at", "event", "id", "by"},
        {"at", "event", "id", "by", "of", "ms"},
        {"at", "failed", "by", "try", "error", "where", "next"},
        {"at", "parked", "by", "try", "error", "where"},
        {"at", "event", "id", "by", "of", "ms"},
        {"at", "done", "by", "ms"},
    ]


def test_times_are_shown_in_utc_with_milliseconds_and_money_exactly(orders):
    document = stored_order(orders, quantity=3)
    shown = view(document)
    assert (
        shown["createdAt"]
        == shown["timeline"][0]["at"]
        == document["createdAt"].isoformat(timespec="milliseconds") + "Z"
    )
    assert (shown["total"], shown["items"]) == (59.97, [{"sku": "A1", "quantity": 3, "price": 19.99}])


def test_an_update_shows_in_updated_at(orders):
    document = stored_order(orders)
    wait_for(lambda: now() > document["updatedAt"], 1)
    assert cancelled(orders, document["_id"])[0]["updatedAt"] > document["updatedAt"]


# --- a store that does not answer


def test_an_order_that_is_not_there_is_none(store):
    assert store.orders.get("0193") is None and store.ping()


def test_a_store_that_is_away_is_store_unavailable_everywhere():
    with pymongo.MongoClient("mongodb://127.0.0.1:9", serverSelectionTimeoutMS=50) as client:
        store, order = Store(client["orderproc"]), an_order()
        for call in (
            lambda: store.open_orders.due(1, now()),
            lambda: store.open_orders.outbox_size(1),
            store.lease.beat,
            lambda: store.orders.create(order, api_event("order_created", order["_id"]), None, "as sent"),
            lambda: store.orders.page({}, None, 1),
        ):
            with pytest.raises(StoreUnavailable), within(0.3):
                call()
        assert not store.ping()


@pytest.mark.parametrize(
    ("query", "index"),
    [
        ({"owner": "shop", "status": "pending"}, "owner_1_status_1__id_-1"),
        ({"owner": "shop", "customerId": "ada"}, "owner_1_customerId_1__id_-1"),
        (OPEN, "due_sparse"),
        (WAITING, "outboxSince_1"),
    ],
)
def test_what_is_asked_often_is_found_by_an_index(store_server, query, index):
    database = connect(store_server.url("explained"))
    store = Store(database)
    stored_order(store.orders)
    wait_for(
        lambda: "owner_1_customerId_1__id_-1" in database["orders"].index_information(), 10, "all indexes are made"
    )
    plan = database.command("explain", {"find": "orders", "filter": query, "limit": 21}, verbosity="queryPlanner")
    assert re.findall("'indexName': '([^']+)'", str(plan["queryPlanner"]["winningPlan"])) == [index]
    database.client.drop_database(database.name)
