"""MongoDB: the orders that are not at their end, as the sweep finds and moves them. Nothing in here is unbounded."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from core.base.ids import now
from core.order.events import Envelope
from core.order.state_machine import Line, OrderDocument
from core.store.connection import Write
from core.store.group_commit import GroupCommit
from core.store.orders import TIMELINE_KEPT

Resends = Sequence[tuple[str, Envelope]]  # (handler, what it misses)
OPEN, WAITING = {"due": {"$exists": True}}, {"outboxSince": {"$exists": True}}
FAR = timedelta(minutes=31)  # the sweep never plans further ahead; what is due later is so by a wrong clock


class OpenOrders:
    """What the sweep asks of the orders. Methods raise StoreUnavailable where the store does not answer in time."""

    def __init__(self, bulk: GroupCommit) -> None:
        self._bulk = bulk

    def due(self, limit: int, by: datetime) -> list[OrderDocument]:
        """Those that are due for a look, or would be only after longer than the sweep ever plans.

        Asked for what comes first and last, and chosen here: with a range as well, some stores would not use the index.
        """
        with self._bulk.reading() as orders:
            ends = [orders.find(OPEN, {"due": 1}).sort("due", order).limit(limit) for order in (1, -1)]
            found = {each["_id"]: each["due"] for end in ends for each in end}
        ids = [id for id, due in found.items() if isinstance(due, datetime) and not by < due <= by + FAR][:limit]
        documents = self._bulk.do(read=ids) if ids else {}
        return [documents[id] for id in ids if id in documents]

    def look_again(self, order: OrderDocument, due: datetime | None, sweeps: int = 0, resent: Resends = ()) -> Write:
        """Have the sweep look at an order at `due`, or no more; dropped if a Change came since it was read."""
        sets: dict[str, Any] = {"sweeps": sweeps, "touched": order.get("touched")} | ({"due": due} if due else {})
        sets |= {"timeline": _with_sent(order, resent)} if resent else {}
        over = {"redriven": True, "due": not due, "outboxSince": not order.get("outbox")}
        gone = {name: 1 for name, is_over in over.items() if is_over}
        return Write({"_id": order["_id"], "rev": order.get("rev")}, {"$set": sets, "$unset": gone})

    def write(self, writes: list[Write]) -> list[Any]:
        """Run what `look_again` made; gives None for each that was refused."""
        return self._bulk.do_each(writes)

    def fence(self, attempts: list[tuple[str, str]]) -> list[Any]:
        """Rule attempts (order id, attempt) out for ever, unless recorded; gives the orders as they are afterwards.

        {} where there is none, None where it could not be written.
        """
        return self._bulk.do_each([_fence(order_id, attempt) for order_id, attempt in attempts])

    def redrive(self, order: OrderDocument) -> OrderDocument:
        """Have the next round of the sweep send the events of an order's parked steps again; gives the order then."""
        steps = order["parked"]
        again = {"$pull": {"parked": {"$in": steps}}, "$addToSet": {"redriven": {"$each": steps}}}
        write = Write({"_id": order["_id"]}, {**again, "$set": {"due": now()}, "$inc": {"rev": 1}})
        return self._bulk.do([write] if steps else [], [order["_id"]])[order["_id"]]

    def wake(self, limit: int, before: datetime) -> int:
        """Have the sweep send the unfinished steps of orders that were made before again, parked ones too.

        Gives of how many orders; where that is `limit`, others are still to be woken.
        """
        long_ago = before - timedelta(hours=1)  # who was touched then was woken by us
        asleep = {**OPEN, "createdAt": {"$lt": before}, "touched": {"$ne": long_ago}}
        again = {"$set": {"due": before, "touched": long_ago, "sweeps": 0, "parked": []}, "$inc": {"rev": 1}}
        with self._bulk.reading() as orders:
            ids = [order["_id"] for order in orders.find(asleep, {"_id": 1}).limit(limit)]
        self._bulk.do_each([Write({"_id": id}, again) for id in ids])
        return len(ids)

    def outbox_size(self, most: int) -> tuple[int, datetime | None]:
        """How many events wait in the outboxes of at most so many orders, and since when the oldest does."""
        total = {"_id": None, "events": {"$sum": {"$size": "$outbox"}}}
        with self._bulk.reading() as orders:
            oldest = list(orders.find(WAITING, {"outboxSince": 1}).sort("outboxSince", 1).limit(1))
            sums = list(orders.aggregate([{"$match": WAITING}, {"$limit": most}, {"$group": total}])) if oldest else []
        return (sums[0]["events"], oldest[0].get("outboxSince")) if sums else (0, None)


def _fence(order_id: str, attempt: str) -> Write:
    return Write({"_id": order_id, "steps.attempt": {"$ne": attempt}}, {"$addToSet": {"fenced": attempt}})


def _with_sent(order: OrderDocument, resent: Resends) -> list[Line]:
    """The timeline, with a line for each step that the sweep sends again: one a step, with how often."""
    lines = list(order["timeline"])
    for handler, envelope in resent:
        line: Line = {"sent": envelope["type"], "by": "sweep", "to": handler}
        before = [each for each in lines if line.items() <= each.items()]
        line |= {"at": now(), "times": 1 + sum(each["times"] for each in before)}
        lines = [*(each for each in lines if each not in before), line]
    return lines[-TIMELINE_KEPT:]
