"""MongoDB: orders with the events they owe, the steps that were done on them, and the keys they were asked for with.

One document is one order. What is decided, is decided by a conditional write on it; each condition, once false, stays
false, so the first writer wins and every write may be repeated. The outbox pattern (the event is stored with the order,
in one write): https://microservices.io/patterns/data/transactional-outbox.html
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import pymongo
from pymongo.errors import DuplicateKeyError, PyMongoError
from pymongo.monitoring import CommandListener, CommandStartedEvent
from pymongo.write_concern import WriteConcern

from core.batcher import Batcher, Duplicate, StoreAway, Write
from core.events import FACTS, STATUS, Event, now, rfc3339
from core.money import from_minor
from core.telemetry import STORE_COMMANDS

TIMELINE_KEPT = 100
EPOCH = datetime(1970, 1, 1)
FIRST_LOOK = timedelta(seconds=10)  # how long an open order is left alone before the sweep looks at it
SHOWN = (  # in this order
    "id", "status", "customerId", "email", "currency", "items", "total", "shippingAddress", "createdAt", "updatedAt",
    "failureReason", "shipment", "parked", "timeline",
)  # fmt: skip
Document = dict[str, Any]


class KeyReused(Exception):
    """The Idempotency-Key was used before, with another body."""


class Conflict(Exception):
    """The state of the order forbids it."""


class _CountCommands(CommandListener):
    def started(self, event: CommandStartedEvent) -> None:
        STORE_COMMANDS.labels(event.command_name).inc()

    def succeeded(self, event: Any) -> None:
        """Counted when started."""

    failed = succeeded


def connect(url: str) -> Any:
    """The database named in the URL (`orderproc` where none is). Connects when first used. `memory` is mongomock."""
    if url == "memory":
        import mongomock

        return mongomock.MongoClient()["orderproc"]
    client: pymongo.MongoClient[Document] = pymongo.MongoClient(
        url,
        serverSelectionTimeoutMS=2000, connectTimeoutMS=2000, socketTimeoutMS=2500, waitQueueTimeoutMS=2000,
        event_listeners=[_CountCommands()],
    )  # fmt: skip
    # Majority and journal: an order that was answered with 201 survives a fail-over and a power cut.
    return client.get_default_database("orderproc").with_options(write_concern=WriteConcern(w="majority", j=True))


@contextmanager
def answering(batch: Batcher) -> Iterator[None]:
    """Around a plain read: refused at once while others find out whether the store is back; any error is StoreAway."""
    try:
        if batch.away:
            batch.do(read=["-"])
        yield
    except PyMongoError as error:
        raise StoreAway(repr(error)[:300]) from error


class Orders:
    """The orders. Methods raise StoreAway where the store does not answer in time."""

    def __init__(self, database: Any) -> None:
        self._orders, self._leases = database["orders"], database["leases"]
        self._batch = Batcher(self._orders, self._make_indexes)

    def _make_indexes(self) -> None:
        self._orders.create_index("requestKey", unique=True)
        self._orders.create_index("due")
        for field in ("owner", "customerId", "status"):
            self._orders.create_index([(field, 1), ("_id", -1)])

    # --- what the API asks

    def create(self, order: Document, event: Event, key: str | None, fingerprint: str) -> tuple[Document, bool]:
        """Store an order and the event it owes; gives (document, whether it is an earlier order with this key).

        Raises KeyReused. The unique index on the request key is the lock: of many equal requests one inserts.
        """
        document = _new_document(order, event, key, fingerprint)
        try:
            return self._batch.do([Write(None, document)], [document["_id"]])[document["_id"]], False
        except Duplicate:  # somebody was first: another request with this key, or this very write when it was repeated
            with answering(self._batch):
                first = self._orders.find_one({"requestKey": document["requestKey"]})
        if first["fingerprint"] != fingerprint:
            raise KeyReused("this Idempotency-Key was used with another body")
        return first, first["_id"] != document["_id"]

    def get(self, order_id: str) -> Document | None:
        """One order, read in the company of whatever else is waiting."""
        return self._batch.do(read=[order_id]).get(order_id)

    def page(self, where: Document, after: str | None, limit: int) -> list[Document]:
        """At most `limit` orders that match, newest first, beginning behind the id `after`."""
        older = {"_id": {"$lt": after}} if after else {}
        with answering(self._batch):
            return list(self._orders.find({**where, **older}).sort("_id", -1).limit(limit))

    def cancel(self, order_id: str, event: Event) -> tuple[Document, bool]:
        """Cancel a pending order; gives (document, whether this call did it). Raises Conflict on any other status."""
        change = _change([{"event": event.type, "by": "api"}], [event])
        write = Write({"_id": order_id, "status": "pending", "events.id": {"$ne": event.id}}, change)
        document = self._batch.do([write], [order_id])[order_id]
        if document["status"] != "cancelled":
            raise Conflict(f"the order is {document['status']}; only a pending order can be cancelled")
        return document, any(known["id"] == event.id for known in document["events"])

    def ping(self) -> bool:
        """Whether the store answers, known within 3 s."""
        try:
            self._batch.do(read=["-"])
        except (StoreAway, PyMongoError):
            return False
        return True

    # --- what the consumer asks

    def record(
        self, event: Event, step: str, attempt: str, answers: Sequence[Event], moves: list[Document]
    ) -> Document:
        """The deciding write: this attempt did the step, unless another did, the status moved on or it is void.

        Gives the order as it is afterwards; `standing` tells from it whether this attempt was the one.
        """
        by = step.split("/")[0]
        lines = [{"event": answer.type, "by": by} for answer in answers] or [{"done": event.type, "by": by}]
        change = _change(lines, answers)
        change["$push"]["steps"] = {"step": step, "attempt": attempt, "moves": moves}
        if "status" not in change["$set"]:
            change["$pull"] = {"parked": step}
        condition = _open_step(event, step) | {"void": {"$ne": attempt}}
        if any(move["quantity"] < 0 for move in moves):  # what the order holds is given back once, whoever asks
            condition["returned"] = {"$ne": True}
            change["$set"]["returned"] = True
        return self._batch.do([Write(condition, change)], [event.subject], seconds=10)[event.subject]

    def record_failure(self, event: Event, step: str, attempt: str, tries: int, error: str, wait: float | None) -> None:
        """Write a failed try into the order; `wait` is the seconds to the next one, None where the step is parked."""
        line = {"parked" if wait is None else "failed": event.type, "by": step.split("/")[0], "try": tries}
        change = _change([line | {"error": error, "attempt": attempt}], wait=wait)
        change["$addToSet" if wait is None else "$pull"] = {"parked": step}
        once = {"timeline.attempt": {"$ne": attempt}}  # this write may be repeated like any other
        self._batch.do([Write(_open_step(event, step) | once, change)], seconds=10)

    def clear(self, order_id: str, event_id: str) -> None:
        """Take a confirmed event out of the outbox, when there is time."""
        self._batch.offer(Write({"_id": order_id, "outbox": event_id}, {"$pull": {"outbox": event_id}}))

    # --- what the sweep asks

    def take_lease(self, name: str, owner: str, seconds: float) -> bool:
        """Whether `owner` holds the lease from now on."""
        moment = now()
        free = {"_id": name, "$or": [{"until": {"$lt": moment}}, {"owner": owner}]}
        held = {"$set": {"owner": owner, "until": moment + timedelta(seconds=seconds)}}
        with answering(self._batch):
            try:
                self._leases.update_one(free, held, upsert=True)
                return True
            except DuplicateKeyError:  # it is there and somebody else's
                return False

    def due(self, limit: int, by: datetime) -> list[Document]:
        """Open orders that are due for a look."""
        with answering(self._batch):
            return list(self._orders.find({"due": {"$lte": by}}).sort("due", 1).limit(limit))

    def close(self, document: Document) -> Write:
        """Nothing is owed any more; counts only if nothing happened to the order since it was read."""
        return Write({"_id": document["_id"], "rev": document["rev"]}, {"$unset": {"due": 1}})

    def look_again(self, document: Document, due: datetime, sweeps: int) -> Write:
        """Have the sweep come back at `due`, unless something touches the order before."""
        return Write({"_id": document["_id"], "rev": document["rev"]}, {"$set": {"due": due, "sweeps": sweeps}})

    def write(self, writes: list[Write]) -> None:
        """Run what `close` and `look_again` made."""
        self._batch.do(writes, seconds=10)

    def wake_all(self) -> None:
        """Have the sweep send everything again that open orders owe, parked steps included: the bus forgot it all."""
        long_ago = now() - timedelta(hours=1)
        change = {"$set": {"due": now(), "touched": long_ago, "sweeps": 0, "parked": []}, "$inc": {"rev": 1}}
        with answering(self._batch):
            self._orders.update_many({"due": {"$gt": EPOCH}}, change)

    def void(self, order_id: str, attempt: str) -> Document | None:
        """Rule an attempt out, unless it is a recorded one; gives the order as it is afterwards."""
        write = Write({"_id": order_id, "steps.attempt": {"$ne": attempt}}, {"$addToSet": {"void": attempt}})
        return self._batch.do([write], [order_id], seconds=10).get(order_id)

    def outbox_size(self) -> tuple[int, datetime | None]:
        """How many events wait in outboxes, and when the order waiting longest was last touched."""
        waiting = {"due": {"$gt": EPOCH}, "outbox.0": {"$exists": True}}
        total = {"_id": None, "events": {"$sum": {"$size": "$outbox"}}, "oldest": {"$min": "$touched"}}
        with answering(self._batch):
            found = list(self._orders.aggregate([{"$match": waiting}, {"$group": total}]))
        return (found[0]["events"], found[0]["oldest"]) if found else (0, None)


# --- the document ------------------------------------------------------------------------------------------------


def _new_document(order: Document, event: Event, key: str | None, fingerprint: str) -> Document:
    moment = now()
    return {
        "_id": order["id"], "status": "pending",
        "requestKey": f"{order['owner']}:{key}" if key else order["id"], "fingerprint": fingerprint,
        **{name: value for name, value in order.items() if name != "id"},
        "createdAt": moment, "updatedAt": moment, "touched": moment, "due": moment + FIRST_LOOK, "sweeps": 0, "rev": 0,
        "timeline": [{"at": moment, "event": event.type, "by": "api"}],
        "events": [event.envelope()], "outbox": [event.id], "steps": [], "void": [], "parked": [],
    }  # fmt: skip


def _change(lines: list[Document], events: Sequence[Event] = (), wait: float | None = None) -> Document:
    moment = now()
    touched = moment + timedelta(seconds=wait or 0)  # a failed try touches the order at the time its next one is due
    fields: Document = {"updatedAt": moment, "touched": touched, "due": touched + FIRST_LOOK, "sweeps": 0}
    for event in events:
        if event.type in STATUS:  # what was parked under the old status can no longer count
            fields |= {"status": STATUS[event.type], "parked": []}
        for name, field in FACTS.get(event.type, {}).items():
            fields[field] = event.data[name]
    next = {} if wait is None else {"next": touched}
    push = {
        "timeline": {"$each": [{"at": moment, **line, **next} for line in lines], "$slice": -TIMELINE_KEPT},
        "events": {"$each": [event.envelope() for event in events]},
        "outbox": {"$each": [event.id for event in events]},
    }
    return {"$set": fields, "$inc": {"rev": 1}, "$push": push}


def _open_step(event: Event, step: str) -> Document:
    return {"_id": event.subject, "status": event.orderstatus, "steps.step": {"$ne": step}}


def step_name(handler: str, event_id: str) -> str:
    """What a step is recorded under."""
    return f"{handler}/{event_id}"


def standing(document: Document, event: Event, step: str, attempt: str = "") -> str:
    """Where a step stands: `mine` (this attempt is the recorded one), `done` (another is), `moved` (the status moved
    on), `void` (this attempt was ruled out) or `open`."""
    for recorded in document["steps"]:
        if recorded["step"] == step:
            return "mine" if recorded["attempt"] == attempt else "done"
    if document["status"] != event.orderstatus:
        return "moved"
    return "void" if attempt in document["void"] else "open"


def holdings(document: Document) -> dict[str, int]:
    """{sku: units} that the order's recorded steps hold."""
    held: Counter[str] = Counter()
    for step in document["steps"]:
        for move in step["moves"]:
            held[move["sku"]] += move["quantity"]
    return dict(+held)


