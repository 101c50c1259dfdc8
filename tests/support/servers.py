"""Servers for tests: a store and a RabbitMQ node of our own, to be stopped and frozen, a router to cut connections,
a receiver of webhooks, and a look into any broker."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pika
import pymongo
import pytest

from core.bus.link import parameters
from core.bus.topology import queues_of
from tools.chaos.system import free_port, wait_for

used: set[str] = set()  # the carriers and stores that tests ran on; the summary of the session names them

# --- stores


class StoreServer:
    """A SecantusDB process on a folder of its own, which tests may stop, freeze and start again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.start()

    def start(self) -> None:
        program = Path(sys.executable).parent / "secantusd-py"
        if not program.exists():
            pytest.skip("no SecantusDB here: it has no wheel for this Python")  # in CI a skip is a failure
        command = [program, "--port", str(self.port), "--storage-path", self.folder / "data"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self._listens, 30, "the store listens")

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def url(self, database: str) -> str:
        return f"mongodb://127.0.0.1:{self.port}/{database}?retryWrites=false&directConnection=true"


class NamedServer:
    """The server that TEST_MONGODB_URL names. Databases are dropped before they are given out and at the end."""

    def __init__(self, url: str) -> None:
        self._url, self._given = urlsplit(url), set()
        self._client = pymongo.MongoClient(url, serverSelectionTimeoutMS=5000)
        try:
            self.version = self._client.server_info()["version"]
        except pymongo.errors.PyMongoError as error:
            self._client.close()
            pytest.fail(f"no store at TEST_MONGODB_URL: {error!r}")

    def url(self, database: str) -> str:
        self._client.drop_database(database)
        self._given.add(database)
        return self._url._replace(path=f"/{database}").geturl()

    def stop(self) -> None:
        for database in self._given:
            self._client.drop_database(database)
        self._client.close()


# --- RabbitMQ

STANDARD = ("inventory", "shipping", "email")
# Debian's wrapper in the PATH drops to another user; the program behind it takes our folder and our user.
PROGRAMS = Path("/usr/lib/rabbitmq/bin")


@contextmanager
def channel_to(url: str) -> Iterator[pika.channel.Channel]:
    """A channel on a connection of its own."""
    connection = pika.BlockingConnection(parameters(url))
    try:
        yield connection.channel()
    finally:
        if connection.is_open:
            connection.close()


def length(url: str, queue: str) -> int:
    """How many messages wait in a queue; -1 where there is no such queue."""
    try:
        with channel_to(url) as channel:
            return channel.queue_declare(queue, passive=True).method.message_count
    except pika.exceptions.ChannelClosedByBroker:
        return -1


def consumers(url: str, queue: str) -> int:
    """How many consume a queue; 0 also where there is no such queue."""
    try:
        with channel_to(url) as channel:
            return channel.queue_declare(queue, passive=True).method.consumer_count
    except pika.exceptions.ChannelClosedByBroker:
        return 0


def put(url: str, queue: str, *bodies: bytes, **properties: object) -> None:
    """Publish as somebody who is not us would."""
    with channel_to(url) as channel:
        channel.confirm_delivery()
        for body in bodies:
            channel.basic_publish("", queue, body, pika.BasicProperties(**properties), mandatory=True)


def declare_queues(url: str, names: Sequence[str], delays: Sequence[float]) -> None:
    """Have the queues of these handlers, without a consumer and empty."""
    with channel_to(url) as channel:
        for name in names:
            for queue, arguments in queues_of(name, delays).items():
                channel.queue_declare(queue, durable=True, arguments=arguments)
                channel.queue_purge(queue)


def delete_queues(url: str, names=STANDARD, delays=(2, 15, 90, 900, 0.1, 0.2, 0.3, 0.5, 1)) -> None:
    with channel_to(url) as channel:
        for name in names:
            for queue in queues_of(name, delays):
                channel.queue_delete(queue)


