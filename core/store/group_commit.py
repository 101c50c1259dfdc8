"""Group commit: many waiting threads share one bulk write and one read.

While one bulk is on its way the next one gathers; nothing waits on a timer, so a lone caller gets a batch of one at
once. The idea is the write-ahead log's group commit (DeWitt et al., 1984), with documents in the place of log records.

An unknown outcome is no answer: whatever the store says, unless it says for certain that this write was not and will
never be made, the write is repeated until it is acknowledged or nobody waits for it any longer.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import bson
import pymongo
from pymongo import errors

from core.base.metrics import BATCH_SIZE
from core.store.connection import (
    CERTAIN,
    DocumentExists,
    DocumentRefused,
    StoreBusy,
    StoreUnavailable,
    Write,
    bulk_write,
    check,
    time_left,
)

log = logging.getLogger(__name__)
PATIENCE = 10.0  # seconds that a caller waits at most
ATTEMPT = 2.5  # seconds for one bulk or read; the server gives up by then, too
PAUSE = 0.2  # seconds between repeats
GRACE = 0.5  # seconds of failing after which callers are refused at once; a moment of it is nothing unusual
LET_IN_EVERY = 1.0  # seconds, and then one of them is not
LOG_EVERY = 10.0  # seconds
LARGEST_QUEUE = 2000  # callers waiting
LARGEST_BATCH = 128  # writes; with so many in it a bulk takes in nobody more
SILENCE = (errors.ConnectionFailure, errors.ExecutionTimeout)  # no answer in time


@dataclass(eq=False)
class _Request:
    writes: Sequence[Write]
    read: Sequence[str]
    seconds: float
    once: bool = False
    unknown: bool = False  # whether it was sent before, and nobody knows what became of it
    result: Future[dict[str, Any]] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.seconds
        self.kinds = {kind for kind, asked in (("write", self.writes), ("read", self.read)) if asked}

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return not self.result.done() and self.deadline > time.monotonic()

    def fail(self, error: Exception) -> None:
        """End it where that is certain; else it is to be repeated, unless it may be sent only once.

        What is refused after an unknown outcome may have been made before.
        """
        if isinstance(error, DocumentExists) or (isinstance(error, DocumentRefused) and not self.unknown):
            self.result.set_exception(error)
        elif self.once or isinstance(error, DocumentRefused):
            self.result.set_exception(StoreUnavailable(f"nobody knows whether it was done: {error!r:.300}"))
        self.unknown = True


class GroupCommit:
    """Writes to and reads from one collection."""

    def __init__(self, collection: Any) -> None:
        self._collection = collection
        self._waiting: SimpleQueue[_Request] = SimpleQueue()
        self._failing = dict[str, float]()  # kind of request -> since when none of them is done
        self._trying = set[str]()  # kinds that are in hand
        self._logged, self._let_in = -LOG_EVERY, -LET_IN_EVERY
        threading.Thread(target=self._run, name=f"batch-{collection.name}", daemon=True).start()

    def do(self, writes: Sequence[Write] = (), read: Sequence[str] = (), once: bool = False) -> dict[str, Any]:
        """Write, then read back by id: {id: document}, as of a moment after the writes were acknowledged.

        Raises StoreUnavailable when the time is over (see `within`), at once while the store is known to fail and
        another caller is trying already, or at the first unknown outcome of what must be sent `once`; StoreBusy;
        DocumentExists; DocumentRefused.
        """
        return _result(self._enqueue(_Request(writes, read, time_left(PATIENCE), once)))

    def do_each(self, writes: Sequence[Write]) -> list[Any]:
        """Each write for itself, in as few bulks as that takes; gives the documents afterwards, by position.

        {} where there is no such document; None where the write was refused: that is in the log, and the others are
        done. Raises StoreUnavailable.
        """
        ids = [str((write.filter or write.change)["_id"]) for write in writes]
        requests = [self._enqueue(_Request([w], [id], time_left(PATIENCE))) for w, id in zip(writes, ids, strict=True)]
        documents: list[Any] = []
        for id, request in zip(ids, requests, strict=True):
            try:
                documents.append(_result(request).get(id, {}))
            except (DocumentExists, DocumentRefused) as error:
                log.error("a write was refused", extra={"id": id, "error": str(error)})
                documents.append(None)
        return documents

    def offer(self, *writes: Write) -> None:
        """Write when there is room, without waiting: for what the sweep would repair."""
        try:
            self._enqueue(_Request(writes, (), 30))
        except StoreUnavailable as reason:
            log.debug("an offered write was dropped", extra={"reason": str(reason)})

    @contextmanager
    def reading(self) -> Iterator[Any]:
        """The collection, for a plain read of more than documents by their ids.

        Raises StoreUnavailable on any error, and at once while others find out whether the store is back.
        """
        began = time.monotonic()
        try:
            if "read" in self._failing:
                self.do(read=["-"])
            with pymongo.timeout(max(0.001, time_left(ATTEMPT))):
                yield self._collection
        except (errors.PyMongoError, bson.errors.BSONError) as error:
            if isinstance(error, errors.ConnectionFailure):
                self._note("read", began, error)
            raise StoreUnavailable(repr(error)[:300]) from error

    def _enqueue(self, request: _Request) -> _Request:
        for write in request.writes:
            check(write)
        failing = [self._failing[kind] for kind in request.kinds & self._trying if kind in self._failing]
        if failing and time.monotonic() > min(failing) + GRACE:
            # Now and then one finds out whether it works, as it may be one write's own fault; the others do not wait.
            if time.monotonic() < self._let_in + LET_IN_EVERY:
                raise StoreUnavailable("the store is away")
            self._let_in = time.monotonic()
        if self._waiting.qsize() >= LARGEST_QUEUE:
            raise StoreBusy(f"{LARGEST_QUEUE} are waiting for the store")
        self._waiting.put(request)
        return request

    # --- the batching thread

    def _run(self) -> None:
        batch: list[_Request] = []
        while True:
            if not batch:
                self._trying = set()
                batch = [self._waiting.get()]
            while sum(len(request.writes) or 1 for request in batch) < LARGEST_BATCH and not self._waiting.empty():
                batch.append(self._waiting.get())
            self._trying = {kind for request in batch for kind in request.kinds}
            self._try_all(batch)
            batch = [request for request in batch if request.wanted]
            if batch:
                time.sleep(PAUSE)

    def _try_all(self, batch: list[_Request]) -> None:
        """All together; what was tried before each for itself, as one of them may be why none of them was done."""
        groups = [[request for request in batch if not request.unknown], *([r] for r in batch if r.unknown)]
        for group in groups:
            wanted = [request for request in group if request.wanted]
            if wanted and not self._try(wanted):
                return  # nobody answers, so the others need not ask

    def _try(self, group: list[_Request]) -> bool:
        """One bulk and one read. False where the store does not answer at all."""
        BATCH_SIZE.labels(self._collection.name).observe(len(group))
        began = time.monotonic()
        failed = self._write([request for request in group if request.writes], began)
        readers = [request for request in group if request.read and request not in failed]
        documents: dict[str, Any] = {}
        error: Exception | None = next((each for each in failed.values() if isinstance(each, SILENCE)), None)
        if error is None:  # else reading would take as long, for nothing
            documents, error = self._read({id for request in readers for id in request.read})
        if error:
            failed |= dict.fromkeys(readers, error)
            self._note("read", began, error)
        for request in group:
            if request in failed:
                request.fail(failed[request])
            else:
                request.result.set_result({id: documents[id] for id in request.read if id in documents})
        return not isinstance(error, SILENCE)

    def _write(self, writers: list[_Request], began: float) -> dict[_Request, Exception]:
        """Gives the errors of those that have one; of several writes' errors, one that leaves open what was done."""
        owners = [request for request in writers for _ in request.writes]
        try:
            with pymongo.timeout(ATTEMPT):
                failures = bulk_write(self._collection, [write for request in writers for write in request.writes])
        except Exception as error:
            failures = dict.fromkeys(range(len(owners)), error)
        unknown = {owners[n]: error for n, error in failures.items() if not isinstance(error, CERTAIN)}
        if writers:
            self._note("write", began, next(iter(unknown.values()), None), works=len(unknown) < len(writers))
        return {owners[n]: error for n, error in failures.items()} | unknown

    def _read(self, ids: set[str]) -> tuple[dict[str, Any], Exception | None]:
        """The documents by id, or why there are none: that says nothing about the writes before, which may be there."""
        if not ids:
            return {}, None
        try:
            with pymongo.timeout(ATTEMPT):
                found = list(self._collection.find({"_id": {"$in": sorted(ids)}}).batch_size(len(ids) + 1))
        except Exception as error:
            return {}, error
        self._failing.pop("read", None)
        return {document["_id"]: document for document in found}, None

    def _note(self, kind: str, began: float, error: Exception | None, works: bool = False) -> None:
        """Remember whether requests of a kind fail, and say so now and then; `works`: some did not."""
        if error and time.monotonic() > self._logged + LOG_EVERY:
            self._logged = time.monotonic()
            fields = {"kind": kind, "code": getattr(error, "code", None), "error": repr(error)[:300]}
            log.warning("the store does not do what it is asked; repeating", extra=fields)
        if error and not works:
            self._failing.setdefault(kind, began)
        else:
            self._failing.pop(kind, None)


def _result(request: _Request) -> dict[str, Any]:
    try:
        return request.result.result(max(0, request.deadline - time.monotonic()))
    except TimeoutError:
        raise StoreUnavailable(f"no answer within {request.seconds:.1f} s") from None
