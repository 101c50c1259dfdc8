"""MongoDB: what is in one database, its indexes, and whether it can be worked with."""

import threading
import time
from contextlib import suppress
from typing import Any

from pymongo import IndexModel

from core.base.ids import now
from core.store.connection import DocumentExists, DocumentRefused, StoreUnavailable, Write, make_indexes, within
from core.store.consumers import Lease, Reports
from core.store.group_commit import GroupCommit
from core.store.moves import Moves
from core.store.open_orders import OpenOrders
from core.store.orders import Orders
from core.store.stock import Stock

PING_WITHIN, PING_EVERY = 2.5, 1.0  # seconds
# The first is what makes an Idempotency-Key safe, so `Orders.create` waits for it. A sparse index has no entry for what
# is not due or has nothing in its outbox, so it stays small; a query that uses it says that the field is there.
OF_ORDERS = (
    IndexModel("requestKey", unique=True),
    IndexModel("due", name="due_sparse", sparse=True),
    IndexModel("outboxSince", sparse=True),
    *(IndexModel([*((field, 1) for field in fields), ("_id", -1)]) for fields in (
        ["owner"], ["status"], ["customerId"], ["owner", "status"], ["owner", "customerId"]
    )),
)  # fmt: skip
OF_STOCK = IndexModel("moves.mark")


class Store:
    """The orders, the stock and what consumers tell, in one database."""

    def __init__(self, database: Any) -> None:
        self._orders, self._leases = GroupCommit(database["orders"]), GroupCommit(database["leases"])
        stock = GroupCommit(database["stock"])
        self.orders = Orders(self._orders, make_indexes(database["orders"], *OF_ORDERS))
        make_indexes(database["stock"], OF_STOCK)
        self.open_orders, self.lease = OpenOrders(self._orders), Lease(self._leases)
        self.stock, self.moves, self.reports = Stock(stock), Moves(stock), Reports(GroupCommit(database["handlers"]))
        self._lock, self._pinged, self._works = threading.Lock(), -PING_EVERY, False

    def ping(self) -> bool:
        """Whether it reads and writes, known within 3 s, and asked at most once a second: probes come in crowds."""
        with self._lock:
            if time.monotonic() > self._pinged + PING_EVERY:
                self._works = self._try()
                self._pinged = time.monotonic()
            return self._works

    def _try(self) -> bool:
        try:
            with within(PING_WITHIN):
                self._orders.do([Write({"_id": "-"}, {"$set": {"rev": 0}})], ["-"])  # matches nothing
                with suppress(DocumentExists):  # two processes were the first at once
                    self._leases.do([Write({"_id": "ping"}, {"$set": {"at": now()}}, upsert=True)])
            return True
        except (StoreUnavailable, DocumentRefused):
            return False
