"""The consumer as tests run it: one worker driven by hand, the whole of it on a thread, and `python consumer.py`."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import mongomock

import consumer
from core.base import settings
from core.base.settings import ROOT
from core.bus.bus import Bus, Message
from core.flow.outbox import Outbox
from core.flow.services import FunctionFailed
from core.flow.sweep import Sweep
from core.order.schemas import event_schemas
from core.order.view import view
from core.running.discovery import discover
from core.store.store import Store
from tests.support.buses import FakeBus
from tests.support.samples import LABEL, api_event, body_of, place
from tools.chaos.system import wait_for

STOCK = {"A1": 10, "B2": 10}
VARYING = ("at", "next", "by", "id", "of", "ms", "where")  # in a line of the timeline
MOMENTS = ("touched", "updatedAt", "due", "outboxSince")  # in an order, that get older with it


class Functions:
    """Lambda functions that all answer with a label. The next `failures` calls fail, and all of `failing`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.failures, self.failing = 0, ""

    def invoke(self, function: str, payload: dict) -> dict:
        self.calls.append((function, payload))
        if self.failures or function == self.failing:
            self.failures = max(0, self.failures - 1)
            raise FunctionFailed(f"{function}: ReadTimeout")
        return LABEL


class Desk:
    """A worker and a sweep, with orders and stock in mongomock, on a bus that remembers. Nothing moves by itself.

    Handlers are {event type: function}, by name: Desk(email={"order_created": function}). `give` hands the worker one
    delivery, `pump` all that was published, and `sweep.round()` looks once at what is due.
    """

    def __init__(
        self, bus: Bus | None = None, *, delays: str = "1,5", stock: dict[str, int] = STOCK, database: Any = None,
        functions: Any = None, stop: Any = None, **handlers: dict[str, Any],
    ) -> None:  # fmt: skip
        self.database = mongomock.MongoClient()["orderproc"] if database is None else database
        self.store, self.bus = Store(self.database), bus or FakeBus()
        self.store.lease = HandLease()
        self.orders, self.stock = self.store.orders, self.store.stock
        self.functions, self.stop = functions or Functions(), stop or threading.Event()
        self.subscriptions = {name: list(taken) for name, taken in handlers.items()}
        types = dict.fromkeys([*event_schemas(), *itertools.chain(*self.subscriptions.values())])
        self.subscribers = {type: [name for name in handlers if type in handlers[name]] for type in types}
        self.outbox = Outbox(self.store, self.bus, {type for type in types if self.subscribers[type]})
        config = settings.load({"RETRY_DELAYS": delays})
        args = config, self.store, self.outbox, self.functions, self.stop
        self.worker = consumer.Worker(handlers, *args)
        self.sweep = self.new_sweep()
        self.stock.fill(stock)

    def new_sweep(self, forgetful: bool = False) -> Sweep:
        return Sweep(self.store, self.bus, self.outbox, self.subscribers, self.stop, forgetful)

    # --- what happens

    def place(self, **fields: Any) -> tuple[str, bytes]:
        """A new order's id, and its order_created as it travels; it has left the outbox."""
        document = place(self.store, **fields)
        self.orders.clear(document["_id"], document["outbox"][0])
        wait_for(lambda: not self.orders.get(document["_id"])["outbox"])
        return document["_id"], body_of(document)

    def body(self, id: str, position: int = 0) -> bytes:
        """An event of the order, as it travels."""
        return body_of(self.orders.get(id), position)

    def cancel(self, id: str) -> dict:
        """As the API does, but that nothing is published."""
        return self.orders.cancel(api_event("order_cancelled", id))[0]

    def give(self, handler: str, body: bytes, tries: int = 0, id: str = "") -> "HandDelivery":
        """Deliver, under the event's id unless another is given; the delivery shows its end, once there is one."""
        delivery = HandDelivery(handler, id or json.loads(body)["id"], body, tries)
        self.worker.deliver(delivery)
        return delivery

    def handle(self, handler: str, body: bytes, tries: int = 0, id: str = "") -> str:
        """Deliver, wait for the end, and give its verb."""
        delivery = self.give(handler, body, tries, id)
        wait_for(lambda: delivery.ends, 10, "the delivery ended")
        assert len(delivery.ends) == 1
        return delivery.end

    def pump(self, rounds: int = 9) -> list[tuple[str, Message]]:
        """Deliver what was published, and what follows from it; gives all of it, as (handler, message)."""
        seen = []
        for _ in range(rounds):
            for message in self.bus.drain():
                for handler in [message.handler] if message.handler else self.subscribers[message.type]:
                    self.handle(handler, message.body)
                    seen.append((handler, message))
        wait_for(lambda: not self.pending_moves(), what="no stock move is pending")
        return seen

    def pass_time(self, seconds: float, *order_ids: str) -> None:
        """Make everything older, or only these orders. Time passes in the database: the clock goes on as it is.

        A sweep looked each second meanwhile, so pending moves are marked.
        """
        past, orders, stock = timedelta(seconds=seconds), self.database["orders"], self.database["stock"]
        for document in orders.find({"_id": {"$in": list(order_ids)}} if order_ids else {}):
            older = {name: document[name] - past for name in MOMENTS if name in document}
            orders.update_one({"_id": document["_id"]}, {"$set": older})
        for document in [] if order_ids else stock.find({"moves.0": {"$exists": True}}):
            seen = [move | {"mark": move["mark"] or self.store.lease.now} for move in document["moves"]]
            stock.update_one({"_id": document["_id"]}, {"$set": {"moves": seen}})
        self.store.lease.now += 0 if order_ids else int(seconds)

    # --- what is there to see

    def status(self, id: str) -> str:
        return self.orders.get(id)["status"]

    def lines(self, id: str, by: str = "email") -> list[dict]:
        """The lines of one handler in the order's timeline, without times, ids and places."""
        lines = view(self.orders.get(id))["timeline"]
        return [{k: v for k, v in line.items() if k not in VARYING} for line in lines if line["by"] == by]

    def available(self, sku: str = "A1") -> int:
        return self.stock.get(sku)["available"]

    def pending_moves(self) -> list[dict]:
        """Stock moves that are neither committed nor rolled back."""
        return [move for document in self.database["stock"].find() for move in document.get("moves", [])]


