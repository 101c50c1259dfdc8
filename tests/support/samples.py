"""Orders, events and a handler's answers for tests, a line each."""

import uuid
from typing import Any

from core.bus import Bus
from core.events import STATUS, Event, created_by_api, follow_up, message_body, new_order_id, new_traceparent, parse
from core.outbox import Outbox
from core.store import Orders, view

LABEL = {"carrier": "post", "trackingNumber": "T-1"}
ADDRESS = {"name": "Ada", "line1": "1 Main St", "city": "London", "postalCode": "N1", "country": "GB"}


def an_order(quantity: int = 2, sku: str = "A1", **fields: Any) -> dict[str, Any]:
    """What the API hands to the store; prices are in cents."""
    return {
        "id": new_order_id(),
        "owner": "shop",
        "customerId": "ada",
        "currency": "USD",
        "email": "ada@example.com",
        "items": [{"sku": sku, "quantity": quantity, "price": 1999}],
        "total": 1999 * quantity,
        **fields,
    }


def api_event(type: str, order_id: str) -> Event:
    return created_by_api(type, order_id, new_traceparent())


def place(
    orders: Orders, bus: Bus | None = None, *, key: str | None = None, fingerprint: str = "as sent", **fields: Any
) -> dict[str, Any]:
    """Store an order as the API does, announce it where a bus is given, and give its document."""
    order = an_order(**fields)
    document, _ = orders.create(order, api_event("order_created", order["id"]), key, fingerprint)
    if bus:
        Outbox(orders, bus).announce(document)
    return document


def body_of(document: dict[str, Any], position: int = -1) -> bytes:
    """An event the order announced, as it travels."""
    return message_body(document["events"][position], view(document, timeline=False))


def event_of(document: dict[str, Any], position: int = -1) -> Event:
    """An event the order announced, as a handler gets it."""
    return parse(body_of(document, position))


def answer(parent: Event, handler: str, type: str, **data: Any) -> Event:
    """A handler's answer, filled in as the consumer does."""
    return follow_up(parent, handler, 0, Event(type, **data), STATUS.get(type, parent.orderstatus))


def an_attempt() -> str:
    return uuid.uuid4().hex
