"""Put a return label into every parcel: what comes after the end of an order is a handler too.

The event that follows is one of its own, `return_label_made`, and carries no status, as none may on an order that has
ended. The label's token is derived from the order's id: a repeat gives the same label, and the first one stays.
"""

from core.events import Event

SHOP = {"name": "orderproc", "line1": "1 Return Road", "city": "Ulm", "postalCode": "89073", "country": "DE"}


def order_confirmed(event, services):
    wanted = {"action": "make", "token": f"{event.order['id']}-return", "shipTo": SHOP}
    label = services.invoke("make_label", wanted)
    return Event("return_label_made", trackingNumber=label["trackingNumber"])
