"""MongoDB: the pending moves on stock (Try-Confirm/Cancel).

A move is pending until the order records the attempt that made it. Meanwhile the stock document has an entry with the
move's id and its units, negative where they are given back. What is added to `available`:

               at once    committed    rolled back
    take 3       -3           0            +3
    give back 3   0          +3             0

So no unit is promised twice, whatever dies between two writes; the sweep ends what is left.
"""

from typing import Any

from core.store.connection import Write
from core.store.group_commit import GroupCommit

PENDING = {"id": str, "order": str, "units": int, "mark": int}  # the fields of a pending move
UNMARKED = 0  # what a pending move carries until the sweep has seen it


class Moves:
    """Units on their way, by SKU. Methods raise StoreUnavailable where the store does not answer in time."""

    def __init__(self, bulk: GroupCommit) -> None:
        self._bulk = bulk

    # A move is begun once. `moves.id != move` stops a repeat only while the entry is there, and committing removes it:
    # a first copy, late in a slow server, would take the units again, and the sweep would commit that too. So where the
    # store does not reply the attempt gives up, and the sweep rolls back what appears.

    def take(self, move: str, order_id: str, lines: dict[str, int]) -> dict[str, str]:
        """Remove units where there are enough, each SKU for itself; gives {sku: why} for the others.

        All lines or none is what `StockMoves.take` makes of it: it rolls the move back where one line is short.
        why: `unknown_sku`, `out_of_stock`, or `in_doubt` where pending moves of others may bring units back.
        """
        writes = [_begin(sku, move, order_id, units) for sku, units in lines.items()]
        documents = self._bulk.do(writes, list(lines), once=True)
        reasons = {sku: _shortage(documents.get(sku), move, units) for sku, units in lines.items()}
        return {sku: reason for sku, reason in reasons.items() if reason}

    def give_back(self, move: str, order_id: str, lines: dict[str, int]) -> None:
        """Enter {sku: units}, negative, that come back when the move is committed."""
        self._bulk.do([_begin(sku, move, order_id, units) for sku, units in lines.items()], once=True)

    def commit(self, move: str, lines: dict[str, int]) -> None:
        """Make {sku: units} (negative: given back) final, soon; the sweep repairs what a crash leaves."""
        self._bulk.offer(*[_end(sku, move, max(0, -units)) for sku, units in lines.items()])

    def roll_back(self, move: str, lines: dict[str, int]) -> None:
        """Undo {sku: units}; when this returns they are undone."""
        self._bulk.do([_end(sku, move, max(0, units)) for sku, units in lines.items()])

    def pending(self, mark: int, limit: int) -> list[tuple[str, dict[str, Any]]]:
        """(sku, entry) of at most `limit` pending moves that have no mark yet, or one up to `mark`."""
        with self._bulk.reading() as stock:
            documents = list(stock.find({"moves.mark": {"$lte": mark}}).limit(limit))
        moves = [(document["_id"], move) for document in documents for move in document["moves"]]
        return [(sku, move) for sku, move in moves if _is_ours(move) and move["mark"] <= mark][:limit]

    def mark(self, moves: list[tuple[str, dict[str, Any]]], mark: int) -> None:
        """Mark pending moves that have no mark."""
        self._bulk.do_each([_mark(sku, move["id"], mark) for sku, move in moves])

    def end(self, moves: list[tuple[str, dict[str, Any], bool]]) -> None:
        """Commit pending moves, or roll them back: (sku, entry, whether to commit)."""
        self._bulk.do_each(
            [_end(sku, move["id"], max(0, -move["units"] if commit else move["units"])) for sku, move, commit in moves]
        )


def _is_ours(move: Any) -> bool:
    return isinstance(move, dict) and all(isinstance(move.get(name), kind) for name, kind in PENDING.items())


def _begin(sku: str, move: str, order_id: str, units: int) -> Write:
    pending = {"id": move, "order": order_id, "units": units, "mark": UNMARKED}
    taken = max(0, units)
    enough = {"_id": sku, "available": {"$gte": taken}, "moves.id": {"$ne": move}}
    return Write(enough, {"$inc": {"available": -taken}, "$push": {"moves": pending}})


def _mark(sku: str, move: str, mark: int) -> Write:
    unmarked = {"_id": sku, "moves": {"$elemMatch": {"id": move, "mark": UNMARKED}}}
    return Write(unmarked, {"$set": {"moves.$.mark": mark}})


def _end(sku: str, move: str, units: int) -> Write:
    return Write({"_id": sku, "moves.id": move}, {"$inc": {"available": units}, "$pull": {"moves": {"id": move}}})


def _shortage(document: dict[str, Any] | None, move: str, units: int) -> str:
    if document is None:
        return "unknown_sku"
    pending = [each for each in document.get("moves", []) if _is_ours(each)]
    if any(other["id"] == move for other in pending):
        return ""
    # A take if rolled back, a give-back if committed; what this attempt itself holds does not come back to it.
    others = [other for other in pending if other["id"].partition(".")[0] != move.partition(".")[0]]
    coming_back = sum(abs(other["units"]) for other in others)
    return "in_doubt" if document["available"] + coming_back >= units else "out_of_stock"
