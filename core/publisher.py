"""Publishing to RabbitMQ: one thread, one connection, a window of messages whose confirms are still to come.

Waiting for each confirm before the next message costs a round trip and a disk write per message; a window shares them.
https://www.rabbitmq.com/docs/publishers#publisher-confirm-strategies
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pika
from pika.exceptions import ChannelWrongStateError, ConnectionWrongStateError
from pika.spec import Basic

log = logging.getLogger(__name__)
EXCHANGE = "orders"
WINDOW = 500  # messages on their way
BOUND = 10_000  # messages waiting; beyond it they stay in their outbox
CONFIRM_WITHIN = 10.0  # seconds; pika has no deadline of its own
LARGEST_PAUSE = 15.0  # seconds between attempts to connect


@dataclass(frozen=True)
class Message:
    """What is published: through the exchange by its type, or, with a queue, into that queue alone."""

    id: str
    type: str
    body: bytes
    queue: str = ""
    headers: dict[str, Any] = field(default_factory=dict)
    mandatory: bool = True  # comes back where no queue takes it

    @property
    def key(self) -> tuple[str, str, bytes]:
        return self.queue, self.id, self.body  # what strangers send may all have one id, or none


@dataclass
class _Entry:
    message: Message
    done: list[Callable[[str], None]]
    sent: float = 0.0


def parameters(url: str) -> pika.URLParameters:
    """Connection parameters with bounds on every wait; what the URL says itself stands."""
    found = pika.URLParameters(url)
    if "heartbeat=" not in url:
        found.heartbeat = 15
    found.blocked_connection_timeout = found.blocked_connection_timeout or 30
    found.socket_timeout, found.stack_timeout = 5, 10
    return found


def properties(message: Message) -> pika.BasicProperties:
    """Persistent, and with no header but ours: the broker's own x- headers would lie on a second journey."""
    return pika.BasicProperties(
        message_id=message.id, type=message.type, headers=message.headers,
        content_type="application/cloudevents+json", delivery_mode=2,
    )  # fmt: skip


