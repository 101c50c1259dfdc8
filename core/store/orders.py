"""MongoDB: the orders. What `core/order/state_machine.py` decides becomes one conditional write on one document here.

An order and the event it announces are one document and so one write: the transactional outbox,
https://microservices.io/patterns/data/transactional-outbox.html

All goes through `GroupCommit`, which puts what many threads want at one moment into one call: `do(writes, ids)` writes,
then gives the documents with these ids as they are now; `offer(write)` writes without anybody waiting; `reading()` is
for lists. `do` does not say whether a filter matched: the caller reads that in the document. A write whose outcome is
unknown is sent again, unless it is asked for `once`.
"""

from datetime import datetime, timedelta
from typing import Any

from pymongo.errors import DuplicateKeyError

from core.base.ids import now
from core.order import state_machine
from core.order.events import Event
from core.order.state_machine import TRANSITIONS, Change, Move, OrderDocument, Step
from core.store.connection import DocumentExists
from core.store.group_commit import GroupCommit, Write

TIMELINE_KEPT = 100
EPOCH = datetime(1970, 1, 1)
FIRST_LOOK = timedelta(seconds=10)  # how long an open order is left alone before the sweep looks at it


class KeyReused(Exception):
    """The Idempotency-Key was used before, with another body."""


class StatusConflict(Exception):
    """The order's status forbids it."""


class Orders:
    """The orders. Methods raise StoreUnavailable where the store does not answer in time."""

    def __init__(self, database: Any) -> None:
        self._collection, self._leases = database["orders"], database["leases"]
        self._bulk = GroupCommit(self._collection, self._make_indexes)
        self.ping = self._bulk.ping

    def _make_indexes(self) -> None:
        self._collection.create_index("requestKey", unique=True)
        self._collection.create_index("due")
        for field in ("owner", "customerId", "status"):
            self._collection.create_index([(field, 1), ("_id", -1)])

    # --- what the API asks

    def create(self, order: dict[str, Any], event: Event, key: str | None, fingerprint: str) -> OrderDocument:
        """Store an order and the event it announces; gives its document, or that of an earlier order with this key.

        Raises KeyReused. The unique index on the request key is the lock: of many equal requests one inserts.
        """
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
        document = self._write(state_machine.cancel(event, now()), seconds=2.5)
        row = TRANSITIONS[event.type]
        if document["status"] != row.leaves:
            raise StatusConflict(f"the order is {document['status']}; only a {row.needs} order can be {row.leaves}")
        return document, any(known["id"] == event.id for known in document["events"])

    # --- what the consumer asks

    def record(self, event: Event, step: str, attempt: str, answers: list[Event], moves: list[Move]) -> OrderDocument:
        """The deciding write: this attempt did the step, unless it can no longer be recorded.

        Gives the order as it is afterwards; `outcome_of` tells from it whether this attempt was the one.
        """
        return self._write(state_machine.record(event, Step(step=step, attempt=attempt, moves=moves), answers, now()))

    def record_failure(self, event: Event, step: str, attempt: str, tries: int, error: str, wait: float | None) -> None:
        """Write a failed try into the order; `wait` is the seconds to the next one, None where the step is parked."""
        self._write(state_machine.fail(event, step, attempt, tries, error, wait, now()))

    def clear(self, order_id: str, event_id: str) -> None:
        """Take a confirmed event out of the outbox, soon; the sweep repairs what a crash leaves there."""
        self._bulk.offer(Write({"_id": order_id, "outbox": event_id}, {"$pull": {"outbox": event_id}}))

    def _write(self, change: Change, seconds: float = 10) -> OrderDocument:
        return self._bulk.do([conditional(change)], [change.order_id], seconds)[change.order_id]

    # --- what the sweep asks

    def take_lease(self, name: str, owner: str, seconds: float) -> bool:
        """Whether `owner` holds the lease from now on."""
        moment = now()
        free = {"_id": name, "$or": [{"until": {"$lt": moment}}, {"owner": owner}]}
        held = {"$set": {"owner": owner, "until": moment + timedelta(seconds=seconds)}}
        with self._bulk.reading():
            try:
                self._leases.update_one(free, held, upsert=True)
                return True
            except DuplicateKeyError:  # it is there and somebody else's
                return False

    def due(self, limit: int, by: datetime) -> list[OrderDocument]:
        """Open orders that are due for a look."""
        with self._bulk.reading() as orders:
            return list(orders.find({"due": {"$lte": by}}).sort("due", 1).limit(limit))

    def look_again(self, order: OrderDocument, due: datetime | None, sweeps: int = 0) -> Write:
        """Have the sweep look at an order at `due`, or no more; dropped if a Change came since it was read."""
        change = {"$set": {"due": due, "sweeps": sweeps}} if due else {"$unset": {"due": 1}}
        return Write({"_id": order["_id"], "rev": order["rev"]}, change)

    def write(self, writes: list[Write]) -> None:
        """Run what `look_again` made."""
        self._bulk.do(writes, seconds=10)

    def fence(self, order_id: str, attempt: str) -> OrderDocument | None:
        """Rule an attempt out for ever, unless it is a recorded one; gives the order as it is afterwards."""
        write = Write({"_id": order_id, "steps.attempt": {"$ne": attempt}}, {"$addToSet": {"fenced": attempt}})
        return self._bulk.do([write], [order_id], seconds=10).get(order_id)

    def wake_all(self) -> None:
        """Have the sweep send every unfinished step's event again, parked ones included: the bus forgot them all."""
        again = {"due": now(), "touched": now() - timedelta(hours=1), "sweeps": 0, "parked": []}
        with self._bulk.reading() as orders:
            orders.update_many({"due": {"$gt": EPOCH}}, {"$set": again, "$inc": {"rev": 1}})

    def outbox_size(self) -> tuple[int, datetime | None]:
        """How many events wait in outboxes, and when the order waiting longest was last touched."""
        waiting = {"due": {"$gt": EPOCH}, "outbox.0": {"$exists": True}}
        total = {"_id": None, "events": {"$sum": {"$size": "$outbox"}}, "oldest": {"$min": "$touched"}}
        with self._bulk.reading() as orders:
            sums = list(orders.aggregate([{"$match": waiting}, {"$group": total}]))
        return (sums[0]["events"], sums[0]["oldest"]) if sums else (0, None)


