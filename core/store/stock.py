"""MongoDB: stock, and the pending moves on it (Try-Confirm/Cancel).

A move is pending until the order records the attempt that made it. Meanwhile the stock document has an entry with the
move's id and its units, negative where they are given back. What is added to `available`:

               at once    committed    rolled back
    take 3       -3           0            +3
    give back 3   0          +3             0

So no unit is promised twice, whatever dies between two writes; the sweep ends what is left.
"""

from datetime import datetime
from typing import Any

from core.base.ids import now
from core.store.connection import DocumentExists
from core.store.group_commit import GroupCommit, Write


class Stock:
    """Units free to sell, by SKU. Methods raise StoreUnavailable where the store does not answer in time."""

    def __init__(self, database: Any) -> None:
        collection = database["stock"]
        self._bulk = GroupCommit(collection, lambda: collection.create_index("moves.at"))

    def get(self, sku: str) -> dict[str, Any] | None:
        """{"sku", "available"}, or None where there is no such SKU."""
        document = self._bulk.do(read=[sku]).get(sku)
        return _view(document) if document else None

    def page(self, after: str | None, limit: int) -> list[dict[str, Any]]:
        """At most `limit` entries by SKU, beginning behind `after`."""
        with self._bulk.reading() as stock:
            found = stock.find({"_id": {"$gt": after or ""}}).sort("_id", 1).limit(limit)
            return [_view(document) for document in found]

    def put(self, sku: str, available: int) -> dict[str, Any]:
        """From now on `available` units are free to sell; what orders hold is not touched."""
        write = Write({"_id": sku}, {"$set": {"available": available}}, upsert=True)
        try:
            self._bulk.do([write])
        except DocumentExists:  # two first writes at once: the second is an update now
            self._bulk.do([write])
        return {"sku": sku, "available": available}

    def fill(self, catalogue: dict[str, int]) -> None:
        """Insert SKUs that are missing; never over what is there."""
        missing = {sku: {"$setOnInsert": {"available": available}} for sku, available in catalogue.items()}
        self._bulk.do([Write({"_id": sku}, change, upsert=True) for sku, change in missing.items()], seconds=10)

    # --- Pending moves are sent once. `moves.id != move` stops a repeat only while the entry is there, and committing
    # removes it: a first copy, late in a slow server, would take the units again, and the sweep would commit that too.
    # So where the store does not reply the attempt gives up, and the sweep rolls back what appears.

    def take(self, move: str, order_id: str, lines: dict[str, int]) -> dict[str, str]:
        """Remove units where there are enough, each SKU for itself; gives {sku: why} for the others.

        All lines or none is what `StockMoves.take` makes of it: it rolls the move back where one line is short.
        why: `unknown_sku`, `out_of_stock`, or `in_doubt` where pending moves of others may bring units back.
        """
        writes = [_begin(sku, move, order_id, units) for sku, units in lines.items()]
        documents = self._bulk.do(writes, list(lines), seconds=10, once=True)
        reasons = {sku: _shortage(documents.get(sku), move, units) for sku, units in lines.items()}
        return {sku: reason for sku, reason in reasons.items() if reason}

    def give_back(self, move: str, order_id: str, lines: dict[str, int]) -> None:
        """Enter {sku: units}, negative, that come back when the move is committed."""
        self._bulk.do([_begin(sku, move, order_id, units) for sku, units in lines.items()], seconds=10, once=True)

    def commit(self, move: str, lines: dict[str, int]) -> None:
        """Make {sku: units} (negative: given back) final, soon; the sweep repairs what a crash leaves."""
        self._bulk.offer(*[_end(sku, move, max(0, -units)) for sku, units in lines.items()])

    def roll_back(self, move: str, lines: dict[str, int]) -> None:
        """Undo {sku: units}; when this returns they are undone."""
        self._bulk.do([_end(sku, move, max(0, units)) for sku, units in lines.items()], seconds=10)

    def old_moves(self, before: datetime, limit: int) -> list[tuple[str, dict[str, Any]]]:
        """(sku, entry) of moves pending since before a moment: their maker is dead, or slow enough to be fenced."""
        with self._bulk.reading() as stock:
            documents = list(stock.find({"moves.at": {"$lt": before}}).limit(limit))
        return [(document["_id"], move) for document in documents for move in document["moves"] if move["at"] < before]


def _view(document: dict[str, Any]) -> dict[str, Any]:
    return {"sku": document["_id"], "available": document["available"]}


def _begin(sku: str, move: str, order_id: str, units: int) -> Write:
    pending = {"id": move, "order": order_id, "units": units, "at": now()}
    taken = max(0, units)
    enough = {"_id": sku, "available": {"$gte": taken}, "moves.id": {"$ne": move}}
    return Write(enough, {"$inc": {"available": -taken}, "$push": {"moves": pending}})


def _end(sku: str, move: str, units: int) -> Write:
    return Write({"_id": sku, "moves.id": move}, {"$inc": {"available": units}, "$pull": {"moves": {"id": move}}})


def _shortage(document: dict[str, Any] | None, move: str, units: int) -> str:
    if document is None:
        return "unknown_sku"
    pending = document.get("moves", [])
    if any(other["id"] == move for other in pending):
        return ""
    coming_back = sum(abs(other["units"]) for other in pending)  # a take if rolled back, a give-back if committed
    return "in_doubt" if document["available"] + coming_back >= units else "out_of_stock"
