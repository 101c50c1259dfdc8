"""The bus over RabbitMQ: one connection to publish, one to consume, as an alarm that blocks the first spares acks."""

import functools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pika.exceptions import ChannelClosedByBroker

from core.base.ids import now, rfc3339
from core.bus.bus import Deliver, Done, Message, PublishOutcome, Subscriptions, TopologyMismatch
from core.bus.link import Link
from core.bus.publisher import Letter, Publisher
from core.bus.topology import EXCHANGE, dead_queue, declare, describe_mismatch, main_queue, retry_queue

log = logging.getLogger(__name__)
LOOK_EVERY = 5.0  # seconds between looks at queue lengths
DRAIN, CLOSE_WITHIN = 8.0, 5.0  # seconds on a stop that work in hand gets, and then what is not confirmed
MOST_TRIES = 1000  # that are believed
FORWARD_AGAIN = 5.0  # seconds until a copy that was not taken is sent again


class Rabbit(Link):
    """A RabbitMQ broker as a `Bus`: the link of consuming, and a publisher beside it.

    `delays` are the seconds for which there are retry queues. One channel is enough, as a prefetch counts for each of
    its consumers by itself.
    """

    def __init__(self, url: str, delays: Sequence[float]) -> None:
        super().__init__(url)
        self._delays, self.publisher = delays, Publisher(url)
        self.depths: dict[str, int] = {}
        self.dead: dict[str, int] = {}
        self._mismatch = ""
        self._lock = threading.Lock()

    @property
    def up(self) -> bool:
        return self.publisher.ready

    @property
    def consuming(self) -> bool:
        return self.ready

    def start_publishing(self) -> None:
        self.publisher.start()

    def publish(self, message: Message, done: Done) -> None:
        exchange, key = ("", main_queue(message.handler)) if message.handler else (EXCHANGE, message.type)
        letter = Letter(exchange, key, message.id, message.type, message.body, [done], mandatory=message.mandatory)
        self.publisher.publish(letter)

    def consume(
        self, subscriptions: Subscriptions, names: Sequence[str], prefetch: int, deliver: Deliver, stop: threading.Event
    ) -> None:
        self._subscriptions, self._names, self._prefetch = subscriptions, names, prefetch
        self._deliver, self._stop = deliver, stop
        self.start()
        while not (stop.wait(0.2) or self._mismatch):
            pass  # the loop's thread does it all
        self.end(DRAIN)
        if self._mismatch:
            raise TopologyMismatch(describe_mismatch(self._mismatch))

    def rebuild(self) -> None:
        self.call(self.hang_up, "a queue is gone")

    def close(self) -> None:
        self.publisher.end(CLOSE_WITHIN)

    # --- on the loop's thread

    def on_channel(self) -> None:
        with self._lock:
            self.in_hand, self._acked, self._released = set[int](), set[int](), set[int]()  # delivery tags
        self.channel.add_on_close_callback(self._on_channel_closed)
        self.channel.add_on_cancel_callback(lambda _: self.hang_up("a queue was deleted"))
        self.channel.basic_qos(prefetch_count=self._prefetch)  # never global: quorum queues refuse it
        declare(self.channel, self._subscriptions, self._delays, then=self._on_declared)

    def _on_channel_closed(self, _: Any, reason: Exception) -> None:
        # Later on the same code says that an ack came too late, and the next connection is a good one.
        if isinstance(reason, ChannelClosedByBroker) and reason.reply_code == 406 and not self.ready:
            self._mismatch = reason.reply_text

    def _on_declared(self) -> None:
        self.publisher.start()
        for name in self._names:
            self.channel.basic_consume(main_queue(name), functools.partial(self._on_message, name))
        self.ready = True
        self._look()

    def _look(self) -> None:
        # All handlers, also those that others consume: the sweep spares any queue that is crowded.
        for name in self._subscriptions:
            self._count(main_queue(name), functools.partial(self.depths.__setitem__, name))
        for name in self._names:
            self._count(dead_queue(name), functools.partial(self.dead.__setitem__, name))
        self.later(LOOK_EVERY, self._look)

    def _count(self, queue: str, tell: Callable[[int], object]) -> None:
        if self.channel.is_open:
            self.channel.queue_declare(queue, passive=True, callback=lambda frame: tell(frame.method.message_count))

    def _on_message(self, name: str, channel: Any, method: Any, props: Any, body: bytes) -> None:
        if self._stop.is_set():
            return  # not acked: another process gets it when this connection closes
        self.in_hand.add(method.delivery_tag)
        tries = (props.headers or {}).get("tries", 0)  # a header says what anybody likes
        tries = max(0, min(tries, MOST_TRIES)) if type(tries) is int else 0
        ack = functools.partial(self._ack, channel, method.delivery_tag)
        release = functools.partial(self._release, channel, method.delivery_tag)
        self._deliver(RabbitDelivery(self.publisher, name, props.message_id or "", body, tries, ack, release))

    def _ack(self, channel: Any, tag: int) -> None:
        with self._lock:
            if channel is self.channel:  # else its connection was lost: the message comes again
                self._acked.add(tag)
                if len(self._acked) == 1:  # else the call that is on its way takes this one along
                    self.call(self._flush)

    def _release(self, channel: Any, tag: int) -> None:
        if channel is self.channel:  # else its connection was lost: it comes again as it is
            self._released.add(tag)  # so that no ack of others goes past it
            self.in_hand.discard(tag)
            if not self._stop.is_set():
                self.rebuild()  # what is not acked when the connection closes comes again

    def _flush(self) -> None:
        with self._lock:
            acked, self._acked = self._acked, set()
        self.in_hand -= acked
        # Each ack is a write to the socket: everything below the oldest message not acked goes in one.
        oldest = min(self.in_hand | self._released, default=math.inf)
        together = {tag for tag in acked if tag < oldest}
        acks = [(tag, False) for tag in acked - together] + ([(max(together), True)] if together else [])
        if self.channel and self.channel.is_open:
            for tag, multiple in acks:
                self.channel.basic_ack(tag, multiple)


@dataclass
class RabbitDelivery:
    """A delivery of RabbitMQ."""

    publisher: Publisher
    handler: str
    id: str
    body: bytes
    tries: int
    ack: Callable[[], None]
    release: Callable[[], None]

    def retry(self, seconds: float, tries: int) -> None:
        self._forward(retry_queue(self.handler, seconds), {"tries": tries})

    def park(self, reason: str, tries: int) -> None:
        self._forward(dead_queue(self.handler), {"error": reason, "tries": tries, "time": rfc3339(now())})

    def _forward(self, queue: str, headers: dict[str, Any]) -> None:
        # The copy first, the ack when it is confirmed: the other way round, a crash between them loses the message.
        def done(outcome: PublishOutcome) -> None:
            if outcome == "confirmed":
                return self.ack()
            log.error("not forwarded; trying again", extra={"queue": queue, "outcome": outcome})
            if outcome == "unroutable":  # the queue is gone: have it declared anew
                return self.release()
            # The broker is away or full, and the message as safe with us as anywhere.
            again = threading.Timer(FORWARD_AGAIN, self._forward, [queue, headers])
            again.daemon = True
            again.start()

        self.publisher.publish(Letter("", queue, self.id, "", self.body, [done], headers))
