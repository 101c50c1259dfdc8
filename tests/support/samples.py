"""Orders, events and a handler's answers for tests, a line each."""

import uuid
from collections.abc import Sequence
from typing import Any

from core.base.ids import new_order_id, new_traceparent
from core.bus.bus import Bus
from core.flow.outbox import Outbox
from core.order.answers import follow_up
from core.order.events import Event, make_event, message_body, parse
from core.order.state_machine import TRANSITIONS, Line, Move, Step, step_name
from core.order.view import view
from core.store.orders import Orders
from core.store.store import Store

LABEL = {"carrier": "post", "trackingNumber": "T-1"}
ADDRESS = {"name": "Ada", "line1": "1 Main St", "city": "London", "postalCode": "N1", "country": "GB"}


def an_order(quantity: int = 2, sku: str = "A1", **fields: Any) -> dict[str, Any]:
    """What the API hands to the store; prices are in cents."""
    return {
        "_id": new_order_id(),
        "owner": "shop",
        "customerId": "ada",
        "currency": "USD",
        "email": "ada@example.com",
        "items": [{"sku": sku, "quantity": quantity, "price": 1999}],
        "total": 1999 * quantity,
        **fields,
    }


def api_event(type: str, order_id: str, traceparent: str = "", id: str = "") -> Event:
    """An event of the API."""
    return make_event(
        type, {}, id=id or str(uuid.uuid4()), source="/orderproc/api", subject=order_id,
        orderstatus=TRANSITIONS[type].leaves, traceparent=new_traceparent(traceparent),
    )  # fmt: skip


def stored_order(orders: Orders, key: str | None = None, fingerprint: str = "as sent", **fields: Any) -> dict[str, Any]:
    """The document of a new order."""
    order = an_order(**fields)
    document: Any = orders.create(order, api_event("order_created", order["_id"]), key, fingerprint)
    return document


def place(
    store: Store, bus: Bus | None = None, *, key: str | None = None, fingerprint: str = "as sent", **fields: Any
) -> dict[str, Any]:
    """Store an order as the API does, publish its event where a bus is given, and give its document."""
    document = stored_order(store.orders, key, fingerprint, **fields)
    if bus:
        Outbox(store, bus).publish_pending(document)
    return document


def body_of(document: dict[str, Any], position: int = -1) -> bytes:
    """An event of the order, as it travels."""
    return message_body(document["events"][position], view(document, progress=False))


def event_of(document: dict[str, Any], position: int = -1) -> Event:
    """An event of the order, as a handler gets it."""
    return parse(body_of(document, position))


def answer(parent: Event, handler: str, type: str, **data: Any) -> Event:
    """A handler's answer, filled in as the consumer does."""
    status = TRANSITIONS[type].leaves if type in TRANSITIONS else parent.orderstatus
    return follow_up(parent, handler, 0, Event(type, **data), status)


def an_attempt() -> str:
    return uuid.uuid4().hex


def a_step(handler: str, event: Event, attempt: str | None = None, moves: Sequence[Move] = ()) -> Step:
    """A handler's work on an event, as it is recorded."""
    return Step(step=step_name(handler, event.id), attempt=attempt or an_attempt(), moves=list(moves), ms=3)


def a_reason(tries: int = 1, error: str = "TimeoutError") -> Line:
    """Why a try failed, as the timeline tells it."""
    return {"try": tries, "error": error, "where": "services.py:96"}
