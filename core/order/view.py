"""The order as the API shows it."""

from datetime import datetime
from typing import Any

from core.base.ids import rfc3339
from core.order.money import from_minor
from core.order.state_machine import Line, OrderDocument

SHOWN = (  # in this order
    "id", "status", "customerId", "email", "currency", "items", "total", "shippingAddress", "createdAt", "updatedAt",
    "failureReason", "shipment", "parked", "timeline",
)  # fmt: skip


def view(order: OrderDocument, timeline: bool = True) -> dict[str, Any]:
    """What everybody may see of it, with amounts in the currency's unit and times in RFC 3339."""
    currency = order["currency"]
    shown = dict(order) | {
        "id": order["_id"],
        "items": [item | {"price": from_minor(item["price"], currency)} for item in order["items"]],
        "total": from_minor(order["total"], currency),
        "createdAt": rfc3339(order["createdAt"]),
        "updatedAt": rfc3339(order["updatedAt"]),
        "parked": sorted({step.split("/")[0] for step in order["parked"]}),
        "timeline": [_line(line) for line in order["timeline"]] if timeline else [],
    }
    return {name: shown[name] for name in SHOWN if shown.get(name) not in (None, [])}


def _line(line: Line) -> Line:
    return {k: rfc3339(v) if isinstance(v, datetime) else v for k, v in line.items() if k != "attempt"}
