"""Lesson 3: as handlers/shipping.py, but it gets stuck when the label is made, while there is a file data/stuck."""

import time
from pathlib import Path

from core.events import Event


def inventory_reserved(event, services):
    order = event.order
    wanted = {"action": "make", "token": order["id"], "items": order["items"], "shipTo": order.get("shippingAddress")}
    label = services.invoke("make_label", wanted)
    while Path("data/stuck").exists():
        time.sleep(0.1)
    return Event("order_confirmed", shipment={"carrier": label["carrier"], "trackingNumber": label["trackingNumber"]})


def order_failed(event, services):
    services.invoke("make_label", {"action": "void", "token": event.order["id"]})


order_cancelled = order_failed
