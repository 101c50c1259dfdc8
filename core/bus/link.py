"""A connection to RabbitMQ on a thread of its own, made again whenever it is lost."""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pika
from pika.adapters.select_connection import IOLoop

log = logging.getLogger(__name__)
HANDSHAKE_WITHIN = 10.0  # seconds that one address of the broker gets
FIRST_PAUSE, LARGEST_PAUSE = 0.5, 15.0  # seconds between attempts to connect
LONG_SESSION = 30.0  # seconds; after a shorter one the pause grows
GOODBYE = 3.0  # seconds that the broker gets to answer when we hang up: a frozen one never does


def parameters(url: str) -> pika.URLParameters:
    """Connection parameters with bounds on every wait; what the URL says itself stands."""
    parsed = pika.URLParameters(url)
    parsed.heartbeat = 15 if parsed.heartbeat is None else parsed.heartbeat
    parsed.blocked_connection_timeout = parsed.blocked_connection_timeout or 30
    parsed.socket_timeout, parsed.stack_timeout = 5, HANDSHAKE_WITHIN
    return parsed


class Link:
    """Connects, opens a channel, and does it again after a pause when either is gone. Subclasses say what for.

    What is named `on_...` runs on the thread of the connection's loop; pika is called there and nowhere else.
    """

    def __init__(self, url: str) -> None:
        self._url, self._closing = url, threading.Event()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._loop: Any = None
        self._connection: Any = None
        self.channel: Any = None
        self.ready = False  # for what the subclass does with it; false again when the connection is gone
        self.in_hand: Any = ()  # a collection: what a stop waits for

    def start(self) -> None:
        """Start the thread, once."""
        if not self._thread.ident:
            self._thread.start()

    def end(self, within: float) -> None:
        """Give what is in hand some seconds, as long as the connection lasts; then hang up, for good."""
        deadline = time.monotonic() + within
        while self.ready and self.in_hand and time.monotonic() < deadline:
            time.sleep(0.02)
        self._closing.set()
        self.call(self.hang_up, "closing")
        if self._thread.ident:
            self._thread.join(GOODBYE + 1)

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Have a function called on the loop's thread, from any other."""
        try:
            self._loop.add_callback_threadsafe(lambda: function(*args))
        except Exception as error:  # the loop is gone, and with it the need for the call
            log.debug("no connection", extra={"error": repr(error)})

    def on_channel(self) -> None:
        """There is a new `channel`, and nothing of what the one before had under way."""

    def later(self, seconds: float, function: Callable[[], object]) -> None:
        """Call a function after a while, if this connection is still there. On the loop's thread."""
        self._loop.call_later(seconds, function)

    def hang_up(self, reason: object) -> None:
        """End this connection; unless we are closing, another one follows. On the loop's thread."""
        # One that is only being made needs no end: it starts anew as it is.
        if self._connection and self._connection.is_open:
            self._log("hanging up on the broker", reason)
            self.later(GOODBYE, self._loop.stop)
            self._connection.close()

    def _log(self, message: str, reason: object) -> None:
        if not self._closing.is_set():
            log.warning(f"{message}; connecting again", extra={"error": str(reason)[:300]})

    # --- the thread

    def _run(self) -> None:
        pause = 0.0
        while not self._closing.wait(random.uniform(pause / 2, pause)):  # jitter: not every process at the same moment
            started = time.monotonic()
            try:
                self._session()
            except Exception:
                log.exception("a connection to the broker stumbled; connecting again")
            long = time.monotonic() - started > LONG_SESSION
            pause = FIRST_PAUSE if long else min(max(pause * 2, FIRST_PAUSE), LARGEST_PAUSE)

    def _session(self) -> None:
        self._loop = IOLoop()
        # Not SelectConnection() itself: it gives up at the first address that accepts and then says nothing.
        pika.SelectConnection.create_connection([parameters(self._url)], self._connected, self._loop)
        try:
            self._loop.start()
        finally:
            self.ready, self.channel = False, None
            self._loop.close()

    def _connected(self, result: Any) -> None:
        if isinstance(result, BaseException):
            return self._ended(None, result)
        self._connection = result
        result.add_on_close_callback(self._ended)
        result.channel(on_open_callback=self._opened)

    def _opened(self, channel: Any) -> None:
        self.channel = channel
        channel.add_on_close_callback(lambda _, reason: self.hang_up(repr(reason)))
        if self._closing.is_set():  # since we began to connect
            self.hang_up("closing")
        else:
            self.on_channel()

    def _ended(self, _: Any, reason: object) -> None:
        self._log("lost the broker", repr(reason))
        self._loop.stop()
