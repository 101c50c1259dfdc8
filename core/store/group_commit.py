"""Group commit: many waiting threads share one bulk write and one read.

While one bulk is on its way the next one gathers; nothing waits on a timer, so a lone caller gets a batch of one at
once. The idea is the write-ahead log's group commit (DeWitt et al., 1984), with documents in the place of log records.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, NamedTuple

from pymongo import InsertOne, UpdateOne, errors

from core.base.metrics import BATCH_SIZE
from core.store.connection import DocumentExists, StoreBusy, StoreUnavailable

log = logging.getLogger(__name__)
OUTCOME_UNKNOWN = (errors.ConnectionFailure, errors.ExecutionTimeout, errors.WTimeoutError)
PAUSE = 0.2  # seconds between repeats while the store is away
LARGEST_QUEUE = 2000  # callers waiting
LARGEST_BATCH = 128  # writes; with so many in it a bulk takes in nobody more


class Write(NamedTuple):
    """An update of the one document that `filter` matches, or, without a filter, the insert of `change`.

    It must be safe to repeat, also much later (a slow server runs the lost copy too): a bulk whose outcome is unknown
    is sent again. What is not safe to repeat is asked for with `once`.
    """

    filter: dict[str, Any] | None
    change: Mapping[str, Any]
    upsert: bool = False


@dataclass(eq=False)
class _Request:
    writes: Sequence[Write]
    read: Sequence[str]
    deadline: float
    once: bool = False
    result: Future[dict[str, Any]] = field(default_factory=Future)


class GroupCommit:
    """Writes to and reads from one collection. `prepare` runs before the first bulk, on the batching thread."""

    def __init__(self, collection: Any, prepare: Callable[[], object]) -> None:
        self._collection, self._prepare, self._prepared = collection, prepare, False
        self._waiting: SimpleQueue[_Request] = SimpleQueue()
        self.away = False  # true from the first bulk without an answer to the next one with
        self._trying = False
        self._ping_lock, self._pinged_at, self._answers = threading.Lock(), -1.0, False
        self._thread = threading.Thread(target=self._run, name=f"batch-{collection.name}", daemon=True)
        self._thread.start()

    def do(
        self, writes: Sequence[Write] = (), read: Sequence[str] = (), seconds: float = 2.5, once: bool = False
    ) -> dict[str, Any]:
        """Write, then read back by id: {id: document}, as of a moment after the writes were acknowledged.

        Raises StoreUnavailable after `seconds`, or at once while the store is known to be away and another caller is
        trying already, or at the first unknown outcome of what must be sent `once`; StoreBusy; DocumentExists; or what
        the driver says about these writes alone.
        """
        request = self._enqueue(_Request(writes, read, time.monotonic() + seconds, once))
        try:
            return request.result.result(seconds)
        except TimeoutError:
            raise StoreUnavailable(f"no answer within {seconds} s") from None

    def offer(self, *writes: Write) -> None:
        """Write when there is room, without waiting: for what the sweep would repair."""
        try:
            self._enqueue(_Request(writes, (), time.monotonic() + 30))
        except StoreUnavailable as reason:
            log.debug("an offered write was dropped", extra={"reason": str(reason)})

    @contextmanager
    def reading(self) -> Iterator[Any]:
        """The collection, for a plain read of more than documents by their ids.

        Raises StoreUnavailable on any error, and at once while others find out whether the store is back.
        """
        try:
            if self.away:
                self.do(read=["-"])
            yield self._collection
        except errors.PyMongoError as error:
            raise StoreUnavailable(repr(error)[:300]) from error

    def ping(self) -> bool:
        """Whether the store answers, known within 3 s, and asked at most once a second: probes come in crowds."""
        with self._ping_lock:
            if time.monotonic() > self._pinged_at + 1:
                try:
                    self.do(read=["-"])
                    self._answers = True
                except (StoreUnavailable, errors.PyMongoError):
                    self._answers = False
                self._pinged_at = time.monotonic()
            return self._answers

    def _enqueue(self, request: _Request) -> _Request:
        if self.away and self._trying:  # one at a time finds out whether it is back; the others need not wait
            raise StoreUnavailable("the store is away")
        if self._waiting.qsize() >= LARGEST_QUEUE:
            raise StoreBusy(f"{LARGEST_QUEUE} are waiting for the store")
        if not self._thread.is_alive():
            raise StoreUnavailable("the batching thread is dead")
        self._waiting.put(request)
        return request

    # --- the batching thread

    def _run(self) -> None:
        try:
            while True:
                batch = self._gather()
                self._trying = True
                self._flush(batch)
                self._trying = False
        except BaseException:
            log.exception("the batching thread died; everything that needs the store answers 503 until a restart")
            raise

    def _gather(self) -> list[_Request]:
        batch: list[_Request] = []
        size = 0
        while not batch or (size < LARGEST_BATCH and not self._waiting.empty()):
            batch.append(self._waiting.get())
            size += max(1, len(batch[-1].writes))
        return batch

    def _flush(self, batch: list[_Request]) -> None:
        while batch := [r for r in batch if not r.result.done() and r.deadline > time.monotonic()]:  # who still waits
            try:
                return self._try(batch)
            except OUTCOME_UNKNOWN as error:
                self._wait_for_the_store(batch, error)
            except Exception as error:  # this batch cannot be sent at all: find the culprit
                if len(batch) == 1:
                    return batch[0].result.set_exception(error)
                for request in batch:
                    self._flush([request])

    def _try(self, batch: list[_Request]) -> None:
        if not self._prepared:
            self._prepare()
            self._prepared = True
        BATCH_SIZE.labels(self._collection.name).observe(len(batch))
        owners = [request for request in batch for _ in request.writes]
        refusals = bulk_write(self._collection, [write for request in batch for write in request.writes])
        documents = self._read({id for request in batch for id in request.read})
        self.away = False
        refused = {owners[index]: error for index, error in refusals.items()}
        for request in batch:
            if request in refused:
                request.result.set_exception(refused[request])
            else:
                request.result.set_result({id: documents[id] for id in request.read if id in documents})

    def _read(self, ids: set[str]) -> dict[str, dict[str, Any]]:
        try:
            found = self._collection.find({"_id": {"$in": sorted(ids)}}) if ids else []
            return {document["_id"]: document for document in found}
        except errors.PyMongoError as error:  # whatever it says, it says nothing about the writes, which may be there
            raise errors.ConnectionFailure(f"reading back: {error!r:.300}") from error

    def _wait_for_the_store(self, batch: list[_Request], error: Exception) -> None:
        if not self.away:
            log.warning("the store does not answer; repeating", extra={"items": len(batch), "error": repr(error)[:300]})
        self.away = True
        for request in batch:
            if request.once:
                request.result.set_exception(StoreUnavailable(f"nobody knows whether it was done: {error!r:.300}"))
        time.sleep(PAUSE)


def bulk_write(collection: Any, writes: list[Write]) -> dict[int, Exception]:
    """Run every write in one unordered bulk; gives the error of each that was refused, by position."""
    if type(collection).__module__.startswith("mongomock"):  # it has no usable bulk_write: the same, one by one
        return {n: error for n, write in enumerate(writes) if (error := _write_one(collection, write))}
    operations = [UpdateOne(w.filter, w.change, w.upsert) if w.filter else InsertOne(w.change) for w in writes]
    try:
        if operations:
            collection.bulk_write(operations, ordered=False)
    except errors.BulkWriteError as error:
        if error.details["writeConcernErrors"]:
            raise errors.WTimeoutError("written, but not acknowledged by a majority") from error
        return {each["index"]: _refusal(each["code"], each["errmsg"]) for each in error.details["writeErrors"]}
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


def _refusal(code: int, message: str) -> Exception:
    return DocumentExists(message) if code == 11000 else RuntimeError(f"the store refused it: {code} {message[:300]}")
