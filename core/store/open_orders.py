"""MongoDB: the orders that are not at their end, as the sweep finds and moves them. Nothing in here is unbounded."""

from datetime import datetime, timedelta
from typing import Any

from core.order.state_machine import OrderDocument
from core.store.connection import Write
from core.store.group_commit import GroupCommit

EPOCH = datetime(1970, 1, 1)
FAR = timedelta(minutes=31)  # the sweep never plans further ahead; what is due later is so by a wrong clock


class OpenOrders:
    """What the sweep asks of the orders. Methods raise StoreUnavailable where the store does not answer in time."""

    def __init__(self, bulk: GroupCommit) -> None:
        self._bulk = bulk

    def due(self, limit: int, by: datetime) -> list[OrderDocument]:
        """Those that are due for a look, or would be only after longer than the sweep ever plans."""
        due = [{"due": {"$exists": True, "$lte": by}}, {"due": {"$exists": True, "$gt": by + FAR}}]
        with self._bulk.reading() as orders:
            return list(orders.find({"$or": due}).sort("due", 1).limit(limit))

    def look_again(self, order: OrderDocument, due: datetime | None, sweeps: int = 0) -> Write:
        """Have the sweep look at an order at `due`, or no more; dropped if a Change came since it was read."""
        sets = {"sweeps": sweeps, "touched": order.get("touched")} | ({"due": due} if due else {})
        over = (("due", not due), ("outboxSince", not order.get("outbox")))
        gone = {name: 1 for name, is_over in over if is_over}
        return Write(
            {"_id": order["_id"], "rev": order.get("rev")}, {"$set": sets} | ({"$unset": gone} if gone else {})
        )

    def write(self, writes: list[Write]) -> list[Any]:
        """Run what `look_again` made; gives None for each that was refused."""
        return self._bulk.do_each(writes)

    def fence(self, attempts: list[tuple[str, str]]) -> list[Any]:
        """Rule attempts (order id, attempt) out for ever, unless recorded; gives the orders as they are afterwards.

        {} where there is none, None where it could not be written.
        """
        unless_recorded = [({"_id": order, "steps.attempt": {"$ne": attempt}}, attempt) for order, attempt in attempts]
        return self._bulk.do_each([Write(needs, {"$addToSet": {"fenced": id}}) for needs, id in unless_recorded])

    def wake(self, limit: int, before: datetime) -> int:
        """Have the sweep send the unfinished steps of orders that were made before again, parked ones too.

        Gives of how many orders; where that is `limit`, others are still to be woken.
        """
        long_ago = before - timedelta(hours=1)  # who was touched then was woken by us
        asleep = {"due": {"$exists": True, "$gt": EPOCH}, "createdAt": {"$lt": before}, "touched": {"$ne": long_ago}}
        again = {"$set": {"due": before, "touched": long_ago, "sweeps": 0, "parked": []}, "$inc": {"rev": 1}}
        with self._bulk.reading() as orders:
            ids = [order["_id"] for order in orders.find(asleep, {"_id": 1}).limit(limit)]
        self._bulk.do_each([Write({"_id": id}, again) for id in ids])
        return len(ids)

    def outbox_size(self, most: int) -> tuple[int, datetime | None]:
        """How many events wait in the outboxes of at most so many orders, and since when the oldest does."""
        waiting = {"outboxSince": {"$exists": True, "$gt": EPOCH}}
        total = {"_id": None, "events": {"$sum": {"$size": "$outbox"}}}
        with self._bulk.reading() as orders:
            oldest = list(orders.find(waiting, {"outboxSince": 1}).sort("outboxSince", 1).limit(1))
            sums = list(orders.aggregate([{"$match": waiting}, {"$limit": most}, {"$group": total}])) if oldest else []
        return (sums[0]["events"], oldest[0].get("outboxSince")) if sums else (0, None)
