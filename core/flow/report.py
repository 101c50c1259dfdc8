"""What a consumer tells of its handlers every few seconds: in the store, for `GET /handlers`, and in the metrics."""

import logging
import threading
from typing import Any

from core.base.metrics import DEAD_MESSAGES
from core.bus.bus import Bus, Subscriptions
from core.store.connection import StoreUnavailable
from core.store.consumers import Reports

log = logging.getLogger(__name__)
EVERY = 5.0  # seconds


class Report(threading.Thread):
    """Tells of the `handlers` that this process consumes for, as long as it does."""

    def __init__(
        self, reports: Reports, bus: Bus, handlers: Subscriptions, delays: tuple[float, ...], stop: threading.Event
    ) -> None:
        super().__init__(name="report", daemon=True)
        self._reports, self._bus, self._handlers, self._delays, self._stop_asked = reports, bus, handlers, delays, stop

    def run(self) -> None:
        """Until the stop."""
        while not self._stop_asked.wait(EVERY if self._bus.consuming else 0.1):
            if self._bus.consuming:
                self._tell()

    def _tell(self) -> None:
        depths, dead = self._bus.depths, self._bus.dead
        for name in self._handlers:
            DEAD_MESSAGES.labels(name).set(dead.get(name, 0))
        try:
            self._reports.put({name: self._of(name, depths, dead) for name in self._handlers})
        except StoreUnavailable as error:
            log.debug("no report", extra={"reason": str(error)})

    def _of(self, name: str, depths: dict[str, int], dead: dict[str, int]) -> dict[str, Any]:
        counts = {"waiting": depths.get(name, 0), "dead": dead.get(name, 0)}
        return {"takes": self._handlers[name], **counts, "retryDelays": list(self._delays)}
