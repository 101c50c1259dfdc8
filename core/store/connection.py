"""The connection to MongoDB, and what may go wrong with it. The errors of its driver stop in this folder."""

from typing import Any

import pymongo
from pymongo.monitoring import CommandListener, CommandStartedEvent
from pymongo.write_concern import WriteConcern

from core.base.metrics import STORE_COMMANDS


class StoreUnavailable(Exception):
    """The store did not answer in time. What was asked of it may or may not have happened."""


class StoreBusy(StoreUnavailable):
    """More is waiting for the store than the bound allows; nothing was done."""


class DocumentExists(Exception):
    """A unique index refused the write: the document is there already."""


class _CountCommands(CommandListener):
    def started(self, event: CommandStartedEvent) -> None:
        STORE_COMMANDS.labels(event.command_name).inc()

    def succeeded(self, event: Any) -> None:
        """Counted when started."""

    failed = succeeded


def connect(url: str) -> Any:
    """The database named in the URL (`orderproc` where none is). Connects when first used. `memory` is mongomock."""
    if url == "memory":
        import mongomock

        return mongomock.MongoClient()["orderproc"]
    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(
        url,
        serverSelectionTimeoutMS=2000, connectTimeoutMS=2000, socketTimeoutMS=2500, waitQueueTimeoutMS=2000,
        event_listeners=[_CountCommands()],
    )  # fmt: skip
    # Majority and journal: an order that was answered with 201 survives a fail-over and a power cut.
    return client.get_default_database("orderproc").with_options(write_concern=WriteConcern(w="majority", j=True))
