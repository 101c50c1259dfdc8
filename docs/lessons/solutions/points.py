"""Lesson 2: points for every dollar, a note for each order, and the way back. Both may be done twice."""

import os
from pathlib import Path


def order_confirmed(event, services):
    note = _note(event)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(str(int(event.order["total"])))


def order_cancelled(event, services):
    _note(event).unlink(missing_ok=True)


def _note(event):
    return Path(os.environ.get("DATA_DIR", "./data")) / "points" / event.order["id"]
