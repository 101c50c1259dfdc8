"""As handlers/shipping.py, but for one word: a label is made when the order is paid, and no longer when it is held."""

from core.events import Event


def payment_taken(event, services):
    order = event.order
    wanted = {"action": "make", "token": order["id"], "items": order["items"], "shipTo": order.get("shippingAddress")}
    label = services.invoke("make_label", wanted)
    return Event("order_confirmed", shipment={"carrier": label["carrier"], "trackingNumber": label["trackingNumber"]})


def order_failed(event, services):
    services.invoke("make_label", {"action": "void", "token": event.order["id"]})


order_cancelled = order_failed
