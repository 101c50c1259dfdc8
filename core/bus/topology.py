"""RabbitMQ: the exchange, each handler's queues, and what binds them."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from core.bus.bus import Subscriptions

EXCHANGE = "orders"
DELIVERY_LIMIT = 20  # then it goes to the dead letters: it brings down whoever takes it
UNLIMITED = 1_000_000  # a delivery limit as good as none; -1 destroys messages on RabbitMQ 3.10


def main_queue(handler: str) -> str:
    """Where a handler's events arrive."""
    return f"orders.{handler}"


def retry_queue(handler: str, seconds: float) -> str:
    """Where a failed event waits. One queue per delay: in a shared one the longest holds all up."""
    return f"orders.{handler}.retry.{seconds:.10g}"


def dead_queue(handler: str) -> str:
    """Where dead letters are parked."""
    return f"orders.{handler}.dead"


def queues_of(handler: str, delays: Sequence[float]) -> dict[str, dict[str, Any]]:
    """A handler's queues and their arguments; a queue comes behind the one it dead-letters into."""
    main, dead = main_queue(handler), dead_queue(handler)
    queues: dict[str, dict[str, Any]] = {dead: {"x-delivery-limit": UNLIMITED}}
    queues[main] = {"x-delivery-limit": DELIVERY_LIMIT} | _dead_letters_to(dead)
    for delay in delays:
        waiting = {"x-message-ttl": round(delay * 1000), "x-delivery-limit": UNLIMITED}
        queues[retry_queue(handler, delay)] = waiting | _dead_letters_to(main)
    return {queue: {"x-queue-type": "quorum"} | arguments for queue, arguments in queues.items()}


def _dead_letters_to(queue: str) -> dict[str, Any]:
    # At least once needs `reject-publish`; with any other overflow RabbitMQ quietly falls back to at most once.
    return {
        "x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue,
        "x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish",
    }  # fmt: skip


def declare(channel: Any, subscriptions: Subscriptions, delays: Sequence[float], then: Callable[[], object]) -> None:
    """Every queue of every handler, and only then the bindings, so that no event finds half of its queues.

    They are sent without waiting; `then` is called once the broker has answered the last. It closes the channel where
    one is there with other arguments: see `describe_mismatch`.
    """
    channel.exchange_declare(EXCHANGE, "topic", durable=True)
    for handler in subscriptions:
        for queue, arguments in queues_of(handler, delays).items():
            channel.queue_declare(queue, durable=True, arguments=arguments)
    for handler, types in subscriptions.items():
        for type in types:
            channel.queue_bind(main_queue(handler), EXCHANGE, type)
    channel.exchange_declare(EXCHANGE, passive=True, callback=lambda _: then())


def describe_mismatch(reply_text: str) -> str:
    """What the broker says where a queue or the exchange is there with other arguments, and what to do about it."""
    match = re.search(r"inequivalent arg '([^']+)' for (\w+) '([^']+)'.*?(received.*)", reply_text, re.DOTALL)
    difference = f"{match[2]} {match[3]} is there with another argument {match[1]}: {match[4]}" if match else reply_text
    return f"{difference}; delete it (a queue: once it is empty), or go back to the setting it was made with"
