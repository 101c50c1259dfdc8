"""The stores that the suites of store and stock run on."""

import pytest

from core.store.connection import connect
from core.store.store import Store
from tests.support.samples import an_attempt


@pytest.fixture(params=["mongomock", "server"])
def database(request):
    """An empty database: in memory, and on a server."""
    if request.param == "mongomock":
        yield connect("memory")
        return
    database = connect(request.getfixturevalue("store_server").url(f"suite_{an_attempt()}"))
    yield database
    database.client.drop_database(database.name)
    database.client.close()


@pytest.fixture
def store(database):
    return Store(database)