class Router:
    """Stands between us and the broker of a URL, and passes everything on until a connection is `cut`.

    A new connection hears nothing for the first `delay` seconds.
    """

    def __init__(self, url: str, delay: float = 0) -> None:
        self._delay, there = delay, urlsplit(url)
        self._target, self._sides = (there.hostname, there.port or 5672), list[tuple[socket.socket, socket.socket]]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        account, _, _ = there.netloc.rpartition("@")
        self.url = there._replace(netloc=f"{account}@127.0.0.1:{self._listener.getsockname()[1]}").geturl()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                sides = self._listener.accept()[0], socket.create_connection(self._target)
                self._sides.append(sides)
                for one, other in (sides, sides[::-1]):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        time.sleep(self._delay)
        with suppress(OSError):  # cut
            while data := one.recv(65536):
                other.sendall(data)
        _hang_up(one, other)

    def cut_all(self) -> None:
        """End every connection that there is."""
        for number in range(self.connections):
            self.cut(number)

    @property
    def connections(self) -> int:
        """How many there were so far."""
        return len(self._sides)

    def cut(self, number: int) -> None:
        """End a connection as a router does that lost it: no goodbye. They are numbered as they were made."""
        _hang_up(*self._sides[number])

    def close(self) -> None:
        _hang_up(self._listener, *sum(self._sides, ()))


def _hang_up(*sockets: socket.socket) -> None:
    for each in sockets:
        with suppress(OSError):  # the other side was first
            each.shutdown(socket.SHUT_RDWR)  # wakes whoever reads from it
        each.close()


def installed(name: str) -> str | None:
    """Where a program of RabbitMQ is; None where it is not installed."""
    return shutil.which(name, path=str(PROGRAMS)) or shutil.which(name)


class BrokerNode:
    """A RabbitMQ node on a folder: its own name, ports and data, to be killed, frozen and started again.

    What it stored survives `kill` and `start`. It never touches the broker that AMQP_URL names. It needs the program
    `rabbitmq-server` on this machine, and no rights.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.port = folder, free_port()
        self._name = f"orderproc-{self.port}@localhost"
        folder.joinpath("plugins").write_text("[].")
        folder.joinpath("rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self.port}\n")
        self._environment = {
            **os.environ, "HOME": str(folder), "RABBITMQ_NODENAME": self._name, "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()), "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"), "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"), "RABBITMQ_PID_FILE": str(folder / "pid"),
        }  # fmt: skip
        self._process: subprocess.Popen | None = None

    def url(self, **query: object) -> str:
        """Its AMQP URL; `heartbeat=4` and the like go into the query."""
        args = "&".join(f"{name}={value}" for name, value in query.items())
        return f"amqp://guest:guest@127.0.0.1:{self.port}/%2F" + (f"?{args}" if args else "")

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        with self._folder.joinpath("output").open("ab") as output:
            self._process = subprocess.Popen(
                [installed("rabbitmq-server")], env=self._environment, cwd=self._folder,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        wait_for(self._answers, 60, "the second broker answers")

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._folder.joinpath("output").read_text()[-2000:]
        try:
            pika.BlockingConnection(pika.URLParameters(self.url(socket_timeout=2))).close()
            return True
        except (pika.exceptions.AMQPError, OSError):
            return False

    def kill(self) -> None:
        """kill -9: the node gets no chance to tidy up."""
        if self._process:
            with suppress(ProcessLookupError):  # one that could not start
                self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def let_queues_settle(self) -> None:
        """RabbitMQ 3.10 writes a new quorum queue to disk a moment late: one killed before it never comes back."""
        time.sleep(2)

    def freeze(self) -> None:
        """Stop every thread of it; its sockets stay open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)  # its own group: the start script and the virtual machine below it

    def ctl(self, *args: str) -> str:
        """What rabbitmqctl prints."""
        command = [installed("rabbitmqctl"), "-n", self._name, "--quiet", *args]
        ran = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout


# --- webhooks


class Receiver(HTTPServer):
    """Keeps what is posted to `url`, as (headers, body), and answers each time with the next of `answers`."""

    def __init__(self, *answers: int) -> None:
        super().__init__(("127.0.0.1", 0), _Keep)
        self.url = f"http://127.0.0.1:{self.server_port}/orders"
        self.answers, self.got = list(answers), []
        self._thread = threading.Thread(target=self.serve_forever, args=[0.05])

    def __enter__(self) -> "Receiver":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Keep(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.headers, body))
        self.send_response(self.server.answers.pop(0))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""
