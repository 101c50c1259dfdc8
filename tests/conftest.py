"""The servers that tests run on: a MongoDB-wire server of our own, and the RabbitMQ that AMQP_URL names.

Broker tests run where a broker answers. In CI, or where AMQP_URL is set, one that does not answer is a failure. With
TEST_MONGODB_URL the store is the server it names, but for the tests that stop or freeze theirs. The summary names the
carriers and stores that ran.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pika
import pymongo
import pytest

from core.bus import queues_of
from core.publisher import parameters
from tools.chaos.system import free_port, wait_for

DEFAULT_BROKER = "amqp://guest:guest@127.0.0.1:5672/%2F"
STANDARD = ("inventory", "shipping", "email")
used: set[str] = set()


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


@pytest.fixture(scope="session")
def store_server(tmp_path_factory):
    """One store for the whole session: use a database name of your own."""
    if url := os.environ.get("TEST_MONGODB_URL"):
        server = NamedServer(url)
        used.add(f"store: TEST_MONGODB_URL, which says it is {server.version}")
    else:
        server = StoreServer(tmp_path_factory.mktemp("store"))
        used.add("store: SecantusDB")
    yield server
    server.stop()


@pytest.fixture
def own_store_server(tmp_path):
    """A store to be stopped and frozen."""
    server = StoreServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def broker_url() -> str:
    """A broker nobody else uses at the moment: its `orders.*` queues are deleted by the tests."""
    url = os.environ.get("AMQP_URL", DEFAULT_BROKER)
    try:
        connection = pika.BlockingConnection(parameters(url))
    except (pika.exceptions.AMQPError, OSError) as error:
        if os.environ.get("CI") or "AMQP_URL" in os.environ:
            pytest.fail(f"no broker at AMQP_URL: {error!r}")
        pytest.skip("no broker answers; set AMQP_URL to run the broker tests")
    used.add("carrier: RabbitMQ " + connection._impl.server_properties["version"])
    connection.close()
    _refuse_a_broker_in_use(url)
    return url


def _refuse_a_broker_in_use(url: str) -> None:
    for name in STANDARD:
        connection = pika.BlockingConnection(parameters(url))
        try:
            found = connection.channel().queue_declare(f"orders.{name}", passive=True).method
            if found.consumer_count:
                pytest.fail(f"orders.{name} has a consumer: point AMQP_URL to a vhost for tests; these delete queues")
        except pika.exceptions.ChannelClosedByBroker:
            continue  # no such queue, as it should be
        finally:
            if connection.is_open:
                connection.close()


@pytest.fixture
def rabbit(broker_url):
    """The broker's URL, with no queues of ours before and after."""
    delete_queues(broker_url)
    yield broker_url
    delete_queues(broker_url)


def delete_queues(url: str, names=STANDARD, delays=("2", "15", "90", "0.1", "0.2", "0.3", "0.5", "1")) -> None:
    connection = pika.BlockingConnection(parameters(url))
    channel = connection.channel()
    for name in names:
        for queue in queues_of(name, delays):
            channel.queue_delete(queue)
    connection.close()


def pytest_sessionfinish(session):
    """In CI nothing may be skipped: a broker test that did not run proves nothing."""
    skipped = session.config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    if os.environ.get("CI") and skipped:
        used.add(f"{len(skipped)} SKIPPED, which CI does not allow")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    used.add("carrier: in-process")
    used.add("store: mongomock")
    terminalreporter.write_line("ran on " + ", ".join(sorted(used)))
