"""The state machine, without a store: what each decision needs, and what it makes of an order."""

from datetime import datetime, timedelta

import pytest

from core.order import state_machine
from core.order.schemas import event_schemas
from core.order.state_machine import STATUSES, TRANSITIONS, Step, holdings, outcome_of, unfinished_steps
from tests.fakes import event
from tests.support.samples import LABEL, a_reason, an_order, answer, api_event

AT = datetime(2026, 1, 31, 9, 30)


def new_order(**changes):
    """A document as `record` and `cancel` find it, with fields changed."""
    order = an_order()
    return state_machine.new_order(order, api_event("order_created", order["_id"]), AT) | changes


def recorded(step: str, attempt: str = "a1", **moves: int) -> Step:
    """A recorded step that moved {sku: units}."""
    made = [{"move": f"{attempt}.0", "sku": sku, "quantity": units} for sku, units in moves.items()]
    return Step(step=step, attempt=attempt, moves=made, ms=3)


# --- transitions


def test_every_event_type_that_sets_a_status_has_a_schema():
    assert set(TRANSITIONS) < set(event_schemas())


@pytest.mark.parametrize("type", TRANSITIONS)
def test_an_events_schema_asks_for_the_status_it_leaves(type):
    assert event_schemas()[type].schema["properties"]["orderstatus"]["const"] == TRANSITIONS[type].leaves


def test_orders_begin_pending_and_end_in_three_ways():
    assert STATUSES == ["pending", "processed", "failed", "cancelled"]
    needed = {row.needs for row in TRANSITIONS.values()}
    assert [status for status in STATUSES if status not in needed] == ["processed", "failed", "cancelled"]


# --- decisions


def test_a_new_order_has_its_event_in_the_outbox():
    order = an_order()
    created = api_event("order_created", order["_id"])
    document = state_machine.new_order(order, created, AT)
    assert order.items() <= document.items() and document["status"] == "pending"
    assert (document["events"], document["outbox"]) == ([created.envelope()], [created.id])
    assert document["timeline"] == [{"at": AT, "event": "order_created", "id": created.id, "by": "api"}]
    assert document["steps"] == document["fenced"] == document["parked"] == []


def test_a_cancel_needs_a_pending_order():
    change = state_machine.cancel(api_event("order_cancelled", "o1", id="e2"), AT)
    assert (change.order_id, change.status, change.step, change.record) == ("o1", "pending", "", None)
    assert change.fields == {"status": "cancelled", "parked": []}
    assert change.lines == [{"event": "order_cancelled", "id": "e2", "by": "api"}]


def test_a_step_is_recorded_on_the_status_its_event_left():
    parent, step = event("inventory_reserved"), recorded("shipping/e1")
    change = state_machine.record(parent, step, [], AT)
    assert (change.order_id, change.status, change.step, change.record) == (
        parent.subject,
        "pending",
        "shipping/e1",
        step,
    )
    assert (change.fields, change.lines) == ({}, [{"done": "inventory_reserved", "by": "shipping", "ms": 3}])


@pytest.mark.parametrize(
    ("type", "data", "fields"),
    [
        ("order_confirmed", {"shipment": LABEL}, {"status": "processed", "shipment": LABEL, "parked": []}),
        ("order_failed", {"reason": "x"}, {"status": "failed", "failureReason": "x", "parked": []}),
        ("inventory_reserved", {}, {}),
    ],
)
def test_an_answer_sets_the_status_and_copies_its_data(type, data, fields):
    parent = event("order_created")
    follows = answer(parent, "any", type, **data)
    change = state_machine.record(parent, recorded("any/e1"), [follows], AT)
    assert (change.fields, list(change.events)) == (fields, [follows])
    assert change.lines == [{"event": type, "id": follows.id, "by": "any", "of": "order_created", "ms": 3}]


@pytest.mark.parametrize(("moves", "returns"), [({}, False), ({"A1": 2}, False), ({"A1": 2, "B2": -1}, True)])
def test_a_step_that_gives_units_back_returns_stock(moves, returns):
    change = state_machine.record(event("order_cancelled"), recorded("inventory/e1", **moves), [], AT)
    assert change.returns_stock == returns


def test_a_failed_try_says_when_the_next_one_is():
    change = state_machine.fail(event("order_created"), "email/e1", "a1", a_reason(2, "KeyError"), 15.0, AT)
    line = {"failed": "order_created", "by": "email", **a_reason(2, "KeyError"), "attempt": "a1"}
    assert change.lines == [line | {"next": AT + timedelta(seconds=15)}]
    assert (change.next_try, change.park, change.record) == (AT + timedelta(seconds=15), False, None)
    assert (change.status, change.step, change.failed_attempt, change.fields) == ("pending", "email/e1", "a1", {})


def test_the_last_failed_try_parks_the_step():
    change = state_machine.fail(event("order_created"), "email/e1", "a1", a_reason(4, "KeyError"), None, AT)
    line = {"parked": "order_created", "by": "email", **a_reason(4, "KeyError"), "attempt": "a1", "next": None}
    assert change.lines == [line]
    assert (change.next_try, change.park) == (None, True)


# --- what an order says


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, None),
        ({"steps": [recorded("email/e1", "a1")]}, "done"),
        ({"steps": [recorded("email/e1", "a2")]}, "already"),
        ({"steps": [recorded("email/e2", "a1"), recorded("shipping/e1", "a1")]}, None),
        ({"status": "cancelled"}, "lost"),
        ({"fenced": ["a1"]}, "fenced"),
        ({"fenced": ["a2"]}, None),
        # Each of these says more than the next: what is recorded stays so, whatever came afterwards.
        ({"status": "cancelled", "fenced": ["a1"], "steps": [recorded("email/e1", "a1")]}, "done"),
        ({"status": "cancelled", "fenced": ["a1"], "steps": [recorded("email/e1", "a2")]}, "already"),
        ({"status": "cancelled", "fenced": ["a1"]}, "lost"),
    ],
)
def test_an_order_shows_what_became_of_an_attempt(changes, outcome):
    assert outcome_of(new_order(**changes), event("order_created"), "email/e1", "a1") == outcome


def test_units_taken_and_given_back_are_not_held():
    steps = [recorded("inventory/e1", A1=3, B2=1), recorded("gift/e2", A1=1), recorded("inventory/e3", A1=-4)]
    assert holdings(new_order(steps=steps)) == {"B2": 1}


def test_events_of_an_earlier_status_leave_no_unfinished_steps():
    order = new_order()
    created = order["events"][0]
    cancelled = api_event("order_cancelled", order["_id"]).envelope()
    subscribers = {"order_created": ["inventory", "audit"], "order_cancelled": ["inventory", "email"]}
    assert unfinished_steps(order, subscribers) == [("inventory", created), ("audit", created)]
    order |= {"events": [created, cancelled], "status": "cancelled"}
    assert unfinished_steps(order, subscribers) == [("inventory", cancelled), ("email", cancelled)]
    order |= {"steps": [recorded(f"inventory/{cancelled['id']}")], "parked": [f"email/{cancelled['id']}"]}
    assert unfinished_steps(order, subscribers) == []
