"""The connection to MongoDB, and what may go wrong with it. The errors of its driver stop in this folder."""

import logging
import re
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import bson
import pymongo
from bson.codec_options import CodecOptions
from pymongo import IndexModel, InsertOne, UpdateOne, errors
from pymongo.monitoring import CommandListener, CommandStartedEvent
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from core.base.metrics import STORE_COMMANDS
from core.base.settings import SettingInvalid

log = logging.getLogger(__name__)
# What the program rests on, whatever the URL says. Repeating is our business: every write of ours may be repeated or is
# marked as one that may not, so the driver's retries add nothing, and some servers refuse them.
OPTIONS: dict[str, Any] = {
    "appname": "orderproc", "retryWrites": False, "timeoutMS": 10_000, "serverSelectionTimeoutMS": 2000,
    "connectTimeoutMS": 2000,
}  # fmt: skip
# Decisions are read where they are made. Majority and journal: an order that was answered with 201 survives a fail-over
# and a power cut.
GUARANTEES: tuple[Any, ...] = (
    CodecOptions(), ReadPreference.PRIMARY, WriteConcern(w="majority", j=True), ReadConcern("local")
)  # fmt: skip
WRONG_PASSWORD = (18, 8000)  # AuthenticationFailed; 8000 is Atlas' word for it
HINT = "it must be mongodb://user:password@host:port/database, and @ : / % in user or password are %40 %3A %2F %25"
INDEX_WITHIN, INDEX_PAUSE = 3600, 60  # seconds that the making of an index gets, and between two tries
INDEX_HEAD_START = 1.0  # seconds that a start waits for it

_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))


class StoreUnavailable(Exception):
    """The store did not do in time what it was asked. It may or may not have happened, or happen yet."""


class StoreBusy(StoreUnavailable):
    """More is waiting for the store than the bound allows; nothing was done."""


class DocumentExists(Exception):
    """A unique index refused the write: the document is there already."""


class DocumentRefused(Exception):
    """The write was not made and never will be: what it says cannot be stored."""


class KeyReused(Exception):
    """The Idempotency-Key was used before, with another body."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What this thread asks of the store inside the block is answered, or given up, by then."""
    token = _deadline.set(min(_deadline.get(), time.monotonic() + seconds))
    try:
        yield
    finally:
        _deadline.reset(token)


def time_left(most: float) -> float:
    """Seconds until the deadline of the block we are in, at most so many."""
    return max(0.0, min(most, _deadline.get() - time.monotonic()))


class _CountCommands(CommandListener):
    def started(self, event: CommandStartedEvent) -> None:
        STORE_COMMANDS.labels(event.command_name).inc()

    def succeeded(self, event: Any) -> None:
        """Counted when started."""

    failed = succeeded


def connect(url: str, connections: int = 100) -> Any:
    """The database that the URL names, `orderproc` where it names none; `memory` is mongomock.

    Raises SettingInvalid where the URL can never work. A store that is only away is waited for by whoever needs it.
    """
    if url == "memory":
        import mongomock

        return mongomock.MongoClient()["orderproc"]
    options = {"maxPoolSize": connections, "event_listeners": [_CountCommands()], **OPTIONS}
    try:
        if "@" in url.partition("://")[2].partition("?")[0].partition("/")[2]:
            raise ValueError("cannot be used")  # the driver would take what is before the / for the host
        with warnings.catch_warnings(action="error", category=UserWarning):  # of an option that it does not know
            warnings.filterwarnings("ignore", "You appear to be connected")  # to a service that is not quite MongoDB
            client: Any = pymongo.MongoClient(url, **options)
        database = client.get_default_database("orderproc").with_options(*GUARANTEES)
        with suppress(errors.ConnectionFailure), pymongo.timeout(2):
            database.command("ping")
    except errors.OperationFailure as error:
        if error.code in WRONG_PASSWORD:
            raise SettingInvalid(f"MONGODB_URL: the store refuses this user or password; {HINT}") from None
    except (errors.PyMongoError, OSError, ValueError, TypeError, UserWarning) as error:
        raise SettingInvalid(f"MONGODB_URL: {_without_secrets(str(error), url)}; {HINT}") from None
    return database


def _without_secrets(text: str, url: str) -> str:
    """What the driver says of a URL, unless it repeats a part of the password."""
    secrets = re.split("[:@/]", url.partition("://")[2].rpartition("@")[0].partition(":")[2])
    return "cannot be used" if any(secret and secret in text for secret in secrets) else text


