"""The seam to the broker: two verbs, publish and consume. RabbitMQ over pika; `localbus.py` is its twin in one process.

`publish` never blocks: it calls `done(outcome)` once, from a thread of the bus, with `confirmed` (it is on disk),
`returned` (no queue takes it), or `nacked`, `refused`, `dropped` (not sent, or nobody knows). `consume` calls
`deliver(delivery)` on its own thread, which must hand it on and return; what is not acked comes again with the same id.
Order is not promised, twice is possible. Errors of pika stop here, and only this file and `publisher.py` import it.
"""

import functools
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError, ChannelClosedByBroker, UnroutableError

from core.publisher import EXCHANGE, LARGEST_PAUSE, Message, Publisher, parameters, properties
from core.telemetry import DEAD_MESSAGES

__all__ = ["Admin", "BadTopology", "Bus", "Delivery", "Message", "Rabbit", "dead_queue", "main_queue", "retry_queue"]
log = logging.getLogger(__name__)
LOOK_EVERY = 5.0  # seconds between looks at queue lengths
DRAIN = 8.0  # seconds that work in hand gets on a stop
UNLIMITED = 1_000_000  # a delivery limit as good as none; -1 destroys messages on RabbitMQ 3.10

Topology = dict[str, list[str]]  # handler -> event types it takes


class BadTopology(Exception):
    """A queue is there with other arguments; the text names queue, argument and what to do."""


class _Lost(Exception):
    """The consumer is not what it was: connect again."""


class Delivery:
    """One message in hand. Exactly one of `ack` and `release` ends it, from any thread."""

    def __init__(self, handler: str, body: bytes, id: str, tries: int, end: Callable[[bool], None]) -> None:
        self.handler, self.body, self.id, self.tries, self._end = handler, body, id, tries, end

    def ack(self) -> None:
        """It is dealt with: forget it."""
        self._end(True)

    def release(self) -> None:
        """Leave it with the broker, which delivers it again after this process is gone."""
        self._end(False)


class Bus(Protocol):
    """What API and consumer need of a carrier."""

    @property
    def up(self) -> bool:
        """Publishing works, as far as is known."""

    consuming: bool  # the topology is there and every handler's consumer is attached
    depths: dict[str, int]  # queue -> messages, a few seconds old

    def publish(self, message: Message, done: Callable[[str], None]) -> None: ...

    def consume(
        self, topology: Topology, names: Sequence[str], prefetch: int,
        deliver: Callable[[Delivery], None], stop: threading.Event,
    ) -> None: ...  # fmt: skip

    def rebuild(self) -> None: ...

    def close(self) -> None: ...


def main_queue(handler: str) -> str:
    """Where a handler's events arrive."""
    return f"orders.{handler}"


def retry_queue(handler: str, delay: str) -> str:
    """Where a failed event waits `delay` seconds. One queue per delay: in a shared one the longest holds all up."""
    return f"orders.{handler}.retry.{delay}"


def dead_queue(handler: str) -> str:
    """Where events are parked."""
    return f"orders.{handler}.dead"


class Rabbit:
    """A RabbitMQ broker: one connection to publish, another to consume (an alarm that blocks the first spares acks)."""

    def __init__(self, url: str, delays: Sequence[str]) -> None:
        self._url, self._delays = url, delays
        self._publisher = Publisher(url)
        self.publish = self._publisher.publish
        self.depths: dict[str, int] = {}
        self.consuming = False
        self.rebuilding = threading.Event()

    @property
    def up(self) -> bool:
        return self._publisher.up

    def start_publishing(self) -> None:
        """Start the publisher. A process that consumes has it started when the queues are there."""
        self._publisher.start()

    def consume(
        self, topology: Topology, names: Sequence[str], prefetch: int,
        deliver: Callable[[Delivery], None], stop: threading.Event,
    ) -> None:  # fmt: skip
        """Consume the queues of `names` until `stop`, through any loss of the broker. Raises BadTopology."""
        pause = 0.5
        while not stop.is_set():
            try:
                with _connected(self._url) as connection:
                    declare(connection, topology, self._delays)
                    self._publisher.start()
                    pause = 0.5
                    _Session(self, connection, topology, names, prefetch, deliver).run(stop)
            except (AMQPError, OSError, _Lost) as error:
                log.warning("lost the broker; connecting again", extra={"error": repr(error)[:300]})
                stop.wait(random.uniform(pause / 2, pause))
                pause = min(pause * 2, LARGEST_PAUSE)
            finally:
                self.consuming = False

    def rebuild(self) -> None:
        """Connect and declare anew: something that should be there is not. What is in hand is delivered again."""
        self.rebuilding.set()

    def close(self) -> None:
        """Publish what is in hand, within a few seconds, and hang up."""
        self._publisher.close()


