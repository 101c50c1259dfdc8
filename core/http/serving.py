"""Serving a WSGI app with waitress: limits, and an end at which everything accepted is answered."""

import math
import select
import socket
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import waitress

from core.base.settings import SettingInvalid

DRAIN_SECONDS = 8  # whoever sends SIGTERM waits ten at least
LIMITS = {
    "max_request_header_size": 32 * 1024, "max_request_body_size": 1024 * 1024, "connection_limit": 1000,
    "channel_timeout": 60, "log_socket_errors": False, "ident": None,
}  # fmt: skip


_waiting_since: ContextVar[float] = ContextVar("waiting_since")


def seconds_waited() -> float:
    """How long the request in hand waited for a thread; 0 where nothing keeps it waiting."""
    return max(0.0, time.monotonic() - _waiting_since.get(math.inf))


class Queued:
    """A request that waits for a thread of waitress, and since when."""

    def __init__(self, channel: Any) -> None:
        self._channel, self._since = channel, time.monotonic()
        self.cancel = channel.cancel

    def service(self) -> None:
        """Answer it, on the thread."""
        _waiting_since.set(self._since)
        self._channel.service()


def serve(
    app: Any, host: str, port: int, threads: int, stop: threading.Event, listening: Callable[[str], object]
) -> None:
    """Answer until `stop` is set; then what was accepted is answered, new connections are refused, and this returns.

    `listening` is told the address. Raises SettingInvalid where HOST and PORT cannot be listened on.
    """
    sockets: dict[int, Any] = {}
    server = listen(app, host, port, threads, sockets=sockets)
    listening(f"http://{host}:{server.effective_port}")
    turn = partial(server.asyncore.loop, use_poll=True, map=sockets, count=1)
    while not stop.is_set():  # its own loop could not be left without cutting off whoever waits for an answer
        turn(timeout=0.2)
    drain(server, turn)


def listen(app: Any, host: str, port: int, threads: int, variables: str = "HOST, PORT", sockets: Any = None) -> Any:
    """A server that listens, with a map of its sockets. Raises SettingInvalid, which names the variables."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SettingInvalid(f"{variables}: cannot listen on {host} {port}: {error.strerror}") from None
    server = waitress.create_server(app, sockets, sockets=[listener], threads=threads, **LIMITS)
    server.add_task = lambda channel: server.task_dispatcher.add_task(Queued(channel))
    return server


def drain(server: Any, turn: Callable[..., None]) -> None:
    """Answer what was accepted, for some seconds at most."""
    while select.select([server.socket], [], [], 0)[0]:
        server.handle_accept()  # who connected before now is answered
    server.del_channel()
    server.socket.close()
    end = time.monotonic() + DRAIN_SECONDS
    while server.active_channels and time.monotonic() < end:
        turn(timeout=0.05)
        for channel in server.active_channels.values():
            if channel.requests:
                channel.requests[-1].headers["CONNECTION"] = "close"  # so the answer says it, and no more is sent here
            channel.will_close |= not (channel.requests or channel.request or channel.total_outbufs_len)
    server.task_dispatcher.shutdown(timeout=1)
    server.close()
