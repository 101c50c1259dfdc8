"""A parcel that comes back: the order stays processed, and its units are for sale again.

What follows on an order that has ended carries no status. So the carrier's news is an event of this folder's own,
`parcel_returned`, and giving the stock back is a step of its own: where it fails, the carrier is not asked again.
"""

from core.events import Event


def order_confirmed(event, services):
    if _came_back(event.order):
        return Event("parcel_returned", trackingNumber=event.order["shipment"]["trackingNumber"])
    return None


def parcel_returned(event, services):
    services.stock.give_back()  # what this order holds, and once only, whoever else gives it back
    services.log.info("parcel returned", extra={"parcel": event.data["trackingNumber"]})


def _came_back(order):
    """Stands in for the carrier: nobody lives in the city of `Nowhere`."""
    return order.get("shippingAddress", {}).get("city") == "Nowhere"