class _Session:
    """One connection's worth of consuming, on one channel: a prefetch counts for each of its consumers by itself."""

    def __init__(
        self, bus: Rabbit, connection: pika.BlockingConnection, topology: Topology, names: Sequence[str], prefetch: int,
        deliver: Callable[[Delivery], None],
    ) -> None:  # fmt: skip
        self._bus, self._connection, self._deliver = bus, connection, deliver
        # All of them, also what others consume: the sweep spares any queue that is full.
        self._names, self._queues = names, [f(name) for name in topology for f in (main_queue, dead_queue)]
        self._lock = threading.Lock()
        self._ended: list[tuple[int, bool]] = []  # (delivery tag, whether to ack), for the loop to deal with
        self._in_hand: set[int] = set()
        self._released: set[int] = set()
        self._stopping, self._cancelled = False, threading.Event()
        self._channel = connection.channel()
        self._channel.basic_qos(prefetch_count=prefetch)  # never global: quorum queues refuse it
        self._channel.add_on_cancel_callback(lambda _: self._cancelled.set())  # a queue was deleted
        for name in names:
            self._channel.basic_consume(main_queue(name), functools.partial(self._arrived, name))

    def run(self, stop: threading.Event) -> None:
        self._bus.consuming, look = True, 0.0
        while not stop.is_set():
            self._turn(0.5)
            # pika tells nobody when the broker closes a channel or cancels a consumer: look every turn.
            if self._cancelled.is_set() or self._bus.rebuilding.is_set() or not self._channel.is_open:
                self._bus.rebuilding.clear()
                raise _Lost("a channel was closed, a consumer cancelled, or a queue is gone")
            if time.monotonic() > look:
                self._bus.depths, look = self._lengths(), time.monotonic() + LOOK_EVERY
        self._stopping, deadline = True, time.monotonic() + DRAIN
        while self._in_hand and time.monotonic() < deadline:
            self._turn(0.1)

    def _turn(self, seconds: float) -> None:
        self._connection.process_data_events(time_limit=seconds)

    def _lengths(self) -> dict[str, int]:
        found = {queue: self._channel.queue_declare(queue, passive=True).method.message_count for queue in self._queues}
        for name in self._names:
            DEAD_MESSAGES.labels(name).set(found[dead_queue(name)])
        return found

    def _arrived(self, name: str, _: Any, method: Any, props: Any, body: bytes) -> None:
        if self._stopping:
            return  # not acked: another process gets it when this connection closes
        tries, tag = (props.headers or {}).get("tries", 0), method.delivery_tag
        self._in_hand.add(tag)
        end = functools.partial(self._end, tag)
        self._deliver(Delivery(name, body, props.message_id or "", tries if type(tries) is int else 0, end))

    def _end(self, tag: int, acked: bool) -> None:
        with self._lock:
            self._ended.append((tag, acked))
            if len(self._ended) > 1:
                return  # the callback that is on its way takes this one along
        try:
            self._connection.add_callback_threadsafe(self._flush)
        except AMQPError:
            log.info("a connection was lost before an ack; the message comes again")

    def _flush(self) -> None:
        with self._lock:
            ended, self._ended = self._ended, []
        ready = {tag for tag, acked in ended if acked}
        self._released |= {tag for tag, acked in ended if not acked}
        self._in_hand -= ready | self._released
        # Each ack is a write to the socket: everything below the oldest message not acked goes in one.
        oldest = min(self._in_hand | self._released, default=1 << 63)
        if together := {tag for tag in ready if tag < oldest}:
            self._channel.basic_ack(max(together), multiple=True)
        for tag in ready - together:
            self._channel.basic_ack(tag)


# --- topology ----------------------------------------------------------------------------------------------------


@contextmanager
def _connected(url: str) -> Iterator[pika.BlockingConnection]:
    connection = pika.BlockingConnection(parameters(url))
    try:
        yield connection
    finally:
        if connection.is_open:
            connection.close()


def declare(connection: pika.BlockingConnection, topology: Topology, delays: Sequence[str]) -> None:
    """Every queue of every handler, and only then the bindings, so that no event finds half of its queues."""
    channel = connection.channel()
    with _as_it_was(f"exchange {EXCHANGE}"):
        channel.exchange_declare(EXCHANGE, "topic", durable=True)
    for handler in topology:
        for queue, arguments in queues_of(handler, delays).items():
            with _as_it_was(f"queue {queue}"):
                channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum", **arguments})
    for handler, types in topology.items():
        for type in types:
            channel.queue_bind(main_queue(handler), EXCHANGE, type)
    channel.close()


