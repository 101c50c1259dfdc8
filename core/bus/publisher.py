"""Publishing to RabbitMQ: a window of messages whose confirms are still to come.

Waiting for each confirm before the next message costs a round trip and a disk write per message; a window shares them.
https://www.rabbitmq.com/docs/publishers#publisher-confirm-strategies
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pika

from core.bus.bus import Done, PublishOutcome
from core.bus.link import Link
from core.bus.topology import EXCHANGE

log = logging.getLogger(__name__)
WINDOW = 500  # messages unconfirmed
BOUND, LARGEST = 10_000, 64 * 1024 * 1024  # messages in hand, and their bytes; beyond they stay in their outbox
MOST_TOLD = 8  # who asked for one message; a broker that blocks for hours is asked for it again and again
CONFIRM_WITHIN = 10.0  # seconds; pika has no deadline of its own
NUMBER = "publish-number"  # a header: tells which publish an unroutable message was


@dataclass(eq=False)
class Letter:
    """A message as RabbitMQ gets it, and who is told what became of it."""

    exchange: str
    routing_key: str
    id: str
    type: str
    body: bytes
    done: list[Done] = field(default_factory=list)
    headers: dict[str, Any] = field(default_factory=dict)
    mandatory: bool = True  # comes back where no queue takes it
    sent_at: float = 0.0
    came_back: bool = False

    @property
    def key(self) -> tuple[str, str, bytes]:
        """The same for the same message; what strangers sent may all have one id, or none."""
        return self.routing_key, self.id, self.body

    def tell(self, outcome: PublishOutcome) -> None:
        """Tell everybody who asked for it what became of it."""
        for done in self.done:
            done(outcome)

    def properties(self, **headers: int) -> pika.BasicProperties:
        """Persistent, and with no header but ours: the broker's own x- headers would lie on a second journey."""
        content_type, headers = "application/cloudevents+json", self.headers | headers
        return pika.BasicProperties(content_type, None, headers, 2, message_id=self.id, type=self.type)


class Publisher(Link):
    """Sends letters and tells how each ended. What is unconfirmed when a connection dies is sent again on the next."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._lock = threading.Lock()
        self.in_hand: dict[tuple[str, str, bytes], Letter] = {}  # queued or unconfirmed, oldest first
        self._queued: deque[Letter] = deque()
        self._bytes = 0  # in hand

    def publish(self, letter: Letter) -> None:
        """Take a letter in hand; `done` is told what became of it. One that is in hand is not sent twice."""
        with self._lock:
            known = self.in_hand.get(letter.key)
            if known and len(known.done) < MOST_TOLD:
                return known.done.extend(letter.done)
            has_room = not known and len(self.in_hand) < BOUND and self._bytes + len(letter.body) <= LARGEST
            if has_room:
                self.in_hand[letter.key] = letter
                self._queued.append(letter)
                self._bytes += len(letter.body)
        if not has_room:
            letter.tell("unsent")
        elif self.ready:
            self.call(self._pump)

    # --- on the loop's thread

    def on_channel(self) -> None:
        with self._lock:
            self._queued = deque(self.in_hand.values())
        self._number, self._unconfirmed = 0, dict[int, Letter]()  # by publish number, oldest first
        self.channel.add_on_return_callback(self._on_return)
        self.channel.confirm_delivery(ack_nack_callback=self._on_confirm)
        self.channel.exchange_declare(EXCHANGE, "topic", durable=True, callback=self._on_ready)

    def _on_ready(self, _: Any) -> None:
        self.ready = True
        log.info("publishing to RabbitMQ")
        self._check_confirms()
        self._pump()

    def _check_confirms(self) -> None:
        oldest = next(iter(self._unconfirmed.values()), None)
        if oldest and time.monotonic() - oldest.sent_at > CONFIRM_WITHIN:
            self.hang_up(f"no confirm within {CONFIRM_WITHIN} s")
        else:
            self.later(1, self._check_confirms)

    def _pump(self) -> None:
        while self.channel.is_open and self._queued and len(self._unconfirmed) < WINDOW:
            letter = self._queued.popleft()
            try:
                self._send(letter)
            except Exception as error:  # this one can never be sent; it must not stop the others
                log.error("a message cannot be sent; set aside", extra={"event": letter.id, "error": repr(error)[:300]})
                self._finish(letter, "unsent")

    def _send(self, letter: Letter) -> None:
        number, letter.sent_at, letter.came_back = self._number + 1, time.monotonic(), False
        properties = letter.properties(**{NUMBER: number})
        self.channel.basic_publish(letter.exchange, letter.routing_key, letter.body, properties, letter.mandatory)
        self._number, self._unconfirmed[number] = number, letter

    def _on_return(self, _: Any, method: Any, props: Any, body: bytes) -> None:
        self._unconfirmed[props.headers[NUMBER]].came_back = True

    def _on_confirm(self, frame: Any) -> None:
        outcome: PublishOutcome = "confirmed" if isinstance(frame.method, pika.spec.Basic.Ack) else "unsent"
        last = frame.method.delivery_tag
        for number in [n for n in self._unconfirmed if n <= last] if frame.method.multiple else [last]:
            letter = self._unconfirmed.pop(number)
            # An unroutable message comes back first, and is confirmed then.
            self._finish(letter, "unroutable" if letter.came_back else outcome)
        self._pump()

    def _finish(self, letter: Letter, outcome: PublishOutcome) -> None:
        with self._lock:
            del self.in_hand[letter.key]
            self._bytes -= len(letter.body)
        letter.tell(outcome)
