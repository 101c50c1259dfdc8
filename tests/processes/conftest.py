"""The program as real processes, on real servers or with everything built in."""

import uuid

import pytest

from tools.chaos.system import System


@pytest.fixture
def system(tmp_path, store_server, rabbit):
    """A function that starts the system on the session's store and broker; it ends with the test."""
    running = []

    def start(mongodb_url: str | None = None, amqp_url: str | None = None, **environment: str) -> System:
        url = mongodb_url or store_server.url(f"t{uuid.uuid4().hex}")
        running.append(System(tmp_path, url, amqp_url or rabbit, **environment))
        return running[-1].__enter__()

    yield start
    for each in running:
        each.__exit__()


@pytest.fixture
def embedded(tmp_path):
    """The same, with store and bus inside the API's process."""
    running = []

    def start(mongodb_url: str = "embedded", amqp_url: str = "embedded", **environment: str) -> System:
        running.append(System(tmp_path, mongodb_url, amqp_url, **environment))
        return running[-1].__enter__()

    yield start
    for each in running:
        each.__exit__()
