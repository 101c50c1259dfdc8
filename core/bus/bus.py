"""The seam to the broker: what API and consumer need of a carrier, whichever it is.

Order is not promised, and twice is possible. Errors of a carrier's library stop in this folder. `rabbit.py` carries
over RabbitMQ, `memory.py` inside one process; tests/servers/test_bus_contract.py holds each to these promises.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from core.base.settings import Refusal

Subscriptions = dict[str, list[str]]  # handler -> the event types it takes
PublishOutcome = Literal["confirmed", "unroutable", "unsent"]
"""`confirmed`: it is safe with the broker; `unroutable`: nobody takes it; `unsent`: not sent, or nobody knows."""
Done = Callable[[PublishOutcome], None]


class BrokerUnavailable(Refusal):
    """The broker did not do what a command asked; the text says what to do."""


class TopologyMismatch(Refusal):
    """A queue is there with other arguments; the text names queue, argument and what to do."""


@dataclass(frozen=True)
class Message:
    """An event on its way: to all subscribers of its type, or to one handler alone."""

    id: str
    type: str
    body: bytes
    handler: str = ""
    mandatory: bool = True  # `unroutable` where nobody takes it


class Delivery(Protocol):
    """One message in hand, of one handler. One of the four verbs ends it, once, from any thread; none of them blocks.

    What is not ended comes again with the same id when its process is gone.
    """

    handler: str
    id: str
    body: bytes
    tries: int  # that failed before

    def ack(self) -> None:
        """It is dealt with: forget it."""

    def retry(self, seconds: float, tries: int) -> None:
        """Have it come again after a while, to this handler only. Nothing is lost, whatever dies meanwhile."""

    def park(self, reason: str, tries: int) -> None:
        """Set it aside as a dead letter, with the reason."""

    def release(self) -> None:
        """Give it back as it came: it comes again, here after a new start of the session or in another process."""


Deliver = Callable[[Delivery], None]


class Bus(Protocol):
    """A carrier of messages."""

    @property
    def consuming(self) -> bool:
        """Every handler's queue is there, and those asked for are being consumed."""

    @property
    def up(self) -> bool:
        """Publishing works, as far as is known."""

    @property
    def depths(self) -> dict[str, int]:
        """Handler -> messages that wait for it, a few seconds old."""

    @property
    def dead(self) -> dict[str, int]:
        """Handler -> its dead letters, a few seconds old."""

    def start_publishing(self) -> None:
        """Begin to publish, in a process that does not consume; `consume` does it when the queues are there."""

    def publish(self, message: Message, done: Done) -> None:
        """Take a message in hand; never blocks. `done` is told the outcome once, from a thread of the bus."""

    def consume(
        self, subscriptions: Subscriptions, names: Sequence[str], prefetch: int, deliver: Deliver, stop: threading.Event
    ) -> None:
        """Make all queues, and consume those of `names` until `stop`; then wait some seconds for what is in hand.

        `deliver` is called on a thread of the bus and must hand the delivery on; at most `prefetch` are in hand for a
        handler. Once for each bus. Raises TopologyMismatch.
        """

    def rebuild(self) -> None:
        """Make the queues anew: something that should be there is not. What is in hand is delivered again."""

    def close(self) -> None:
        """Publish what is in hand, within a few seconds, and hang up."""