def make_indexes(collection: Any, *indexes: IndexModel) -> threading.Event:
    """Have indexes made on a thread beside the service; gives an event: the first one is there.

    On a large collection that takes minutes, and a server refuses it while another process does the same.
    """
    first = threading.Event()

    def run() -> None:
        left = list(indexes)
        while left:
            for index in left[:]:
                if _make(collection, index):
                    left.remove(index)
                if indexes[0] not in left:
                    first.set()
            time.sleep(INDEX_PAUSE if left else 0)

    threading.Thread(target=run, name=f"indexes-{collection.name}", daemon=True).start()
    first.wait(INDEX_HEAD_START)  # a new collection's first write beside it is more than some stores can bear
    return first


def _make(collection: Any, index: IndexModel) -> bool:
    try:
        with pymongo.timeout(INDEX_WITHIN):
            collection.create_indexes([index])
        return True
    except errors.PyMongoError as error:
        with suppress(errors.PyMongoError), pymongo.timeout(10):
            if _is_there(collection, index.document):
                return True
        fields = {"index": index.document["name"], "error": repr(error)[:300]}
        log.warning("an index could not be made; trying again", extra=fields)
        return False


def _is_there(collection: Any, wanted: Any) -> bool:
    """Whether one with these keys was made by somebody else, under another name or with rights that we lack."""
    keys, there = list(wanted["key"].items()), collection.index_information().values()
    return any(index["key"] == keys and (index.get("unique") or not wanted.get("unique")) for index in there)


# --- one unordered bulk of writes, and what each answer says for certain

DUPLICATE = 11000
# The answers after which a write can never be made. 2, 9, 14, 28, 40, 52: the statement does not fit the document, or
# is none; 121: the collection's validator; 10334, 17419, 17420: the document would be too large.
NEVER = (2, 9, 14, 28, 40, 52, 121, 10334, 17419, 17420)
LARGEST_DOCUMENT = 16_000_000  # bytes; a server takes 16 MiB
CERTAIN = (DocumentExists, DocumentRefused)  # all other errors leave open what was done


class Write(NamedTuple):
    """An update of the one document that `filter` matches, or, without a filter, the insert of `change`.

    It must be safe to repeat, also much later (a slow server runs the lost copy too): a bulk whose outcome is unknown
    is sent again. What is not safe to repeat is asked for with `once`.
    """

    filter: dict[str, Any] | None
    change: Mapping[str, Any]
    upsert: bool = False


def check(write: Write) -> None:
    """Raises DocumentRefused for what no server can be sent, before it is in a bulk with others."""
    try:
        size = len(bson.encode({"filter": write.filter, "change": write.change}))
    except Exception as error:
        raise DocumentRefused(f"it cannot be written as BSON: {error!r:.300}") from error
    if size > LARGEST_DOCUMENT:
        raise DocumentRefused(f"{size} bytes are more than a document can have")


def bulk_write(collection: Any, writes: list[Write]) -> dict[int, Exception]:
    """Run every write in one unordered bulk; gives the errors of those that have one, by position.

    Raises what the driver raises where that says nothing about each of them.
    """
    if type(collection).__module__.startswith("mongomock"):  # it has no usable bulk_write: the same, one by one
        return {n: error for n, write in enumerate(writes) if (error := _write_one(collection, write))}
    operations = [UpdateOne(w.filter, w.change, w.upsert) if w.filter else InsertOne(w.change) for w in writes]
    try:
        if operations:
            collection.bulk_write(operations, ordered=False)
    except errors.BulkWriteError as error:
        if error.details["writeConcernErrors"]:
            raise errors.WTimeoutError("written, but not acknowledged by a majority") from error
        return {each["index"]: _error_of(each["code"], each["errmsg"]) for each in error.details["writeErrors"]}
    return {}


def _write_one(collection: Any, write: Write) -> Exception | None:
    try:
        if write.filter:
            collection.update_one(write.filter, write.change, upsert=write.upsert)
        else:
            collection.insert_one(write.change)
    except errors.DuplicateKeyError as error:
        return DocumentExists(str(error))
    return None


def _error_of(code: int, message: str) -> Exception:
    if code == DUPLICATE:
        return DocumentExists(message)
    return DocumentRefused(f"{code} {message[:300]}") if code in NEVER else errors.OperationFailure(message[:300], code)
