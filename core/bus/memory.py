"""The bus inside one process: the carrier of `make run`, and what fast tests run on.

The same verbs and promises as any carrier's, but for what a broker's disk gives: an event is confirmed when it is
queued, and a `kill -9` forgets it. The step is unfinished in its order, so the sweep sends it again at the next start.
"""

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from core.bus.bus import Deliver, Done, Message, PublishOutcome, Subscriptions

BOUND = 10_000  # messages in one queue; beyond it they stay in their outbox
LOOK_EVERY = 0.05  # seconds between looks whether a retry is due
DRAIN = 8.0  # seconds that work in hand gets on a stop


class MemoryBus:
    """Queues in memory. What is parked is not kept: the order shows it, and a restart tries again."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[str, MemoryDelivery]] = {}  # handler -> message id -> it, waiting or in hand
        self._subscriptions: Subscriptions = {}
        self._in_hand: Counter[str] = Counter()
        self.parked = set[tuple[str, str]]()  # (handler, message id)
        self._changed = threading.Condition()
        self.up, self.consuming = True, False

    @property
    def depths(self) -> dict[str, int]:
        return {handler: len(queue) - self._in_hand[handler] for handler, queue in self._queues.items()}

    @property
    def dead(self) -> dict[str, int]:
        return Counter(handler for handler, _ in self.parked.copy())

    def start_publishing(self) -> None:
        """There is nothing to connect, to make anew or to hang up."""

    rebuild = close = start_publishing

    def publish(self, message: Message, done: Done) -> None:
        with self._changed:
            outcome = self._route(message)
            self._changed.notify_all()
        done(outcome)

    def _route(self, message: Message) -> PublishOutcome:
        subscribers = [name for name, types in self._subscriptions.items() if message.type in types]
        handlers = [message.handler] if message.handler else subscribers
        if any(handler not in self._queues for handler in handlers) or (message.mandatory and not handlers):
            return "unroutable"
        queued = [self._accept(message, handler) for handler in handlers]
        return "confirmed" if all(queued) else "unsent"

    def _accept(self, message: Message, handler: str) -> bool:
        queue = self._queues[handler]
        if len(queue) < BOUND:
            queue.setdefault(message.id, MemoryDelivery(self, handler, message.id, message.body))
            self.parked.discard((handler, message.id))
        return message.id in queue

    def consume(
        self, subscriptions: Subscriptions, names: Sequence[str], prefetch: int, deliver: Deliver, stop: threading.Event
    ) -> None:
        with self._changed:
            self._subscriptions = subscriptions
            self._queues = {name: self._queues.get(name, {}) for name in subscriptions}
        self.consuming = True
        while not stop.is_set():
            for delivery in self._next(names, prefetch):
                deliver(delivery)
        self.consuming = False
        with self._changed:
            self._changed.wait_for(lambda: not any(self._in_hand.values()), DRAIN)

    def _next(self, names: Sequence[str], prefetch: int) -> list["MemoryDelivery"]:
        """What may be delivered now, after a short wait if there is nothing."""
        taken, now = list[MemoryDelivery](), time.monotonic()
        with self._changed:
            for name in names:
                due = (delivery for delivery in self._queues[name].values() if delivery.due <= now)
                taken += itertools.islice(due, prefetch - self._in_hand[name])
            for delivery in taken:
                self._in_hand[delivery.handler] += 1
                delivery.due = math.inf
            if not taken:
                self._changed.wait(LOOK_EVERY)
        return taken

    def end(self, delivery: "MemoryDelivery", retry_in: float | None = None) -> None:
        """Forget what was in hand, or have it come again after so many seconds."""
        with self._changed:
            if retry_in is None:
                del self._queues[delivery.handler][delivery.id]
            else:
                delivery.due = time.monotonic() + retry_in
            self._in_hand[delivery.handler] -= 1
            self._changed.notify_all()


@dataclass
class MemoryDelivery:
    """A message in hand, or on its way there."""

    bus: MemoryBus
    handler: str
    id: str
    body: bytes
    tries: int = 0
    due: float = 0.0  # when it may be delivered, by the monotonic clock; never while it is in hand

    def ack(self) -> None:
        self.bus.end(self)

    def retry(self, seconds: float, tries: int) -> None:
        self.tries = tries
        self.bus.end(self, retry_in=seconds)

    def park(self, reason: str, tries: int) -> None:
        self.bus.parked.add((self.handler, self.id))  # that it was, and nothing else
        self.bus.end(self)

    release = ack  # the order knows what is unfinished, and the sweep sends it again
