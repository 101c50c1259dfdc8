"""The bus inside one process: the embedded default, and what unit tests run on.

The same verbs and promises as `bus.py`, but for what a broker's disk gives: an event is confirmed when it is queued,
and a `kill -9` forgets it. The orders still owe it, so the sweep sends it again at the next start.
"""

import bisect
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from core.bus import Delivery, Message, Topology, main_queue

BOUND = 10_000  # messages in one queue; beyond it they stay in their outbox


class LocalBus:
    """Queues in memory. What is parked is not kept: the order shows it, and a restart tries again."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Message]] = {}
        self._topology: Topology = {}
        self._later: list[tuple[float, str, Message]] = []  # when, into which queue; the soonest first
        self._known: set[tuple[str, str]] = set()  # (queue, id): queued or in hand
        self._in_hand: Counter[str] = Counter()
        self._changed = threading.Condition()
        self.up, self.consuming = True, False

    @property
    def depths(self) -> dict[str, int]:
        return {queue: len(messages) for queue, messages in self._queues.items()}

    def publish(self, message: Message, done: Callable[[str], None]) -> None:
        """Queue a message, and tell `done` at once."""
        with self._changed:
            outcome = self._route(message)
            self._changed.notify_all()
        done(outcome)

    def _route(self, message: Message) -> str:
        queue, _, delay = message.queue.partition(".retry.")
        if delay:
            ripe = time.monotonic() + float(delay)
            bisect.insort(self._later, (ripe, queue, message), key=lambda entry: entry[0])
            return "confirmed"
        if message.queue.endswith(".dead"):
            return "confirmed"
        takers = [main_queue(name) for name, types in self._topology.items() if message.type in types]
        queues = [message.queue] if message.queue else takers
        if any(queue not in self._queues for queue in queues) or (message.mandatory and not queues):
            return "returned"
        return "confirmed" if all([self._queue(queue, message) for queue in queues]) else "dropped"

    def _queue(self, queue: str, message: Message) -> bool:
        if (queue, message.id) in self._known:
            return True
        if len(self._queues[queue]) >= BOUND:
            return False
        self._known.add((queue, message.id))
        self._queues[queue].append(message)
        return True

    def consume(
        self, topology: Topology, names: Sequence[str], prefetch: int,
        deliver: Callable[[Delivery], None], stop: threading.Event,
    ) -> None:  # fmt: skip
        """Deliver until `stop`, then wait for what is in hand."""
        with self._changed:
            self._topology = topology
            self._queues = {main_queue(name): self._queues.get(main_queue(name), deque()) for name in topology}
        self.consuming = True
        while not stop.is_set():
            for delivery in self._next(names, prefetch):
                deliver(delivery)
        self.consuming = False
        with self._changed:
            self._changed.wait_for(lambda: not +self._in_hand, timeout=8)

    def _next(self, names: Sequence[str], prefetch: int) -> list[Delivery]:
        with self._changed:
            found = self._take(names, prefetch)
            if not found:
                ripe = self._later[0][0] - time.monotonic() if self._later else 1
                self._changed.wait(min(0.2, max(0.001, ripe)))
            return found

    def _take(self, names: Sequence[str], prefetch: int) -> list[Delivery]:
        while self._later and self._later[0][0] <= time.monotonic():
            _, queue, message = self._later.pop(0)
            self._known.discard((queue, message.id))
            self._queue(queue, message)
        taken = []
        for name in names:
            while self._queues[main_queue(name)] and self._in_hand[name] < prefetch:
                self._in_hand[name] += 1
                taken.append(self._delivery(name, self._queues[main_queue(name)].popleft()))
        return taken

    def _delivery(self, name: str, message: Message) -> Delivery:
        def end(acked: bool) -> None:
            with self._changed:
                self._in_hand[name] -= 1
                self._known.discard((main_queue(name), message.id))
                self._changed.notify_all()

        return Delivery(name, message.body, message.id, message.headers.get("tries", 0), end)

    def rebuild(self) -> None:
        """Nothing here can go missing."""

    def close(self) -> None:
        """Nothing to hang up."""
