"""From the outbox to the bus: events are published once their order is stored, and cleared once they are confirmed."""

import logging
from collections.abc import Collection
from typing import Any

from core.bus import Bus, Message
from core.events import message_body
from core.store import Orders, view
from core.telemetry import EVENTS

log = logging.getLogger(__name__)


class Outbox:
    """Publishes what orders owe. `taken` is the event types some handler takes; None where nobody here knows."""

    def __init__(self, orders: Orders, bus: Bus, taken: Collection[str] | None = None) -> None:
        self._orders, self._bus, self._taken = orders, bus, taken

    def announce(self, document: dict[str, Any]) -> None:
        """Hand the events in an order's outbox to the bus. Never blocks; what gets lost here the sweep finds again."""
        for envelope in document["events"]:
            if envelope["id"] in document["outbox"]:
                self.send(document, envelope)

    def send(self, document: dict[str, Any], envelope: dict[str, Any], queue: str = "") -> None:
        """Send one event of an order: to whom it concerns, or into one queue only."""
        type, body = envelope["type"], message_body(envelope, view(document, timeline=False))
        # An event that no handler takes may go nowhere; any other that goes nowhere comes back and waits in the outbox.
        mandatory = bool(queue) or self._taken is None or type in self._taken
        message = Message(envelope["id"], type, body, queue=queue, mandatory=mandatory)
        EVENTS.labels(type, "published").inc()
        self._bus.publish(message, lambda outcome: self._published(document["_id"], envelope, outcome, bool(queue)))

    def _published(self, order_id: str, envelope: dict[str, Any], outcome: str, resent: bool) -> None:
        if outcome in ("confirmed", "returned"):
            EVENTS.labels(envelope["type"], outcome).inc()
        if outcome == "confirmed" and not resent:
            self._orders.clear(order_id, envelope["id"])
        elif outcome != "confirmed":
            about = {"order": order_id, "event": envelope["id"], "type": envelope["type"], "outcome": outcome}
            log.warning("an event was not taken; it waits in its outbox", extra=about)
