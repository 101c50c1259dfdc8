"""The sweep: finds orders that no message will ever set going again, and does.

The order is the truth, the broker a wake-up call. One process at a time sweeps, by a lease; a second would cost work,
not correctness.
"""

import logging
import threading
import uuid
from datetime import datetime, timedelta

from core.base.ids import now
from core.base.metrics import SWEEP_RESENT
from core.bus.bus import Bus
from core.flow.outbox import Outbox
from core.order.events import Envelope
from core.order.state_machine import OrderDocument, unfinished_steps
from core.store.connection import StoreUnavailable
from core.store.group_commit import Write
from core.store.orders import Orders
from core.store.stock import Stock

log = logging.getLogger(__name__)
BATCH = 200
CROWDED = 1000  # messages: in a queue with more, what seems to be missing is likely to be waiting
LEASE = 10.0  # seconds; how long nobody sweeps after a kill -9
OLD_MOVE = timedelta(seconds=60)


class Sweep(threading.Thread):
    """`subscribers` is {event type: handlers}. `forgetful`: the bus is in memory, empty at each start."""

    def __init__(
        self, orders: Orders, stock: Stock, bus: Bus, outbox: Outbox,
        subscribers: dict[str, list[str]], stop: threading.Event, forgetful: bool,
    ) -> None:  # fmt: skip
        super().__init__(name="sweep", daemon=True)
        self._orders, self._stock, self._bus, self._outbox = orders, stock, bus, outbox
        self._subscribers, self._stop_asked, self._forgetful = subscribers, stop, forgetful
        self._me = uuid.uuid4().hex

    def run(self) -> None:
        """Sweep each second, at once where there was more than a batch, until the stop."""
        while not self._stop_asked.is_set():
            looked_at = 0
            try:
                looked_at = self.round() if self._bus.consuming else 0  # before, its queues may not be there
            except StoreUnavailable as error:
                log.debug("no sweep", extra={"reason": str(error)})
            except Exception:
                log.exception("the sweep stumbled; it goes on with the next round")
            if looked_at < BATCH:
                self._stop_asked.wait(1)

    def round(self) -> int:
        """Look at what is due; gives how many orders that were."""
        if not self._orders.take_lease("sweep", self._me, LEASE):
            self._outbox.measure(mine=False)
            return 0
        if self._forgetful:  # whatever was in hand died with the process before
            self._orders.wake_all()
            self._end_moves(now())
            self._forgetful = False
        due = self._orders.due(BATCH, now())
        self._orders.write([self._look_at(order) for order in due])
        self._end_moves(now() - OLD_MOVE)
        self._outbox.measure(mine=True)
        return len(due)

    def _look_at(self, order: OrderDocument) -> Write:
        """Publish what waits, send again what is unfinished for long; gives the write that says when to look next.

        `sweeps` counts the waiting times that have passed since the order was touched. Where nobody swept while several
        passed, it is sent once. An order with nothing but a parked step only counts on.
        """
        unfinished = unfinished_steps(order, self._subscribers)
        if not order["outbox"] and not unfinished and not order["parked"]:
            return self._orders.look_again(order, due=None)
        self._outbox.publish_pending(order)
        sweeps, moment = order["sweeps"], now()
        if moment >= order["touched"] + patience(sweeps) and self._send_again(order, unfinished):
            while order["touched"] + patience(sweeps) <= moment:
                sweeps += 1
        due = order["touched"] + patience(sweeps)
        if order["outbox"] or due <= moment:  # as it was read, before the publishing above: see then what is left
            due = moment + timedelta(seconds=10)
        return self._orders.look_again(order, due, sweeps)

    def _send_again(self, order: OrderDocument, unfinished: list[tuple[str, Envelope]]) -> bool:
        """Send unfinished steps' events to the handlers that miss them; False where all their queues are crowded."""
        helped = [(name, event) for name, event in unfinished if self._bus.depths.get(name, 0) <= CROWDED]
        for handler, envelope in helped:
            if envelope["id"] not in order["outbox"]:
                SWEEP_RESENT.labels(handler).inc()
                log.info("sent again", extra={"order": order["_id"], "event": envelope["id"], "handler": handler})
                self._outbox.publish_one(order, envelope, handler)
        return not unfinished or bool(helped)

    def _end_moves(self, before: datetime) -> None:
        for sku, move in self._stock.old_moves(before, BATCH):
            # Fence the attempt by a write: its process may only be paused, and must not be recorded when it wakes up.
            order = self._orders.fence(move["order"], attempt=move["id"].split(".")[0])
            recorded = [made["move"] for step in order["steps"] for made in step["moves"]] if order else []
            committed = move["id"] in recorded
            (self._stock.commit if committed else self._stock.roll_back)(move["id"], {sku: move["units"]})
            log.info("ended an old move", extra={"order": move["order"], "sku": sku, "committed": committed})


def patience(sweeps: int) -> timedelta:
    """How long an order goes untouched before its unfinished steps are sent again, after so many times.

    1, 2, 4, 8, 16, 32 minutes, then 30 more each time.
    """
    return timedelta(minutes=2 ** min(sweeps, 5) + 30 * max(0, sweeps - 5))
