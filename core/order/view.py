"""The order as the API shows it."""

from datetime import datetime
from typing import Any

from core.base.ids import rfc3339
from core.order.money import from_minor
from core.order.state_machine import Line, OrderDocument

SHOWN = (  # in this order
    "id", "status", "customerId", "email", "currency", "items", "total", "shippingAddress", "createdAt", "updatedAt",
    "failureReason", "shipment", "parked", "outbox", "timeline",
)  # fmt: skip


def view(order: OrderDocument, progress: bool = True) -> dict[str, Any]:
    """What everybody may see of it, with amounts in the currency's unit and times in RFC 3339.

    Events carry it without its `progress`: timeline, outbox, and what is parked.
    """
    currency = order["currency"]
    shown = dict(order) | {
        "id": order["_id"],
        "items": [item | {"price": from_minor(item["price"], currency)} for item in order["items"]],
        "total": from_minor(order["total"], currency),
        "createdAt": rfc3339(order["createdAt"]),
        "updatedAt": rfc3339(order["updatedAt"]),
        "parked": sorted({step.split("/")[0] for step in order["parked"]}),
        "outbox": [event["type"] for event in order["events"] if event["id"] in order["outbox"]],
        "timeline": [_line(line) for line in order["timeline"]],
    }
    names = SHOWN if progress else SHOWN[: SHOWN.index("parked")]
    return {name: shown[name] for name in names if shown.get(name) not in (None, [])}


def _line(line: Line) -> Line:
    shown = {name: value for name, value in line.items() if name != "attempt" and value not in ("", None)}
    return {name: rfc3339(value) if isinstance(value, datetime) else value for name, value in shown.items()}
