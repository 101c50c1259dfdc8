"""Orders and events for tests, a line each."""

import uuid
from typing import Any

from core.events import STATUS, Event, created_by_api, follow_up, message_body, new_order_id, new_traceparent, parse
from core.store import view


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


def place(orders, key: str | None = None, fingerprint: str = "as sent", **fields: Any) -> dict[str, Any]:
    """Store an order; gives its document."""
    order = an_order(**fields)
    return orders.create(order, api_event("order_created", order["id"]), key, fingerprint)[0]


def event_of(document: dict[str, Any], position: int = -1) -> Event:
    """An event the order announced, as a handler gets it."""
    return parse(message_body(document["events"][position], view(document, timeline=False)))


def answer(parent: Event, handler: str, type: str, **data: Any) -> Event:
    """A handler's answer, filled in as the consumer does."""
    return follow_up(parent, handler, 0, Event(type, **data), STATUS.get(type, parent.orderstatus))


def an_attempt() -> str:
    return uuid.uuid4().hex
