"""Hold stock for new orders; give it back when an order fails or is cancelled.

`services.stock.take` holds all lines or none. Where units that others hold for the moment could still cover them it
raises, and the step is tried again: "out of stock" is final. `give_back` returns all that this order holds.
"""

from core.events import Event


def order_created(event, services):
    short = services.stock.take(event.order["items"])
    if not short:
        return Event("inventory_reserved")
    reason = "unknown_sku" if "unknown_sku" in short.values() else "out_of_stock"
    return Event("order_failed", reason=reason)


def order_failed(event, services):
    services.stock.give_back()


order_cancelled = order_failed
