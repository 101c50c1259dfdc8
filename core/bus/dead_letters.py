"""RabbitMQ: what the commands of consumer.py do to one handler's queues."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError, ChannelClosedByBroker, UnroutableError

from core.bus.bus import BrokerUnavailable
from core.bus.link import parameters
from core.bus.publisher import Letter
from core.bus.topology import dead_queue, main_queue, queues_of

MOST_SHOWN = 1000  # dead letters in a list


class QueueMissing(BrokerUnavailable):
    """The handler has no queues."""


class DeadLetters:
    """What was parked for a handler. Raises BrokerUnavailable."""

    def __init__(self, url: str, handler: str) -> None:
        self._url, self._handler, self._queue = url, handler, dead_queue(handler)

    def count(self) -> int:
        """How many are parked."""
        with self._channel() as channel:
            return channel.queue_declare(self._queue, passive=True).method.message_count

    def show(self, limit: int = MOST_SHOWN) -> list[tuple[bytes, dict[str, Any]]]:
        """(body, headers) of what is parked, oldest first. Looking leaves everything where it is."""
        with self._channel() as channel:
            return [(body, _headers(props)) for _, props, body in self._fetch(channel, limit)]

    def redrive(self, limit: int) -> Iterator[int]:
        """Send parked events round again: publish, wait for the confirm, and only then take away. Counts them."""
        with self._channel() as channel:
            channel.confirm_delivery()
            for count, (method, props, body) in enumerate(self._fetch(channel, limit), 1):
                letter = Letter("", main_queue(self._handler), props.message_id or "", props.type or "", body)
                channel.basic_publish("", letter.routing_key, body, letter.properties(), mandatory=True)
                channel.basic_ack(method.delivery_tag)
                yield count

    def _fetch(self, channel: BlockingChannel, limit: int) -> Iterator[tuple[Any, Any, bytes]]:
        waiting = channel.queue_declare(self._queue, passive=True).method.message_count
        for _ in range(min(limit, waiting)):
            method, props, body = channel.basic_get(self._queue)
            if method:
                yield method, props, body

    def purge(self) -> int:
        """Throw away what is parked; gives how many."""
        with self._channel() as channel:
            return channel.queue_purge(self._queue).method.message_count

    def retire(self, delays: Sequence[float]) -> int:
        """Delete every queue of the handler, and with them their bindings; gives how many messages went with them."""
        with self._channel() as channel:
            channel.queue_declare(self._queue, passive=True)  # deleting what is not there is no error
            queues = reversed(queues_of(self._handler, delays))  # that one last, so that this can be repeated
            return sum(channel.queue_delete(queue).method.message_count for queue in queues)

    @contextmanager
    def _channel(self) -> Iterator[BlockingChannel]:
        try:
            with pika.BlockingConnection(parameters(self._url)) as connection:
                yield connection.channel()
        except ChannelClosedByBroker as error:
            question = "is that its name, and did it ever run?"
            raise QueueMissing(f"{self._handler}: {error.reply_text}; {question}") from None
        except UnroutableError:
            queue = main_queue(self._handler)
            raise BrokerUnavailable(f"{queue} is not there; start a consumer, which declares it") from None
        except (AMQPError, OSError) as error:
            raise BrokerUnavailable(f"RabbitMQ does not answer: {error!r}") from None


def _headers(props: pika.BasicProperties) -> dict[str, Any]:
    headers = dict(props.headers or {})
    if not headers.get("error") and headers.get("x-death"):  # the broker parked it: it brought down too many consumers
        death = headers["x-death"][0]
        headers |= {"error": death["reason"], "time": f"{death['time']:%Y-%m-%dT%H:%M:%S}Z"}
    return headers
