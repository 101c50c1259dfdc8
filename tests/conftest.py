"""Fixtures for the servers that tests run on: a MongoDB-wire server of our own, and the RabbitMQ that AMQP_URL names.

Broker tests run where a broker answers. In CI, or where AMQP_URL is set, one that does not answer is a failure. With
TEST_MONGODB_URL the store is the server it names, but for the tests that stop or freeze theirs. The summary names the
carriers and stores that ran.
"""

import os

import pika
import pytest

from core.bus.link import parameters
from core.bus.topology import main_queue
from tests.support.servers import STANDARD, NamedServer, StoreServer, channel_to, delete_queues, used

DEFAULT_BROKER = "amqp://guest:guest@127.0.0.1:5672/%2F"


@pytest.fixture(scope="session")
def store_server(tmp_path_factory):
    """One store for the whole session: use a database name of your own."""
    if url := os.environ.get("TEST_MONGODB_URL"):
        server = NamedServer(url)
        used.add(f"store: TEST_MONGODB_URL, version {server.version}")
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
    # pika shows the broker's version nowhere else.
    used.add("carrier: RabbitMQ " + connection._impl.server_properties["version"])
    connection.close()
    _refuse_a_broker_in_use(url)
    return url


def _refuse_a_broker_in_use(url: str) -> None:
    for name in STANDARD:
        try:
            with channel_to(url) as channel:
                consumers = channel.queue_declare(main_queue(name), passive=True).method.consumer_count
        except pika.exceptions.ChannelClosedByBroker:
            continue  # no such queue, as it should be
        if consumers:
            pytest.fail(f"{main_queue(name)} has a consumer: point AMQP_URL to a vhost for tests; these delete queues")


@pytest.fixture
def rabbit(broker_url):
    """The broker's URL, with no queues of ours before and after."""
    delete_queues(broker_url)
    yield broker_url
    delete_queues(broker_url)


def pytest_sessionfinish(session):
    """In CI nothing may be skipped: a broker test that did not run proves nothing."""
    skipped = session.config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    if os.environ.get("CI") and skipped:
        used.add(f"{len(skipped)} SKIPPED, which CI does not allow")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    used.add("carrier: memory")
    used.add("store: mongomock")
    terminalreporter.write_line("ran on " + ", ".join(sorted(used)))