def queues_of(handler: str, delays: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A handler's queues and their arguments; a queue comes behind the one it dead-letters into."""
    main, dead = main_queue(handler), dead_queue(handler)
    return {
        dead: {"x-delivery-limit": UNLIMITED},
        main: {"x-delivery-limit": 20, **_dead_letters_to(dead)},
        **{
            retry_queue(handler, delay): {
                "x-message-ttl": round(float(delay) * 1000), "x-delivery-limit": UNLIMITED, **_dead_letters_to(main)
            }
            for delay in delays
        },
    }  # fmt: skip


def _dead_letters_to(queue: str) -> dict[str, Any]:
    # At least once needs `reject-publish`; with any other overflow RabbitMQ quietly falls back to at most once.
    return {
        "x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue,
        "x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish",
    }  # fmt: skip


@contextmanager
def _as_it_was(what: str) -> Iterator[None]:
    try:
        yield
    except ChannelClosedByBroker as error:
        if error.reply_code != 406:
            raise
        found = re.search(r"inequivalent arg '([^']+)'.*?(received.*)", error.reply_text, re.DOTALL)
        how = f"argument {found[1]}: {found[2]}" if found else error.reply_text
        advice = "delete it (a queue: once it is empty), or go back to the setting it was made with"
        raise BadTopology(f"{what} is there with another {how}; {advice}") from None


# --- commands ----------------------------------------------------------------------------------------------------


class Admin:
    """What the commands of consumer.py do to the queues of one handler. Raises BusAway."""

    most_shown = 1000  # parked messages in a list

    def __init__(self, url: str, handler: str, delays: Sequence[str]) -> None:
        self._url, self._handler, self._delays = url, handler, delays

    def dead(self, limit: int = most_shown) -> list[tuple[bytes, dict[str, Any]]]:
        """(body, headers) of what is parked, oldest first. Looking leaves everything where it is."""
        with self._channel() as channel:
            got = iter(lambda: channel.basic_get(dead_queue(self._handler)), (None, None, None))
            return [(body, _headers(props)) for (_, props, body), _ in zip(got, range(limit), strict=False)]

    def redrive(self, limit: int) -> int:
        """Send parked events round again: publish, wait for the confirm, and only then take away; gives how many."""
        with self._channel() as channel:
            channel.confirm_delivery()
            waiting = channel.queue_declare(dead_queue(self._handler), passive=True).method.message_count
            for count in range(min(limit, waiting)):
                method, props, body = channel.basic_get(dead_queue(self._handler))
                if method is None:
                    return count
                message = Message(props.message_id or "", props.type or "", body, queue=main_queue(self._handler))
                channel.basic_publish("", message.queue, body, properties(message), mandatory=True)
                channel.basic_ack(method.delivery_tag)
            return min(limit, waiting)

    def purge(self) -> int:
        """Throw away what is parked; gives how many."""
        with self._channel() as channel:
            return channel.queue_purge(dead_queue(self._handler)).method.message_count

    def retire(self) -> int:
        """Delete every queue of the handler, and with them their bindings; gives how many messages went with them."""
        with self._channel() as channel:
            channel.queue_declare(dead_queue(self._handler), passive=True)  # deleting what is not there is no error
            queues = reversed(queues_of(self._handler, self._delays))  # that one last, so that this can be repeated
            return sum(channel.queue_delete(queue).method.message_count for queue in queues)

    @contextmanager
    def _channel(self) -> Iterator[BlockingChannel]:
        try:
            with _connected(self._url) as connection:
                yield connection.channel()
        except ChannelClosedByBroker as error:
            raise BusAway(f"{self._handler}: {error.reply_text}; is that its name, and did it ever run?") from None
        except UnroutableError:
            raise BusAway(f"{main_queue(self._handler)} is not there; start a consumer, which declares it") from None
        except (AMQPError, OSError) as error:
            raise BusAway(f"RabbitMQ does not answer: {error!r}") from None


class BusAway(Exception):
    """The broker did not do what a command asked."""


def _headers(props: pika.BasicProperties) -> dict[str, Any]:
    headers = dict(props.headers or {})
    if not headers.get("error") and headers.get("x-death"):  # the broker parked it: it brought down too many consumers
        death = headers["x-death"][0]
        headers |= {"error": death["reason"], "time": f"{death['time']:%Y-%m-%dT%H:%M:%S}Z"}
    return headers
