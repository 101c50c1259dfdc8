"""MongoDB: stock, as it is set and shown."""

from collections.abc import Callable
from typing import Any

from core.store.connection import DocumentExists, KeyReused, Write
from core.store.group_commit import GroupCommit


class PreconditionFailed(Exception):
    """What the caller needs of the entry does not hold."""


class Stock:
    """Units free to sell, by SKU. Methods raise StoreUnavailable where the store does not answer in time."""

    def __init__(self, bulk: GroupCommit) -> None:
        self._bulk = bulk

    def get(self, sku: str) -> dict[str, Any] | None:
        """{"sku", "available"}, or None where there is no such SKU."""
        document = self._bulk.do(read=[sku]).get(sku)
        return _view(document) if document else None

    def page(self, after: str | None, limit: int) -> list[dict[str, Any]]:
        """At most `limit` entries by SKU, beginning behind `after`."""
        with self._bulk.reading() as stock:
            found = stock.find({"_id": {"$gt": after or ""}}).sort("_id", 1).limit(limit)
            return [_view(document) for document in found]

    def put(
        self, sku: str, available: int, request: str, needs: Callable[[dict[str, Any] | None], bool] | None = None
    ) -> tuple[dict[str, Any], bool]:
        """From now on `available` units are free to sell; what orders hold is not touched. Gives (entry, is it new).

        `needs` is asked with the entry as it is before; raises PreconditionFailed where it says no. `request` names
        the call: that of the last put changes nothing when it comes again. Raises KeyReused where it asks for another
        number. Sent once, and needs the revision that was read, so a late copy of an earlier put changes nothing.
        """
        while True:
            document = self._bulk.do(read=[sku]).get(sku)
            if document and _request(document) == request:
                if document["put"]["available"] != available:
                    raise KeyReused("this Idempotency-Key was used with another body")
                return _view(document), False
            if needs and not needs(_view(document) if document else None):
                raise PreconditionFailed("the entry is not what If-Match or If-None-Match asks for")
            write = _put(sku, document, {"id": request, "available": available}, bool(needs))
            try:
                after = self._bulk.do([write], [sku], once=True).get(sku, {})
            except DocumentExists:
                continue  # another was first, as it was where `after` has another's id
            if _request(after) == request:
                return _view(after), document is None

    def fill(self, catalogue: dict[str, int]) -> None:
        """Insert SKUs that are missing; never over what is there."""
        missing = {sku: {"$setOnInsert": {"available": available}} for sku, available in catalogue.items()}
        self._bulk.do([Write({"_id": sku}, change, upsert=True) for sku, change in missing.items()])


def _request(document: dict[str, Any]) -> str:
    """Of the last put; empty where there was none."""
    return str(document.get("put", {}).get("id", ""))


def _view(document: dict[str, Any]) -> dict[str, Any]:
    return {"sku": document["_id"], "available": document["available"]}


def _put(sku: str, document: dict[str, Any] | None, put: dict[str, Any], as_it_is: bool) -> Write:
    fields = {"available": put["available"], "put": put}
    if document is None:
        return Write(None, {"_id": sku, "rev": 1, **fields})
    needs = {"_id": sku, "rev": document.get("rev")} | ({"available": document["available"]} if as_it_is else {})
    return Write(needs, {"$set": fields, "$inc": {"rev": 1}})
