"""MongoDB: the orders. What `core/order/state_machine.py` decides becomes one conditional write on one document here.

An order and the event it announces are one document and so one write: the transactional outbox,
https://microservices.io/patterns/data/transactional-outbox.html

All goes through `GroupCommit`, which puts what many threads want at one moment into one call: `do(writes, ids)` writes,
then gives the documents with these ids as they are now; `offer(write)` writes without anybody waiting; `reading()` is
for lists. `do` does not say whether a filter matched: the caller reads that in the document. A write whose outcome is
unknown is sent again, unless it is asked for `once`.
"""

import threading
from datetime import timedelta
from typing import Any

from core.base.ids import now
from core.order import state_machine
from core.order.events import Event
from core.order.state_machine import TRANSITIONS, Change, Line, OrderDocument, Step
from core.store.connection import DocumentExists, KeyReused, StoreUnavailable, Write, time_left
from core.store.group_commit import PATIENCE, GroupCommit

TIMELINE_KEPT = 100
FIRST_LOOK = timedelta(seconds=10)  # how long an open order is left alone before the sweep looks at it


class OrderMissing(Exception):
    """There is no order of this id."""


class StatusConflict(Exception):
    """The order's status forbids it."""


class Orders:
    """The orders. Methods raise StoreUnavailable where the store does not answer in time."""

    def __init__(self, bulk: GroupCommit, keys_are_unique: threading.Event) -> None:
        self._bulk, self._keys_are_unique = bulk, keys_are_unique

    def create(self, order: dict[str, Any], event: Event, key: str | None, fingerprint: str) -> OrderDocument:
        """Store an order and the event it announces; gives its document, or that of an earlier order with this key.

        Raises KeyReused. The unique index on the request key is the lock: of many equal requests one inserts.
        """
        if not self._keys_are_unique.wait(time_left(PATIENCE)):
            raise StoreUnavailable("the unique index on requestKey is not there yet")
        request_key = f"{order['owner']}:{key}" if key else order["_id"]
        document = state_machine.new_order(order, event, now())
        document |= {"requestKey": request_key, "fingerprint": fingerprint, "due": document["touched"] + FIRST_LOOK}
        try:
            return self._bulk.do([Write(None, document)], [document["_id"]])[document["_id"]]
        except DocumentExists:  # another request with this key was first, or this very write when it was repeated
            with self._bulk.reading() as orders:
                first = orders.find_one({"requestKey": request_key})
        if first["fingerprint"] != fingerprint:
            raise KeyReused("this Idempotency-Key was used with another body")
        return first

    def get(self, order_id: str) -> OrderDocument | None:
        """One order."""
        return self._bulk.do(read=[order_id]).get(order_id)

    def page(self, where: dict[str, str], after: str | None, limit: int) -> list[OrderDocument]:
        """At most `limit` orders that match, newest first, beginning behind the id `after`."""
        older = {"_id": {"$lt": after}} if after else {}
        with self._bulk.reading() as orders:
            return list(orders.find({**where, **older}).sort("_id", -1).limit(limit))

    def cancel(self, event: Event) -> tuple[OrderDocument, bool]:
        """Cancel a pending order; gives (document, whether this call did it). Raises StatusConflict."""
        document = self._write(state_machine.cancel(event, now()))
        row = TRANSITIONS[event.type]
        if document["status"] != row.leaves:
            raise StatusConflict(f"the order is {document['status']}; only a {row.needs} order can be {row.leaves}")
        return document, any(known["id"] == event.id for known in document["events"])

    def record(self, event: Event, step: Step, answers: list[Event]) -> OrderDocument:
        """The deciding write: this attempt did the step, unless it can no longer be recorded.

        Gives the order as it is afterwards; `outcome_of` tells from it whether this attempt was the one.
        """
        return self._write(state_machine.record(event, step, answers, now()))

    def record_failure(self, event: Event, step: str, attempt: str, why: Line, wait: float | None) -> None:
        """Write a failed try into the order; `wait` is the seconds to the next one, None where the step is parked."""
        self._write(state_machine.fail(event, step, attempt, why, wait, now()))

    def clear(self, order_id: str, event_id: str) -> None:
        """Take a confirmed event out of the outbox, soon; the sweep repairs what a crash leaves there."""
        last: dict[str, Any] = {"$set": {"outbox": []}, "$unset": {"outboxSince": 1}}
        self._bulk.offer(
            Write({"_id": order_id, "outbox": [event_id]}, last),
            Write({"_id": order_id, "outbox": event_id}, {"$pull": {"outbox": event_id}}),
        )

    def _write(self, change: Change) -> OrderDocument:
        documents = self._bulk.do([conditional(change)], [change.order_id])
        if change.order_id not in documents:
            raise OrderMissing(f"there is no order {change.order_id}")
        return documents[change.order_id]


def conditional(change: Change) -> Write:
    """A decision in MongoDB's words: what must hold is the filter, so the write happens if all of it still does.

    `$ne` on a list means: no element equals.
    """
    needs: dict[str, Any] = {"_id": change.order_id, "status": change.status}
    if change.step:
        needs["steps.step"] = {"$ne": change.step}
    if change.record:
        needs["fenced"] = {"$ne": change.record["attempt"]}
    if change.failed_attempt:
        needs["timeline.attempt"] = {"$ne": change.failed_attempt}
    if change.returns_stock:
        needs["stockReturned"] = {"$ne": True}
    return Write(needs, _update(change))


def _update(change: Change) -> dict[str, Any]:
    touched = change.next_try or change.at  # the sweep waits for the next try
    sets = {"touched": touched, "due": touched + FIRST_LOOK, "sweeps": 0} | change.fields
    push: dict[str, Any] = {
        "timeline": {"$each": [{"at": change.at, **line} for line in change.lines], "$slice": -TIMELINE_KEPT},
        "events": {"$each": [event.envelope() for event in change.events]},
        "outbox": {"$each": [event.id for event in change.events]},
    }
    # A clock may go backwards, and `updatedAt` does not.
    update: dict[str, Any] = {"$set": sets, "$inc": {"rev": 1}, "$push": push, "$max": {"updatedAt": change.at}}
    if change.events:
        update["$min"] = {"outboxSince": change.at}
    if change.record:
        push["steps"] = change.record
    if change.returns_stock:
        sets["stockReturned"] = True
    if change.park:
        update["$addToSet"] = {"parked": change.step}
    elif "parked" not in sets:
        update["$pull"] = {"parked": change.step}
    return update
