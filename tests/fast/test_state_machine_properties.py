"""Any decisions in any order, repeated at any time: what stays true of an order; and that the store decides so, too.

The model below is what `Change` says, in plain Python; the program's `conditional` is the same in MongoDB's words.
"""

import copy
import itertools
from datetime import datetime, timedelta

import mongomock
from hypothesis import given, settings
from hypothesis import strategies as st

from core.order import state_machine
from core.order.events import Event
from core.order.state_machine import STATUSES, TRANSITIONS, Change, Step, holdings
from core.store.orders import conditional
from tests.support.samples import LABEL, an_order, answer, api_event

BEGIN = datetime(2026, 1, 31, 9, 30)
ORDER = an_order()
CREATED = api_event("order_created", ORDER["_id"])
CANCELLED = api_event("order_cancelled", ORDER["_id"])
RESERVED = answer(CREATED, "inventory", "inventory_reserved")
PARENTS = [CREATED, RESERVED, CANCELLED, answer(CREATED, "inventory", "order_failed", reason="out_of_stock")]
ANSWERS = {"inventory_reserved": {}, "order_confirmed": {"shipment": LABEL}, "order_failed": {"reason": "out_of_stock"}}


def a_record(parent: Event, handler: str, attempt: str, type: str | None, units: int) -> Change:
    moves = [{"move": f"{attempt}.0", "sku": "A1", "quantity": units}] if units else []
    allowed = type and (type not in TRANSITIONS or TRANSITIONS[type].needs == parent.orderstatus)  # see check_answers
    follows = [answer(parent, handler, type, **ANSWERS[type])] if allowed else []
    step = Step(step=state_machine.step_name(handler, parent.id), attempt=attempt, moves=moves, ms=3)
    return state_machine.record(parent, step, follows, BEGIN)


def a_failure(parent: Event, handler: str, attempt: str, wait: float | None) -> Change:
    step = state_machine.step_name(handler, parent.id)
    return state_machine.fail(parent, step, attempt, {"try": 1, "error": "KeyError"}, wait, BEGIN)


parents, handlers = st.sampled_from(PARENTS), st.sampled_from(["inventory", "shipping"])
attempts = st.sampled_from(["a1", "a2", "a3"])
types, units = st.sampled_from([None, *ANSWERS]), st.sampled_from([0, 2, -2])
changes = st.one_of(
    st.just(state_machine.cancel(CANCELLED, BEGIN)),
    st.builds(a_record, parents, handlers, attempts, types, units),
    st.builds(a_failure, parents, handlers, attempts, st.sampled_from([None, 2.0])),
)
fences = attempts  # an attempt's id alone: it is fenced
histories = st.lists(st.one_of(changes, fences), max_size=25)


def holds(change: Change, order: dict) -> bool:
    """Whether the order is as the change needs it."""
    steps = [step["step"] for step in order["steps"]]
    return (
        order["status"] == change.status
        and (not change.step or change.step not in steps)
        and (not change.record or change.record["attempt"] not in order["fenced"])
        and (
            not change.failed_attempt or all(line.get("attempt") != change.failed_attempt for line in order["timeline"])
        )
        and (not change.returns_stock or not order.get("stockReturned"))
    )


def applied(change: Change, order: dict) -> dict:
    """The order afterwards."""
    order = copy.deepcopy(order) | change.fields
    order["outbox"] += [event.id for event in change.events]
    order["events"] += [event.envelope() for event in change.events]
    order["timeline"] += [{"at": change.at, **line} for line in change.lines]
    order["steps"] += [change.record] if change.record else []
    parked = [step for step in order["parked"] if step != change.step]
    order["parked"] = parked + ([change.step] if change.park else [])
    return order | ({"stockReturned": True} if change.returns_stock else {})


def write(collection, change: Change) -> bool:
    """As group commit does, on one document; whether it was written."""
    needs, update, _ = conditional(change)
    return bool(collection.update_one(needs, update).matched_count)


def run(history) -> list[tuple[dict, bool]]:
    """(the order, whether the last change was written) after each, checked against the model."""
    collection = mongomock.MongoClient()["orderproc"]["orders"]
    collection.insert_one(state_machine.new_order(ORDER, CREATED, BEGIN) | {"due": BEGIN + timedelta(seconds=10)})
    states = [(collection.find_one(), True)]
    for change in history:
        before = states[-1][0]
        if isinstance(change, str):
            unrecorded = {"steps.attempt": {"$ne": change}}
            collection.update_one(unrecorded, {"$addToSet": {"fenced": change}})
            states.append((collection.find_one(), True))
            continue
        written = write(collection, change)
        after = collection.find_one()
        assert written == holds(change, before), "the store decides as the model"
        wanted = applied(change, before) if written else before
        names = ("status", "steps", "outbox", "events", "timeline", "stockReturned", "failureReason", "shipment")
        assert [after.get(name) for name in names] == [wanted.get(name) for name in names]
        assert sorted(after["parked"]) == sorted(wanted["parked"])
        states.append((after, written))
    return states


@given(histories)
@settings(max_examples=300, deadline=None)
def test_no_history_breaks_what_an_order_promises(history):
    states = [order for order, _ in run(history)]
    for before, after in itertools.pairwise(states):
        assert before["status"] == after["status"] or (before["status"], after["status"]) in {
            (row.needs, row.leaves) for row in TRANSITIONS.values()
        }
        assert after["status"] in STATUSES
        steps = [step["step"] for step in after["steps"]]
        assert len(steps) == len(set(steps)), "a step is recorded once"
        assert before["steps"] == after["steps"][: len(before["steps"])], "and stays as it is"
        given_back = [step for step in after["steps"] if any(move["quantity"] < 0 for move in step["moves"])]
        assert len(given_back) <= 1, "what an order holds is given back once"
        assert all(units > 0 for units in holdings(after).values())
        recorded = {step["attempt"] for step in after["steps"]} - {step["attempt"] for step in before["steps"]}
        assert not recorded & set(before["fenced"]), "a fenced attempt is never recorded"


@given(histories, st.data())
@settings(max_examples=200, deadline=None)
def test_a_refused_change_stays_refused_and_a_repeat_changes_nothing(history, data):
    repeated = [change for change in history for _ in range(data.draw(st.integers(1, 3)))]
    seen: dict[int, bool] = {}
    for change, (_, written) in zip(repeated, run(repeated)[1:], strict=True):
        if isinstance(change, Change):
            assert not (written and seen.get(id(change))), "whatever was decided once is decided"
            seen[id(change)] = True