def conditional(change: Change) -> Write:
    """A decision in MongoDB's words: what must hold is the filter, so the write happens if all of it still does.

    `$ne` on a list means: no element equals.
    """
    needs: dict[str, Any] = {"_id": change.order_id, "status": change.status}
    touched = change.next_try or change.at  # the sweep waits for the next try
    sets = {"updatedAt": change.at, "touched": touched, "due": touched + FIRST_LOOK, "sweeps": 0} | change.fields
    push: dict[str, Any] = {
        "timeline": {"$each": [{"at": change.at, **line} for line in change.lines], "$slice": -TIMELINE_KEPT},
        "events": {"$each": [event.envelope() for event in change.events]},
        "outbox": {"$each": [event.id for event in change.events]},
    }
    update: dict[str, Any] = {"$set": sets, "$inc": {"rev": 1}, "$push": push}
    if change.step:
        needs["steps.step"] = {"$ne": change.step}
    if change.record:
        needs["fenced"] = {"$ne": change.record["attempt"]}
        push["steps"] = change.record
    if change.failed_attempt:
        needs["timeline.attempt"] = {"$ne": change.failed_attempt}
    if change.returns_stock:
        needs["stockReturned"] = {"$ne": True}
        sets["stockReturned"] = True
    if change.park:
        update["$addToSet"] = {"parked": change.step}
    elif "parked" not in sets:
        update["$pull"] = {"parked": change.step}
    return Write(needs, update)
