"""What a consumer tells of its handlers every few seconds: in the store, for `GET /handlers`, and in the metrics."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from core.base.metrics import DEAD_MESSAGES
from core.bus.bus import Bus, Subscriptions
from core.store.connection import StoreUnavailable
from core.store.consumers import Reports

EVERY = 5.0  # seconds


def start_reporting(
    reports: Reports, bus: Bus, handlers: Subscriptions, delays: Sequence[float], stop: threading.Event
) -> None:
    """Tell of the handlers that this process consumes for, as long as it does, until `stop`."""

    def run() -> None:
        while not stop.wait(EVERY if bus.consuming else 0.1):
            if bus.consuming:
                told = {name: _told(bus, name, takes) | {"retryDelays": delays} for name, takes in handlers.items()}
                with suppress(StoreUnavailable):  # then they are not seen, which is true
                    reports.put(told)

    threading.Thread(target=run, name="report", daemon=True).start()


def _told(bus: Bus, name: str, takes: list[str]) -> dict[str, Any]:
    dead = bus.dead.get(name, 0)
    DEAD_MESSAGES.labels(name).set(dead)
    return {"takes": takes, "waiting": bus.depths.get(name, 0), "dead": dead}
