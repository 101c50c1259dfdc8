"""Have a shipping label made for reserved orders; have it voided when an order fails or is cancelled.

The order id is the label's token, so a repeat gives the same label, and a void that comes first refuses a later one.
"""

from core.events import Event


def inventory_reserved(event, services):
    order = event.order
    wanted = {"action": "make", "token": order["id"], "items": order["items"], "shipTo": order.get("shippingAddress")}
    label = services.invoke("make_label", wanted)
    return Event("order_confirmed", shipment={"carrier": label["carrier"], "trackingNumber": label["trackingNumber"]})


def order_failed(event, services):
    services.invoke("make_label", {"action": "void", "token": event.order["id"]})


order_cancelled = order_failed
