"""The sweep: finds orders that no message will ever set going again, and does.

The order is the truth, the broker a wake-up call. One process at a time sweeps, by a lease; a second would cost work,
not correctness. Nothing in here is one statement or one list over all orders: what is to be done is found by an index
and done in batches.
"""

import logging
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from core.base.ids import now
from core.base.metrics import SWEEP_RESENT
from core.bus.bus import Bus
from core.flow.outbox import Outbox
from core.order.state_machine import OrderDocument, step_name, unfinished_steps
from core.store.connection import StoreUnavailable, Write
from core.store.moves import UNMARKED
from core.store.open_orders import Resends
from core.store.store import Store

log = logging.getLogger(__name__)
BATCH = 200
CROWDED = 1000  # messages: in a queue with more, what seems to be missing is likely to be waiting
LONG_AGO, OLD = -1, 60  # beats of the lease, a second each or more: an attempt with moves pending for so long is fenced
OUTBOX_AGAIN, LONGEST_WAIT = timedelta(seconds=10), timedelta(minutes=30)  # between looks


class Sweep(threading.Thread):
    """`subscribers` is {event type: handlers}. `forgetful`: the bus is in memory, empty at each start."""

    def __init__(
        self, store: Store, bus: Bus, outbox: Outbox, subscribers: dict[str, list[str]], stop: threading.Event,
        forgetful: bool,
    ) -> None:  # fmt: skip
        super().__init__(name="sweep", daemon=True)
        self._open_orders, self._moves, self._lease = store.open_orders, store.moves, store.lease
        self._bus, self._outbox, self._subscribers, self._stop_asked = bus, outbox, subscribers, stop
        self._forgetful, self._began = forgetful, now()

    def run(self) -> None:
        """Sweep each second, at once where there was more than a batch, until the stop."""
        if self._forgetful:  # what is pending before the first delivery is of the process before
            with suppress(StoreUnavailable):
                self._moves.mark(self._moves.pending(UNMARKED, BATCH), LONG_AGO)
        while not self._stop_asked.is_set():
            looked_at = 0
            try:
                looked_at = self.round() if self._bus.consuming else 0  # before, its queues may not be there
            except StoreUnavailable as error:
                log.debug("no sweep", extra={"reason": str(error)})
                self._outbox.show(math.nan, math.nan)
            except Exception:
                log.exception("the sweep stumbled; it goes on with the next round")
            if looked_at < BATCH or self._crowded(*self._bus.depths):
                self._stop_asked.wait(1)
        with suppress(StoreUnavailable):
            self._lease.free()

    def round(self) -> int:
        """Look at what is due; gives how many orders that were."""
        beat = self._lease.beat()
        if not beat:
            self._outbox.measure(mine=False)
            return 0
        if self._forgetful:  # whatever was in hand died with the process before
            self._forgetful = self._open_orders.wake(BATCH, self._began) == BATCH
        due = self._open_orders.due(BATCH, now())
        self._look_at(due)
        self._end_moves(beat)
        self._outbox.measure(mine=True)
        return len(due)

    # --- orders

    def _look_at(self, orders: list[OrderDocument]) -> None:
        later = now() + LONGEST_WAIT  # for one that cannot be read
        looks: list[tuple[Write, Resends]] = [
            safely(self._look, order) or (self._open_orders.look_again(order, later), []) for order in orders
        ]
        # First, so that nothing is sent each second where the store takes no writes.
        written = self._open_orders.write([write for write, _ in looks])
        for order, (_, resend), document in zip(orders, looks, written, strict=True):
            if document is not None:
                safely(self._send, order, resend)

    def _look(self, order: OrderDocument) -> tuple[Write, Resends]:
        """The write that says when to look next, and what is unfinished for so long that it is sent again.

        `sweeps` counts the waiting times that have passed since the order was touched. Where nobody swept while several
        passed, it is sent once. An order with nothing but a parked step only counts on.
        """
        unfinished, moment, sweeps = unfinished_steps(order, self._subscribers), now(), order["sweeps"]
        if not order["outbox"] and not unfinished and not order["parked"]:
            return self._open_orders.look_again(order, due=None), []
        order["touched"] = min(order["touched"], moment + LONGEST_WAIT)  # later is a wrong clock, or a very long retry
        due, redriven = order["touched"] + patience(sweeps), order.get("redriven", [])
        resend = [(name, event) for name, event in unfinished if step_name(name, event["id"]) in redriven]
        if due <= moment:
            resend += [step for step in unfinished if step not in resend and not self._crowded(step[0])]
            if unfinished and not resend:  # a guess: a thousand messages go in a minute
                due = moment + timedelta(minutes=max(self._bus.depths.values()) / CROWDED)
            while due <= moment:
                sweeps += 1
                due = order["touched"] + patience(sweeps)
        if order["outbox"]:  # as it was read, before the publishing that follows: see then what is left
            due = moment + OUTBOX_AGAIN
        return self._open_orders.look_again(order, min(due, moment + LONGEST_WAIT), sweeps, resend), resend

    def _send(self, order: OrderDocument, resend: Resends) -> None:
        self._outbox.publish_pending(order)
        for handler, envelope in resend:
            if envelope["id"] not in order["outbox"]:
                SWEEP_RESENT.labels(handler).inc()
                log.info("sent again", extra={"order": order["_id"], "event": envelope["id"], "handler": handler})
                self._outbox.publish_one(order, envelope, handler)

    def _crowded(self, *names: str) -> bool:
        return any(self._bus.depths.get(name, 0) > CROWDED for name in names)

    # --- pending moves

    def _end_moves(self, beat: int) -> None:
        """Mark with the beat what is new, and end what was marked long ago."""
        moves = self._moves.pending(max(UNMARKED, beat - OLD), BATCH)
        self._moves.mark([(sku, move) for sku, move in moves if move["mark"] == UNMARKED], beat)
        old = [(sku, move) for sku, move in moves if move["mark"] != UNMARKED]
        # Fence the attempts by a write: a process may only be paused, and must not be recorded when it wakes up.
        orders = self._open_orders.fence([(move["order"], move["id"].split(".")[0]) for _, move in old])
        recorded = [order and safely(_moves_of, order) for order in orders]  # None: it cannot be read or written
        ends = [(*pair, pair[1]["id"] in moves) for pair, moves in zip(old, recorded, strict=True) if moves is not None]
        for sku, move, committed in ends:
            log.info("ended an old move", extra={"order": move["order"], "sku": sku, "committed": committed})
        self._moves.end(ends)


def _moves_of(order: OrderDocument) -> list[str]:
    return [made["move"] for step in order["steps"] for made in step["moves"]]


def safely(function: Callable[..., Any], document: Any, *args: Any) -> Any:
    """What it gives; None where it raises: who edited that document must not stop all others."""
    try:
        return function(document, *args)
    except Exception:
        log.exception("a document cannot be read; it is passed over", extra={"document": document.get("_id")})
        return None


def patience(sweeps: int) -> timedelta:
    """How long an order goes untouched before its unfinished steps are sent again, after so many times.

    1, 2, 4, 8, 16, 32 minutes, then 30 more each time.
    """
    return timedelta(minutes=2 ** min(sweeps, 5) + 30 * max(0, sweeps - 5))
