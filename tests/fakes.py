"""What a handler's test needs: an event, and services with stock in a dict, recorded `invoke` calls and a log.

def test_points_are_awarded():
    order_confirmed(event("order_confirmed"), services())
"""

import logging
import uuid
from types import SimpleNamespace

from core.base.ids import new_traceparent
from core.order.events import Event, make_event
from core.order.state_machine import TRANSITIONS

ORDER = {
    "id": "01939e5a-0000-7000-8000-000000000001",
    "status": "pending",
    "customerId": "ada",
    "currency": "USD",
    "email": "ada@example.com",
    "items": [{"sku": "A1", "quantity": 2, "price": 19.99}],
    "total": 39.98,
    "createdAt": "2026-01-31T09:30:00.000Z",
    "updatedAt": "2026-01-31T09:30:00.000Z",
}


def event(type: str, order: dict | None = None, **data) -> Event:
    """An event as a handler gets it; `order` overrides fields of a sample order."""
    whole = {"order": {**ORDER, **(order or {})}, **data}
    return make_event(
        type, whole, id=str(uuid.uuid4()), source="/orderproc/api", subject=ORDER["id"],
        orderstatus=TRANSITIONS[type].leaves if type in TRANSITIONS else "pending", traceparent=new_traceparent(),
    )  # fmt: skip


class FakeStock:
    """Stock in a dict. `holds` says what the order's recorded steps hold, for give_back."""

    def __init__(self, units: dict[str, int], holds: dict[str, int]) -> None:
        self.units, self.holds = units, holds

    def take(self, items: list[dict]) -> dict[str, str]:
        wanted: dict[str, int] = {}
        for item in items:
            wanted[item["sku"]] = wanted.get(item["sku"], 0) + item["quantity"]
        short = {sku: "unknown_sku" for sku in wanted if sku not in self.units}
        short |= {sku: "out_of_stock" for sku in wanted if sku in self.units and self.units[sku] < wanted[sku]}
        if not short:
            for sku, quantity in wanted.items():
                self.units[sku] -= quantity
        return short

    def give_back(self) -> None:
        for sku, quantity in self.holds.items():
            self.units[sku] = self.units.get(sku, 0) + quantity
        self.holds = {}


def services(stock: dict[str, int] | None = None, holds: dict[str, int] | None = None, answers: dict | None = None):
    """`answers` maps a function's name to what invoking it gives, or to an exception it raises."""
    calls: list[tuple[str, dict]] = []

    def invoke(function: str, payload: dict):
        calls.append((function, payload))
        answer = (answers or {}).get(function, {})
        if isinstance(answer, Exception):
            raise answer
        return answer

    fake = FakeStock(stock if stock is not None else {}, holds or {})
    return SimpleNamespace(stock=fake, invoke=invoke, calls=calls, log=logging.getLogger("handlers.test"))
