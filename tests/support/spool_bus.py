"""A carrier over files in a folder, to show that another carrier is one file and one line of the contract suite.

Each handler has a folder there, and a message is a file in it, named `<due>.<tries>.<id>`: written elsewhere and moved
in whole, deleted when it is acked. A retry gets a later time into its name, a dead letter goes into the folder `dead`.
So every message is a file at any moment, whichever process dies. One process at a time consumes a handler: it holds a
lock, which ends with the process.
"""

import fcntl
import json
import os
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from core.bus.bus import Deliver, Message, PublishOutcome, Subscriptions

BOUND = 10_000  # files in one folder; beyond it messages stay in their outbox
LOOK_EVERY = 0.02  # seconds between looks at the folders
DRAIN = 8.0  # seconds that work in hand gets on a stop


class SpoolBus:
    """Buses on one folder share its messages, in one process or in many."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._subscriptions = folder, Subscriptions()
        self.in_hand: defaultdict[str, set[str]] = defaultdict(set)  # handler -> names of files
        self.released: defaultdict[str, set[str]] = defaultdict(set)  # left alone for the rest of the session
        self.up, self.consuming = True, False

    @property
    def depths(self) -> dict[str, int]:
        return {handler: len(set(self._files(handler)) - self.in_hand[handler]) for handler in self._subscriptions}

    @property
    def dead(self) -> dict[str, int]:
        reasons = {handler: (self._folder / handler / "dead").glob("*.reason") for handler in self._subscriptions}
        return {handler: len(list(found)) for handler, found in reasons.items()}

    def start_publishing(self) -> None:
        """There is nothing to connect or to hang up."""

    close = start_publishing

    def publish(self, message: Message, done: Callable[[PublishOutcome], None]) -> None:
        try:
            outcome = self._route(message)
        except OSError:  # the disk is full, or the id is too long for a name
            outcome = "unsent"
        done(outcome)

    def _route(self, message: Message) -> PublishOutcome:
        known = self._folder / "subscriptions"  # to whoever consumed last
        subscriptions: Subscriptions = json.loads(known.read_bytes()) if known.exists() else {}
        subscribers = [handler for handler, types in subscriptions.items() if message.type in types]
        handlers = [message.handler] if message.handler else subscribers
        if any(handler not in subscriptions for handler in handlers) or (message.mandatory and not handlers):
            return "unroutable"
        return "confirmed" if all([self._accept(message, handler) for handler in handlers]) else "unsent"

    def _accept(self, message: Message, handler: str) -> bool:
        files, id = self._files(handler), quote(message.id, safe="")
        waits_there = any(file.split(".", 2)[2] == id for file in files)
        if not waits_there and len(files) < BOUND:
            self._write(self._folder / handler / _name(0, 0, message.id), message.body)
        return waits_there or len(files) < BOUND

    def _write(self, path: Path, content: bytes) -> None:
        half = self._folder / uuid.uuid4().hex
        with half.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        half.rename(path)

    def consume(
        self, subscriptions: Subscriptions, names: Sequence[str], prefetch: int, deliver: Deliver, stop: threading.Event
    ) -> None:
        self._subscriptions = subscriptions
        self.rebuild()
        self.consuming = True
        with ExitStack() as files:
            locks = {name: files.enter_context((self._folder / f"{name}.lock").open("w")) for name in names}
            while not stop.wait(LOOK_EVERY):
                for name, lock in locks.items():
                    with suppress(BlockingIOError):  # another process has it
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        self._deliver_due(name, prefetch, deliver)
            self.consuming = False
            deadline = time.monotonic() + DRAIN
            while any(self.in_hand.values()) and time.monotonic() < deadline:
                time.sleep(LOOK_EVERY)

    def rebuild(self) -> None:
        for handler in self._subscriptions:
            (self._folder / handler / "dead").mkdir(parents=True, exist_ok=True)
        if self._subscriptions:
            self._write(self._folder / "subscriptions", json.dumps(self._subscriptions).encode())
        self.released.clear()

    def _files(self, handler: str) -> list[str]:
        """What waits for a handler or is in hand, in the order in which it is due."""
        return sorted(file for file in os.listdir(self._folder / handler) if file != "dead")

    def _deliver_due(self, handler: str, prefetch: int, deliver: Deliver) -> None:
        for file in self._files(handler):
            due, tries, id = file.split(".", 2)
            known = file in self.in_hand[handler] or file in self.released[handler]
            if not known and int(due) <= time.time_ns() and len(self.in_hand[handler]) < prefetch:
                with suppress(FileNotFoundError):  # it was acked since we looked
                    body = (self._folder / handler / file).read_bytes()
                    self.in_hand[handler].add(file)
                    deliver(SpoolDelivery(self, self._folder / handler / file, handler, unquote(id), body, int(tries)))


def _name(seconds: float, tries: int, id: str) -> str:
    return f"{time.time_ns() + round(seconds * 1e9)}.{tries}.{quote(id, safe='')}"


@dataclass(eq=False)
class SpoolDelivery:
    """A message in hand."""

    bus: SpoolBus
    path: Path
    handler: str
    id: str
    body: bytes
    tries: int

    def ack(self) -> None:
        self._end(self.path.unlink)

    def retry(self, seconds: float, tries: int) -> None:
        self._end(lambda: self.path.rename(self.path.with_name(_name(seconds, tries, self.id))))

    def park(self, reason: str, tries: int) -> None:
        dead = self.path.parent / "dead" / _name(0, tries, self.id)
        dead.with_name(f"{dead.name}.reason").write_text(reason)
        self._end(lambda: self.path.rename(dead))

    def release(self) -> None:
        self.bus.released[self.handler].add(self.path.name)
        self._end(lambda: None)

    def _end(self, how: Callable[[], object]) -> None:
        with suppress(FileNotFoundError):  # it was delivered elsewhere as well, and has ended there
            how()
        self.bus.in_hand[self.handler].discard(self.path.name)
