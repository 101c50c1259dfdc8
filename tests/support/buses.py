"""A bus that only remembers, and what tests do with any bus: consume on a thread, collect the outcome of a publish."""

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager

from core.bus.bus import Bus, Delivery, Message, Subscriptions
from tools.chaos.system import wait_for

logging.getLogger("pika").setLevel(logging.CRITICAL)  # as the programs do; ours logs the same in a line


class FakeBus:
    """Remembers what is published, and reports each `outcome` at once; with None it waits for `report`."""

    up = consuming = True

    def __init__(self, outcome: str | None = "confirmed") -> None:
        self.outcome, self.rebuilt, self.depths, self.dead = outcome, 0, dict[str, int](), dict[str, int]()
        self.sent: list[Message] = []
        self._done: list[Callable[[str], None]] = []

    def publish(self, message: Message, done: Callable[[str], None]) -> None:
        self.sent.append(message)
        self._done.append(done)
        if self.outcome:
            done(self.outcome)

    def report(self, outcome: str, position: int = -1) -> None:
        """Give one publish its outcome: the last, or the one at that position."""
        self._done[position](outcome)

    def drain(self) -> list[Message]:
        """What was published since the last time."""
        sent, self.sent = self.sent, []
        return sent

    def rebuild(self) -> None:
        self.rebuilt += 1


class Outcomes:
    """Publishes, and collects the outcome of each publish, by message id, in order."""

    def __init__(self, bus: Bus) -> None:
        self._bus, self._lock = bus, threading.Lock()
        self.by_id: dict[str, list[str]] = defaultdict(list)

    def publish(self, message: Message) -> None:
        self._bus.publish(message, lambda outcome: self._add(message.id, outcome))

    def _add(self, id: str, outcome: str) -> None:
        with self._lock:
            self.by_id[id].append(outcome)

    def publish_and_wait(self, message: Message, seconds: float = 20) -> str:
        """Publish one, and give its outcome."""
        self.publish(message)
        wait_for(lambda: self.by_id.get(message.id), seconds, f"an outcome for {message.id}")
        return self.by_id[message.id][-1]

    def count(self, outcome: str) -> int:
        with self._lock:
            return sum(outcomes.count(outcome) for outcomes in self.by_id.values())

    def wait_until_confirmed(self, count: int, seconds: float) -> None:
        try:
            wait_for(lambda: self.count("confirmed") >= count, seconds)
        except AssertionError:
            found = {outcome: self.count(outcome) for outcomes in self.by_id.values() for outcome in outcomes}
            raise AssertionError(f"{count} were to be confirmed within {seconds} s: {found}") from None


class Running:
    """`bus.consume` on a thread. Deliveries gather in `arrived`, unacked, or go to `deliver`."""

    def __init__(
        self, bus: Bus, subscriptions: Subscriptions, names: Sequence[str] = (), prefetch: int = 16,
        deliver: Callable[[Delivery], None] | None = None, wait: bool = True,
    ) -> None:  # fmt: skip
        self.bus, self.stop, self.error = bus, threading.Event(), None
        self.arrived: list[Delivery] = []
        self._ended: list[Delivery] = []
        names = list(names) or list(subscriptions)
        args = subscriptions, names, prefetch, deliver or self.arrived.append, self.stop
        self._thread = threading.Thread(target=self._run, args=args, name="test-consume", daemon=True)
        self._thread.start()
        if wait:
            self.wait_until_up()

    def _run(self, *args) -> None:
        try:
            self.bus.consume(*args)
        except Exception as error:
            self.error = error

    def wait_until_up(self, seconds: float = 20) -> None:
        wait_for(lambda: (self.bus.consuming and self.bus.up) or self.error, seconds, "the bus is up")
        assert self.error is None, self.error

    def wait(self, count: int, seconds: float = 20) -> list[Delivery]:
        """What arrived, once there are `count` of them."""
        wait_for(lambda: len(self.arrived) >= count, seconds, f"{count} deliveries, not {len(self.arrived)}")
        return self.arrived

    def ack(self, *deliveries: Delivery) -> None:
        for delivery in deliveries:
            if not any(delivery is ended for ended in self._ended):  # one that came again may be equal to the first
                self._ended.append(delivery)
                delivery.ack()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def end(self, seconds: float = 15) -> None:
        self.stop.set()
        self._thread.join(seconds)
        assert not self.running, f"consume did not return within {seconds} s"

    def ack_all_and_end(self) -> None:
        self.stop.set()
        wait_for(lambda: self.ack(*self.arrived) or not self.running, what="consume returns")


@contextmanager
def running(bus: Bus, subscriptions: Subscriptions, *more, **options):
    session = Running(bus, subscriptions, *more, **options)
    try:
        yield session
    finally:
        session.ack_all_and_end()
