"""MongoDB: what consumers tell each other, and the API: who of them sweeps, and how their handlers are doing.

One process at a time holds the lease of the sweep. Its holder raises a number, the beat, about once a second. Whoever
sees the same beat for ten seconds by a clock of its own takes the lease over: no two machines need clocks that agree.
The idea is the heart beat of a failure detector (Aguilera, Chen and Toueg, 1997); as any such lease it may have two
holders for a moment.
"""

import time
import uuid
from contextlib import suppress
from datetime import timedelta
from typing import Any

from core.base.ids import now, rfc3339
from core.store.connection import DocumentExists, Write
from core.store.group_commit import GroupCommit

NAME = "sweeper"
EXPIRES = 10.0  # seconds; how long nobody holds it after a kill -9
BEAT_EVERY = 1.0  # seconds
FORGOTTEN_AFTER = timedelta(days=1)  # a handler that nobody runs


class Lease:
    """One process's view of the lease. Methods raise StoreUnavailable where the store does not answer in time."""

    def __init__(self, bulk: GroupCommit) -> None:
        self._bulk, self._me = bulk, uuid.uuid4().hex
        self._owner, self._beat, self._since = "", 0, 0.0  # as seen last, and since when by our monotonic clock

    def beat(self) -> int:
        """Keep the lease, or take it where it is free; gives its beat, which only ever grows, or 0: another's."""
        age = time.monotonic() - self._since
        if self._owner != self._me or age > BEAT_EVERY:
            self._look(take=self._owner in (self._me, "") or age > EXPIRES)
        return self._beat if self._owner == self._me else 0

    def _look(self, take: bool) -> None:
        # Needs what was seen, so of several who try one takes it, and a repeat changes nothing.
        seen, mine = {"owner": self._owner, "beat": self._beat}, {"owner": self._me, "beat": self._beat + 1}
        write = Write({"_id": NAME, **seen}, {"$set": mine}, upsert=True)
        try:
            document = self._bulk.do([write] if take else [], [NAME]).get(NAME, {"owner": "", "beat": self._beat})
        except DocumentExists:  # there is another than we have seen
            document = self._bulk.do(read=[NAME])[NAME]
        if seen != {"owner": document["owner"], "beat": document["beat"]}:
            self._owner, self._beat, self._since = document["owner"], document["beat"], time.monotonic()

    def free(self) -> None:
        """Give it back, if we hold it: another process takes it at once."""
        self._bulk.do([Write({"_id": NAME, "owner": self._me}, {"$set": {"owner": ""}})])


class Reports:
    """A document for each handler. Methods raise StoreUnavailable where the store does not answer in time."""

    def __init__(self, bulk: GroupCommit) -> None:
        self._bulk = bulk

    def put(self, reports: dict[str, dict[str, Any]]) -> None:
        """What a consumer says of the handlers that it runs, by name."""
        said = {name: {**report, "seen": now()} for name, report in reports.items()}
        with suppress(DocumentExists):  # two consumers were the first at once
            self._bulk.do([Write({"_id": name}, {"$set": fields}, upsert=True) for name, fields in said.items()])

    def all(self) -> list[dict[str, Any]]:
        """What was said last of each handler, and when, by name."""
        with self._bulk.reading() as handlers:
            found = list(handlers.find({"seen": {"$gt": now() - FORGOTTEN_AFTER}}).sort("_id", 1))
        told = ("takes", "waiting", "dead", "retryDelays")
        return [{"name": each["_id"], **{of: each[of] for of in told}, "seen": rfc3339(each["seen"])} for each in found]