def owed(document: Document, takers: dict[str, list[str]]) -> list[tuple[str, Document]]:
    """(handler, envelope) of what the order still owes: an event whose status is the order's, that a handler takes but
    has neither recorded nor parked."""
    over = {step["step"] for step in document["steps"]} | set(document["parked"])
    current = [event for event in document["events"] if event["orderstatus"] == document["status"]]
    pairs = [(handler, event) for event in current for handler in takers.get(event["type"], [])]
    return [(handler, event) for handler, event in pairs if step_name(handler, event["id"]) not in over]


def view(document: Document, timeline: bool = True) -> Document:
    """The order as the API shows it."""
    currency = document["currency"]
    shown = document | {
        "id": document["_id"],
        "items": [item | {"price": from_minor(item["price"], currency)} for item in document["items"]],
        "total": from_minor(document["total"], currency),
        "createdAt": rfc3339(document["createdAt"]),
        "updatedAt": rfc3339(document["updatedAt"]),
        "parked": sorted({step.split("/")[0] for step in document["parked"]}),
        "timeline": [_line(line) for line in document["timeline"]] if timeline else [],
    }
    return {name: shown[name] for name in SHOWN if shown.get(name) not in (None, [])}


def _line(line: Document) -> Document:
    return {k: rfc3339(v) if isinstance(v, datetime) else v for k, v in line.items() if k != "attempt"}