class HandLease:
    """A lease that every sweep holds, and whose beat goes on by hand."""

    def __init__(self) -> None:
        self.now, self.freed = 1, False

    def beat(self) -> int:
        return self.now

    def free(self) -> None:
        self.freed = True


class HandDelivery:
    """A delivery that remembers how it ended: the verb and its arguments."""

    def __init__(self, handler: str, id: str, body: bytes, tries: int = 0) -> None:
        self.handler, self.id, self.body, self.tries = handler, id, body, tries
        self.ends: list[tuple[Any, ...]] = []

    @property
    def end(self) -> str:
        """`ack`, `retry`, `park` or `release`; empty while it has not ended."""
        return self.ends[0][0] if self.ends else ""

    def ack(self) -> None:
        self.ends.append(("ack",))

    def retry(self, seconds: float, tries: int) -> None:
        self.ends.append(("retry", seconds, tries))

    def park(self, reason: str, tries: int) -> None:
        self.ends.append(("park", reason, tries))

    def release(self) -> None:
        self.ends.append(("release",))


def write_handlers(folder: Path, **handlers: str) -> Path:
    """A handler folder: `email="def order_created(event, services): ..."`."""
    folder.mkdir(exist_ok=True)
    for name, source in handlers.items():
        folder.joinpath(f"{name}.py").write_text(source)
    return folder


class Consumer:
    """`consumer.consume` on a thread, with handlers from a folder and orders in mongomock, or in the database given."""

    def __init__(self, bus: Bus, folder: Path, delays: str = "0.2,0.3", database=None, amqp_url: str = "") -> None:
        self.bus, self.stop = bus, threading.Event()
        self.database = database if database is not None else mongomock.MongoClient()["orderproc"]
        self.store = Store(self.database)
        self.orders, self.stock = self.store.orders, self.store.stock
        self.stock.fill({"A1": 100, "B2": 100})
        environment = {"AMQP_URL": amqp_url, "HANDLERS_DIR": str(folder), "RETRY_DELAYS": delays}
        config = settings.load(environment)
        client = None  # no handler of these tests calls a function
        args = config, discover(folder), self.store, bus, client, self.stop
        self._thread = threading.Thread(target=consumer.consume, args=args, daemon=True)
        self._thread.start()
        wait_for(lambda: bus.consuming and bus.up, what="the consumer is up")

    def place(self, **fields) -> str:
        return place(self.store, self.bus, **fields)["_id"]

    def order(self, id: str) -> dict:
        """The order as the API shows it."""
        return view(self.orders.get(id))

    def timeline(self, id: str) -> list[dict]:
        """The order's timeline, without times, ids and places."""
        kept = [name for name in VARYING if name != "by"]
        return [{k: v for k, v in line.items() if k not in kept} for line in self.order(id)["timeline"]]

    def end(self) -> None:
        self.stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


def run_command(*args: str, stdin: str = "", timeout: float = 60, **environment: str) -> subprocess.CompletedProcess:
    """`python consumer.py ...` with this environment and nothing else that is ours."""
    return subprocess.run(
        [sys.executable, "consumer.py", *args], cwd=ROOT, env=clean(environment), input=stdin,
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def clean(environment: dict[str, str]) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**kept, "PYTHONWARNINGS": "error", "AWS_DEFAULT_REGION": "us-east-1", **environment}


class Process:
    """`python consumer.py` as a process; what it logs is in `log()`."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self._output = folder / "consumer.log"
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "consumer.py"], cwd=ROOT, env=clean({"METRICS_PORT": "0", **environment}),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    def log(self) -> str:
        return self._output.read_text()

    def terminate(self, within: float = 10) -> int:
        """SIGTERM; gives the exit code."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it runs {within} s after SIGTERM") from None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
