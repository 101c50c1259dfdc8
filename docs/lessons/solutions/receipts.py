"""Lesson 7: a receipt for every payment, and a void mark beside it where the order comes to nothing."""

import os
from pathlib import Path

from core.events import Event


def payment_taken(event, services):
    _write(event, "receipt", str(event.data["amount"]))
    return Event("receipt_written", amount=event.data["amount"])


def order_failed(event, services):
    _write(event, "void", "")


order_cancelled = order_failed


def _write(event, kind, text):
    folder = Path(os.environ.get("DATA_DIR", "./data")) / "receipts"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{event.order['id']}.{kind}").write_text(text)