class Publisher:
    """Sends messages and tells how each ended. What is unconfirmed when a connection dies is sent again on the next."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._waiting: deque[_Entry] = deque()
        self._in_hand: dict[tuple[str, str, bytes], _Entry] = {}  # waiting or on its way
        self._on_the_way: dict[int, _Entry] = {}  # by delivery tag, oldest first
        self._returned: set[tuple[str, str, bytes]] = set()
        self._connection: Any = None
        self._channel: Any = None
        self._tag, self._asked, self._stopping, self.up = 0, False, False, False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
            self._thread.start()

    def publish(self, message: Message, done: Callable[[str], None]) -> None:
        """Take a message in hand; see `bus.py` for what `done` is told. A message that is in hand is not sent twice."""
        with self._lock:
            known = self._in_hand.get(message.key)
            full = not known and len(self._in_hand) >= BOUND
            if known:
                known.done.append(done)
            elif not full:
                self._in_hand[message.key] = entry = _Entry(message, [done])
                self._waiting.append(entry)
        if full:
            done("dropped")
        elif self.up:
            self._ask_for_pump()

    def close(self, seconds: float = 5.0) -> None:
        """Give what is in hand some time to be confirmed, then hang up."""
        deadline = time.monotonic() + seconds
        while self.up and self._in_hand and time.monotonic() < deadline:
            time.sleep(0.02)
        self._stopping = True
        self._on_loop(lambda: self._hang_up("closing"))
        if self._thread:
            self._thread.join(timeout=2)

    # --- the thread

    def _run(self) -> None:
        pause = 0.5
        while not self._stopping:
            try:
                pause = 0.5 if self._connect_and_stay() else min(pause * 2, LARGEST_PAUSE)
            except Exception:
                log.exception("the publisher stumbled; connecting again")
            if not self._stopping:
                time.sleep(random.uniform(pause / 2, pause))  # jitter: not every process at the same moment

    def _connect_and_stay(self) -> bool:
        was_up = False
        self._connection = pika.SelectConnection(
            parameters(self._url),
            on_open_callback=self._opened,
            on_open_error_callback=self._over,
            on_close_callback=self._over,
        )
        try:
            self._connection.ioloop.start()
        finally:
            was_up, self.up = self.up, False
            self._connection.ioloop.close()
            self._take_back()
        return was_up

    def _opened(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._channel_open)

    def _channel_open(self, channel: Any) -> None:
        self._channel, self._tag = channel, 0
        channel.add_on_close_callback(lambda _, reason: self._hang_up(repr(reason)))
        channel.add_on_return_callback(self._came_back)
        channel.confirm_delivery(ack_nack_callback=self._confirmed)
        channel.exchange_declare(EXCHANGE, "topic", durable=True, callback=lambda _: self._ready())

    def _ready(self) -> None:
        self.up = True
        log.info("publishing to RabbitMQ")
        self._check()
        self._pump()

    def _over(self, _: Any, reason: Any) -> None:
        if not self._stopping:
            log.warning("lost the broker; connecting again", extra={"error": repr(reason)[:300]})
        self._connection.ioloop.stop()

    def _hang_up(self, why: str) -> None:
        if not self._stopping:
            log.warning("hanging up on the broker", extra={"error": why[:300]})
        self._connection.ioloop.call_later(3, self._connection.ioloop.stop)  # a frozen broker never says goodbye
        if self._connection.is_open:
            self._connection.close()

    def _take_back(self) -> None:
        self._returned.clear()
        with self._lock:
            self._waiting.extendleft(reversed(self._on_the_way.values()))
            self._on_the_way.clear()

    def _on_loop(self, call: Callable[[], None]) -> None:
        try:
            self._connection.ioloop.add_callback_threadsafe(call)
        except Exception as error:  # the loop is gone, and with it the need for the call
            log.debug("no publishing loop", extra={"error": repr(error)})

    # --- on the loop

    def _ask_for_pump(self) -> None:
        if not self._asked:
            self._asked = True
            self._on_loop(self._pump)

    def _pump(self) -> None:
        self._asked = False
        while self.up and self._waiting and len(self._on_the_way) < WINDOW:
            if not self._send(self._waiting.popleft()):
                return

    def _send(self, entry: _Entry) -> bool:
        message, entry.sent = entry.message, time.monotonic()
        exchange, key = ("", message.queue) if message.queue else (EXCHANGE, message.type)
        try:
            self._channel.basic_publish(exchange, key, message.body, properties(message), message.mandatory)
        except (ChannelWrongStateError, ConnectionWrongStateError):
            self._waiting.appendleft(entry)
            return False
        except Exception as error:  # this one can never be sent; it must not stop the others
            log.error("an event cannot be sent; set aside", extra={"event": message.id, "error": repr(error)[:300]})
            self._finish(entry, "refused")
            return True
        self._tag += 1
        self._on_the_way[self._tag] = entry
        return True

    def _came_back(self, _: Any, method: Any, props: Any, body: bytes) -> None:
        self._returned.add(
            ("" if method.exchange else method.routing_key, props.message_id, body)
        )  # its ack comes next

    def _confirmed(self, frame: Any) -> None:
        outcome = "confirmed" if isinstance(frame.method, Basic.Ack) else "nacked"
        last = frame.method.delivery_tag
        tags = [tag for tag in self._on_the_way if tag <= last] if frame.method.multiple else [last]
        for tag in tags:
            entry = self._on_the_way.pop(tag)
            came_back = entry.message.key in self._returned
            self._returned.discard(entry.message.key)
            self._finish(entry, "returned" if came_back else outcome)
        self._pump()

    def _finish(self, entry: _Entry, outcome: str) -> None:
        with self._lock:
            self._in_hand.pop(entry.message.key)
            done = entry.done
        for tell in done:
            tell(outcome)

    def _check(self) -> None:
        oldest = next(iter(self._on_the_way.values()), None)
        if oldest and time.monotonic() - oldest.sent > CONFIRM_WITHIN:
            self._hang_up(f"no confirm within {CONFIRM_WITHIN} s")
        else:
            self._connection.ioloop.call_later(1, self._check)
