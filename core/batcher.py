"""Group commit: many waiting threads share one bulk write and one read.

While one bulk is on its way the next one gathers; nothing waits on a timer, so a lone caller gets a batch of one at
once. The idea is the write-ahead log's group commit (DeWitt et al., 1984), with documents in the place of log records.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pymongo import InsertOne, UpdateOne, errors

from core.telemetry import BATCH_SIZE

log = logging.getLogger(__name__)
OUTCOME_UNKNOWN = (errors.ConnectionFailure, errors.ExecutionTimeout, errors.WTimeoutError)
PAUSE = 0.2  # seconds between repeats while the store is away
_mongomock_lock = threading.Lock()


class StoreAway(Exception):
    """The store did not answer in time. What was asked may or may not have happened."""


class Busy(StoreAway):
    """More is waiting already than the bound allows; nothing was done."""


class Duplicate(Exception):
    """A unique index refused the write: the document is there already."""


class Write(NamedTuple):
    """An update of the one document that `filter` matches, or, without a filter, the insert of `change`.

    It must be safe to repeat, also much later (a slow server runs the lost copy too): a bulk whose outcome is unknown
    is sent again. What is not, is asked for with `once`.
    """

    filter: dict[str, Any] | None
    change: dict[str, Any]
    upsert: bool = False


@dataclass(eq=False)
class _Item:
    writes: Sequence[Write]
    read: Sequence[str]
    deadline: float
    once: bool = False
    answer: Future[dict[str, Any]] = field(default_factory=Future)

    def is_waiting(self) -> bool:
        return not self.answer.done() and self.deadline > time.monotonic()


class Batcher:
    """Writes to and reads from one collection. `prepare` runs before the first bulk, on the batching thread."""

    def __init__(self, collection: Any, prepare: Callable[[], None], bound: int = 2000, most: int = 128) -> None:
        self._collection, self._prepare, self._prepared = collection, prepare, False
        self._bound, self._most = bound, most
        self._waiting: deque[_Item] = deque()
        self._changed = threading.Condition()
        self.away = False  # true from the first bulk without an answer to the next one with
        self._trying = False
        self._thread = threading.Thread(target=self._run, name=f"batch-{collection.name}", daemon=True)
        self._thread.start()

    def do(
        self, writes: Sequence[Write] = (), read: Sequence[str] = (), seconds: float = 2.5, once: bool = False
    ) -> dict[str, Any]:
        """Write, then read back by id: {id: document}, as of a moment after the writes were acknowledged.

        Raises StoreAway after `seconds`, or at once while the store is known to be away and somebody is trying already,
        or at the first unknown outcome of what is to be done `once`; Busy; Duplicate; or what the driver says about
        these writes alone.
        """
        item = self._put(_Item(writes, read, time.monotonic() + seconds, once))
        try:
            return item.answer.result(seconds)
        except TimeoutError:
            raise StoreAway(f"no answer within {seconds} s") from None

    def offer(self, *writes: Write) -> None:
        """Write when there is room, without waiting: for what the sweep would repair."""
        try:
            self._put(_Item(writes, (), time.monotonic() + 30))
        except StoreAway as reason:
            log.debug("an offered write was dropped", extra={"reason": str(reason)})

    def _put(self, item: _Item) -> _Item:
        with self._changed:
            if self.away and self._trying:  # one at a time finds out whether it is back; the others need not wait
                raise StoreAway("the store is away")
            if len(self._waiting) >= self._bound:
                raise Busy(f"{self._bound} are waiting for the store")
            if not self._thread.is_alive():
                raise StoreAway("the batching thread is dead")
            self._waiting.append(item)
            self._changed.notify()
        return item

    def _run(self) -> None:
        try:
            while True:
                self._flush(self._gather())
                self._trying = False
        except BaseException:
            log.exception("the batching thread died; everything that needs the store answers 503 until a restart")
            raise

    def _gather(self) -> list[_Item]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            batch: list[_Item] = []
            self._trying, size = True, 0
            while self._waiting and (not batch or size + len(self._waiting[0].writes) <= self._most):
                batch.append(self._waiting.popleft())
                size += max(1, len(batch[-1].writes))
            return batch

    def _flush(self, batch: list[_Item]) -> None:
        while batch := [item for item in batch if item.is_waiting()]:  # who gave up is not written for
            try:
                return self._attempt(batch)
            except OUTCOME_UNKNOWN as error:
                self._note_away(batch, error)
            except Exception as error:  # this batch cannot be sent at all: find the culprit
                if len(batch) == 1:
                    return batch[0].answer.set_exception(error)
                for item in batch:
                    self._flush([item])

    def _attempt(self, batch: list[_Item]) -> None:
        if not self._prepared:
            self._prepare()
            self._prepared = True
        BATCH_SIZE.labels(self._collection.name).observe(len(batch))
        owners = [item for item in batch for _ in item.writes]
        refused = apply(self._collection, [write for item in batch for write in item.writes]) if owners else {}
        found = self._read({key for item in batch for key in item.read})
        self.away = False
        failed = {owners[index]: error for index, error in refused.items()}
        for item in batch:
            if item in failed:
                item.answer.set_exception(failed[item])
            else:
                item.answer.set_result({key: found[key] for key in item.read if key in found})

    def _read(self, wanted: set[str]) -> dict[str, dict[str, Any]]:
        try:
            return {d["_id"]: d for d in self._collection.find({"_id": {"$in": sorted(wanted)}})} if wanted else {}
        except errors.PyMongoError as error:  # whatever it says, it says nothing about the writes, which may be there
            raise errors.ConnectionFailure(f"reading back: {error!r:.300}") from error

    def _note_away(self, batch: list[_Item], error: Exception) -> None:
        if not self.away:
            log.warning("the store does not answer; repeating", extra={"items": len(batch), "error": repr(error)[:300]})
        self.away = True
        for item in batch:
            if item.once:
                item.answer.set_exception(StoreAway(f"nobody knows whether it was done: {error!r:.300}"))
        time.sleep(PAUSE)


def apply(collection: Any, writes: list[Write]) -> dict[int, Exception]:
    """Run every write in one unordered bulk; gives the error of each that was refused, by position."""
    if type(collection).__module__.startswith("mongomock"):  # it has no usable bulk_write: the same, one by one
        with _mongomock_lock:
            return {n: error for n, write in enumerate(writes) if (error := _apply_one(collection, write))}
    operations = [UpdateOne(w.filter, w.change, w.upsert) if w.filter else InsertOne(w.change) for w in writes]
    try:
        collection.bulk_write(operations, ordered=False)
    except errors.BulkWriteError as error:
        if error.details["writeConcernErrors"]:
            raise errors.WTimeoutError("written, but not acknowledged by a majority") from error
        return {each["index"]: _refusal(each["code"], each["errmsg"]) for each in error.details["writeErrors"]}
    return {}


def _apply_one(collection: Any, write: Write) -> Exception | None:
    try:
        if write.filter:
            collection.update_one(*write)
        else:
            collection.insert_one(write.change)
    except errors.DuplicateKeyError as error:
        return Duplicate(str(error))
    return None


def _refusal(code: int, message: str) -> Exception:
    return Duplicate(message) if code == 11000 else RuntimeError(f"the store refused a write: {code} {message[:300]}")
