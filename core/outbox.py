"""From the outbox to the bus: events are published once their order is stored, and cleared once they are confirmed."""

import logging
from collections.abc import Collection, Sequence
from typing import Any

from core.bus import Bus, Message
from core.events import Event, message_body
from core.store import Orders, view
from core.telemetry import EVENTS

log = logging.getLogger(__name__)


class Outbox:
    """Publishes what orders owe. `taken` is the event types some handler takes; None where nobody here knows."""

    def __init__(self, orders: Orders, bus: Bus, taken: Collection[str] | None = None) -> None:
        self._orders, self._bus, self._taken = orders, bus, taken

    def announce(self, document: dict[str, Any], only: Sequence[Event] | None = None) -> None:
        """Hand the events in an order's outbox to the bus, or `only` these of them: another may be on its way from
        another process. Never blocks or raises; what is lost, the sweep finds.
        """
        wanted = document["outbox"] if only is None else {event.id for event in only}.intersection(document["outbox"])
        for envelope in document["events"]:
            if envelope["id"] in wanted:
                self.send(document, envelope)

    def send(self, document: dict[str, Any], envelope: dict[str, Any], queue: str = "") -> None:
        """Send one event of an order: to whom it concerns, or (again) into one queue only."""
        id, type = envelope["id"], envelope["type"]
        about = {"order": document["_id"], "event": id, "type": type}

        def published(outcome: str) -> None:
            if outcome in ("confirmed", "returned"):
                EVENTS.labels(type, outcome).inc()
            if outcome != "confirmed":
                log.warning("an event was not taken; it waits in its outbox", extra=about | {"outcome": outcome})
            elif not queue:
                self._orders.clear(document["_id"], id)
            if outcome == "returned" and self._taken is not None:  # we declared queues for it, and they are gone
                self._bus.rebuild()

        # An event that no handler takes may go nowhere; any other that goes nowhere comes back and waits in the outbox.
        mandatory = bool(queue) or self._taken is None or type in self._taken
        try:
            body = message_body(envelope, view(document, timeline=False))
        except Exception:  # one that cannot be written down must not stop the others
            log.exception("an event cannot be sent; it stays in its outbox", extra=about)
            return
        EVENTS.labels(type, "published").inc()
        self._bus.publish(Message(id, type, body, queue=queue, mandatory=mandatory), published)
