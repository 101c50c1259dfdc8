"""Take the money once the goods are held, and give it back when the order fails or is cancelled.

The order's id is the token of both, so a repeat changes nothing. An order may be cancelled while its payment runs; then
the refund may come first. It leaves its note all the same, and the provider counts a charge with a refund as nothing.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

from core.events import Event

LIMIT = 1000  # the provider's; above it a payment is refused, which is an answer and no breakdown


def inventory_reserved(event, services):
    total = event.order["total"]
    if total > LIMIT:
        return Event("order_failed", reason="payment_refused")
    _ask_provider("charge", event.order)
    return Event("payment_taken", amount=total)


def order_failed(event, services):
    _ask_provider("refund", event.order)


order_cancelled = order_failed


def _ask_provider(action, order):
    """Stands in for a payment provider: a note for each action and token. It takes PAYMENT_SECONDS to charge."""
    if action == "charge":
        time.sleep(float(os.environ.get("PAYMENT_SECONDS", "0")))
    notes = Path(os.environ.get("DATA_DIR", "./data")) / "payments"
    notes.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), (notes / f"{order['id']}.{action}").open("x") as note:
        note.write(f"{order['total']} {order['currency']}\n")
