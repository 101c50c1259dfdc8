"""The sweep: finds what no message will ever move again, and moves it.

The order is the truth, the broker a wake-up call. One process at a time sweeps, by a lease; a second would cost work,
not correctness.
"""

import logging
import threading
import time
import uuid
from datetime import datetime, timedelta

from core.bus import Bus, main_queue
from core.events import now
from core.outbox import Outbox
from core.stock import Document, Stock
from core.store import Orders, StoreAway, Write, owed
from core.telemetry import OUTBOX_EVENTS, OUTBOX_OLDEST, SWEEP_RESENT

log = logging.getLogger(__name__)
BATCH = 200
FULL_QUEUE = 1000  # a queue with more than this needs no help
LEASE = 10.0  # seconds; how long nobody sweeps after a kill -9
OLD_NOTE = timedelta(seconds=60)


class Sweep(threading.Thread):
    """`takers` is {event type: handlers}. `forgetful` says that the bus starts empty at each start of the process."""

    def __init__(
        self, orders: Orders, stock: Stock, bus: Bus, outbox: Outbox,
        takers: dict[str, list[str]], stop: threading.Event, forgetful: bool,
    ) -> None:  # fmt: skip
        super().__init__(name="sweep", daemon=True)
        self._orders, self._stock, self._bus, self._outbox = orders, stock, bus, outbox
        self._takers, self._stopped, self._forgetful = takers, stop, forgetful
        self._me, self._measured = uuid.uuid4().hex, 0.0

    def run(self) -> None:
        while not self._stopped.is_set():
            found = 0
            try:
                found = self.round() if self._bus.consuming else 0
            except StoreAway as error:
                log.debug("no sweep", extra={"reason": str(error)})
            except Exception:
                log.exception("the sweep stumbled; it goes on with the next round")
            if found < BATCH:
                self._stopped.wait(1)

    def round(self) -> int:
        """Look at what is due; gives how many orders that were."""
        if not self._orders.take_lease("sweep", self._me, LEASE):
            OUTBOX_EVENTS.set(0)  # the holder measures; a number from when that was us would stand for ever
            OUTBOX_OLDEST.set(0)
            return 0
        if self._forgetful:  # whatever was in hand died with the process before
            self._orders.wake_all()
            self._end_notes(now())
            self._forgetful = False
        documents = self._orders.due(BATCH, now())
        self._orders.write([self._look_at(document) for document in documents])
        self._end_notes(now() - OLD_NOTE)
        self._measure()
        return len(documents)

    def _look_at(self, document: Document) -> Write:
        waiting, debts = document["outbox"], owed(document, self._takers)
        if not waiting and not debts and not document["parked"]:
            return self._orders.close(document)
        self._outbox.announce(document)
        sweeps, moment = document["sweeps"], now()
        if moment >= document["touched"] + patience(sweeps) and self._resend(document, debts):
            while document["touched"] + patience(sweeps) <= moment:  # many at once, after a time in which nobody swept
                sweeps += 1
        due = document["touched"] + patience(sweeps)
        if waiting or due <= moment:
            due = moment + timedelta(seconds=10)
        return self._orders.look_again(document, due, sweeps)

    def _resend(self, document: Document, debts: list[tuple[str, Document]]) -> bool:
        room = [debt for debt in debts if self._bus.depths.get(main_queue(debt[0]), 0) <= FULL_QUEUE]
        for handler, envelope in room:
            if envelope["id"] not in document["outbox"]:
                SWEEP_RESENT.labels(handler).inc()
                log.info("sent again", extra={"order": document["_id"], "event": envelope["id"], "handler": handler})
                self._outbox.send(document, envelope, main_queue(handler))
        return bool(room or not debts)

    def _end_notes(self, before: datetime) -> None:
        for sku, note in self._stock.old_notes(before, BATCH):
            # Rule the attempt out by a write: its process may only be paused, and must not win when it wakes up.
            document = self._orders.void(note["order"], note["id"].split(".")[0])
            moves = [move for step in document["steps"] for move in step["moves"]] if document else []
            settled = any(move["note"] == note["id"] for move in moves)
            self._stock.end_note(sku, note, settled)
            log.info("ended an old note", extra={"order": note["order"], "sku": sku, "settled": settled})

    def _measure(self) -> None:
        if time.monotonic() > self._measured + 10:
            self._measured = time.monotonic()
            count, oldest = self._orders.outbox_size()
            OUTBOX_EVENTS.set(count)
            OUTBOX_OLDEST.set(max(0.0, (now() - oldest).total_seconds()) if oldest else 0)


def patience(sweeps: int) -> timedelta:
    """How long an order goes untouched before what it owes is sent again: 60 s, doubling to every 30 min."""
    return timedelta(seconds=60 * 2**sweeps if sweeps <= 5 else 1920 + 1800 * (sweeps - 5))
