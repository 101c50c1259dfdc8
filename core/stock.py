"""MongoDB: stock, and the notes on it.

A stock move is provisional until the order records the attempt that made it. Meanwhile the stock document carries a
note under the attempt's id that says what settling adds to `available` (take 0, give-back +n) and what reverting adds
(take +n, give-back 0). So no unit is promised twice, whatever dies between two writes; the sweep ends what is left.
"""

from datetime import datetime
from typing import Any

from core.batcher import Batcher, Duplicate, Write
from core.events import now
from core.store import answering

Document = dict[str, Any]


class Stock:
    """Units free to sell, by SKU. Methods raise StoreAway where the store does not answer in time."""

    def __init__(self, database: Any) -> None:
        self._stock = database["stock"]
        self._batch = Batcher(self._stock, lambda: self._stock.create_index("notes.at"))

    def get(self, sku: str) -> Document | None:
        """{"sku", "available"}, or None where there is no such SKU."""
        document = self._batch.do(read=[sku]).get(sku)
        return _view(document) if document else None

    def page(self, after: str | None, limit: int) -> list[Document]:
        """At most `limit` entries by SKU, beginning behind `after`."""
        with answering(self._batch):
            behind = {"_id": {"$gt": after}} if after else {}
            return [_view(document) for document in self._stock.find(behind).sort("_id", 1).limit(limit)]

    def put(self, sku: str, available: int) -> Document:
        """From now on `available` units are free to sell; what orders hold is not touched."""
        write = Write({"_id": sku}, {"$set": {"available": available}}, upsert=True)
        try:
            self._batch.do([write])
        except Duplicate:  # two first writes at once: the second is an update now
            self._batch.do([write])
        return {"sku": sku, "available": available}

    def fill(self, catalogue: dict[str, int]) -> None:
        """Insert SKUs that are missing; never over what is there."""
        missing = {sku: {"$setOnInsert": {"available": available}} for sku, available in catalogue.items()}
        self._batch.do([Write({"_id": sku}, change, upsert=True) for sku, change in missing.items()], seconds=10)

    # --- provisional moves: sent once. Were one repeated and settled, a lost copy could still arrive and make its note
    # anew; the note of an attempt that gave up is reverted by the sweep, whenever it appears.

    def take(self, note: str, order_id: str, lines: dict[str, int]) -> dict[str, str]:
        """Remove units where there are enough, each SKU for itself; gives {sku: why} for the others.

        why: `unknown_sku`, `out_of_stock`, or `in_doubt` where units that others hold provisionally may come back.
        """
        writes = [_take(sku, units, note, order_id) for sku, units in lines.items()]
        found = self._batch.do(writes, list(lines), seconds=10, once=True)
        reasons = {sku: _short(found.get(sku), note, units) for sku, units in lines.items()}
        return {sku: reason for sku, reason in reasons.items() if reason}

    def give(self, note: str, order_id: str, lines: dict[str, int]) -> None:
        """Note units that come back when the note is settled."""
        self._batch.do([_give(sku, units, note, order_id) for sku, units in lines.items()], seconds=10, once=True)

    def settle(self, note: str, moves: dict[str, int]) -> None:
        """Make moves ({sku: units}, negative: given back) final, when there is time; the sweep repairs a lost one."""
        self._batch.offer(*[_end(sku, note, max(0, -units)) for sku, units in moves.items()])

    def revert(self, note: str, moves: dict[str, int]) -> None:
        """Undo moves; when this returns they are undone."""
        self._batch.do([_end(sku, note, max(0, units)) for sku, units in moves.items()], seconds=10)

    def old_notes(self, before: datetime, limit: int) -> list[tuple[str, Document]]:
        """(sku, note) of notes made before a moment: their maker is dead, or slow enough to be ruled out."""
        with answering(self._batch):
            found = list(self._stock.find({"notes.at": {"$lt": before}}).limit(limit))
        return [(document["_id"], note) for document in found for note in document["notes"] if note["at"] < before]

    def end_note(self, sku: str, note: Document, settled: bool) -> None:
        """Settle or revert one note that is there."""
        self._batch.do([_end(sku, note["id"], note["settle" if settled else "revert"])], seconds=10)


def _view(document: Document) -> Document:
    return {"sku": document["_id"], "available": document["available"]}


def _take(sku: str, units: int, note: str, order_id: str) -> Write:
    free = {"_id": sku, "available": {"$gte": units}, "notes.id": {"$ne": note}}
    return Write(free, {"$inc": {"available": -units}, "$push": {"notes": _note(note, order_id, revert=units)}})


def _give(sku: str, units: int, note: str, order_id: str) -> Write:
    return Write({"_id": sku, "notes.id": {"$ne": note}}, {"$push": {"notes": _note(note, order_id, settle=units)}})


def _note(id: str, order_id: str, settle: int = 0, revert: int = 0) -> Document:
    return {"id": id, "order": order_id, "settle": settle, "revert": revert, "at": now()}


def _end(sku: str, note: str, units: int) -> Write:
    return Write({"_id": sku, "notes.id": note}, {"$inc": {"available": units}, "$pull": {"notes": {"id": note}}})


def _short(document: Document | None, note: str, units: int) -> str:
    if document is None:
        return "unknown_sku"
    notes = document.get("notes", [])
    if any(known["id"] == note for known in notes):
        return ""
    returning = sum(known["settle"] + known["revert"] for known in notes)
    return "in_doubt" if document["available"] + returning >= units else "out_of_stock"
