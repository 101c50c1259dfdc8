"""From the outbox to the bus: events are published once their order is stored, and cleared once they are confirmed."""

import logging
import time
from collections.abc import Collection, Sequence

from core.base import metrics
from core.base.ids import now
from core.bus.bus import Bus, Message, PublishOutcome
from core.order.events import Envelope, Event, message_body
from core.order.state_machine import OrderDocument
from core.order.view import view
from core.store.store import Store

log = logging.getLogger(__name__)
MEASURE_EVERY, MOST_COUNTED = 10.0, 10_000  # seconds; orders


class Outbox:
    """Publishes the events of orders. `subscribed` are the event types with a subscriber; None: nobody here knows."""

    def __init__(self, store: Store, bus: Bus, subscribed: Collection[str] | None = None) -> None:
        self._orders, self._open_orders = store.orders, store.open_orders
        self._bus, self._subscribed, self._measured = bus, subscribed, 0.0

    def publish_pending(self, order: OrderDocument, only: Sequence[Event] | None = None) -> None:
        """Hand the events in an order's outbox to the bus, or `only` these of them: another may be on its way from
        another process. Never blocks or raises; what is lost, the sweep finds.
        """
        ids = order["outbox"] if only is None else {event.id for event in only}.intersection(order["outbox"])
        for envelope in order["events"]:
            if envelope["id"] in ids:
                self.publish_one(order, envelope)

    def publish_one(self, order: OrderDocument, envelope: Envelope, handler: str = "") -> None:
        """Publish one event of an order: to its subscribers, or (again) to one handler only."""
        id, type, order_id = envelope["id"], envelope["type"], order["_id"]  # `published` keeps these, not the order
        fields = {"order": order_id, "event": id, "type": type}

        def published(outcome: PublishOutcome) -> None:
            if outcome != "unsent":
                metrics.EVENTS.labels(type, outcome).inc()
            if outcome != "confirmed":
                log.warning("an event was not taken; it waits in its outbox", extra=fields | {"outcome": outcome})
            elif not handler:
                self._orders.clear(order_id, id)
            if outcome == "unroutable" and self._subscribed is not None:  # we declared queues for it, and they are gone
                self._bus.rebuild()

        # An event without subscribers may go nowhere; any other that goes nowhere comes back and waits in the outbox.
        mandatory = bool(handler) or self._subscribed is None or type in self._subscribed
        try:
            body = message_body(envelope, view(order, progress=False))
        except Exception:  # one that cannot be written down must not stop the others
            log.exception("an event cannot be sent; it stays in its outbox", extra=fields)
            return
        metrics.EVENTS.labels(type, "published").inc()
        self._bus.publish(Message(id, type, body, handler, mandatory), published)

    def measure(self, mine: bool) -> None:
        """Show how much waits in all outboxes, every few seconds; zero where that is not `mine` to do."""
        if not mine:  # it is another's, and a number from when it was ours would stand for ever
            self._measured = 0.0
            self.show(0, 0)
        elif time.monotonic() > self._measured + MEASURE_EVERY:
            self._measured = time.monotonic()
            count, oldest = self._open_orders.outbox_size(MOST_COUNTED)
            self.show(count, max(0.0, (now() - oldest).total_seconds()) if oldest else 0)

    def show(self, count: float, age: float) -> None:
        """What the gauges say; not a number where nobody knows."""
        metrics.OUTBOX_EVENTS.set(count)
        metrics.OUTBOX_OLDEST.set(age)
