"""What tests of bus and consumer run: a bus that consumes on a thread of its own, and a whole consumer on one."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import mongomock

import consumer
from core import settings
from core.bus import Bus, Delivery, Message, Topology
from core.events import created_by_api, new_order_id, new_traceparent
from core.outbox import Outbox
from core.settings import ROOT
from core.stock import Stock
from core.store import Orders, view
from tools.chaos.system import wait_for

logging.getLogger("pika").setLevel(logging.CRITICAL)  # as the programs do; ours says the same in a line


class Running:
    """`bus.consume` on a thread. Deliveries gather in `arrived`, unacked, or go to `deliver`."""

    def __init__(
        self, bus: Bus, topology: Topology, names: Sequence[str] = (), prefetch: int = 16,
        deliver: Callable[[Delivery], None] | None = None, wait: bool = True,
    ) -> None:  # fmt: skip
        self.bus, self.stop, self.error = bus, threading.Event(), None
        self.arrived: list[Delivery] = []
        self._ended: list[Delivery] = []
        given = topology, list(names) or list(topology), prefetch, deliver or self.arrived.append, self.stop
        self._thread = threading.Thread(target=self._run, args=given, name="test-consume", daemon=True)
        self._thread.start()
        if wait:
            self.wait_until_up()

    def _run(self, *given) -> None:
        try:
            self.bus.consume(*given)
        except Exception as error:
            self.error = error

    def wait_until_up(self, seconds: float = 20) -> None:
        wait_for(lambda: (self.bus.consuming and self.bus.up) or self.error, seconds, "the bus is up")
        assert self.error is None, self.error

    def wait(self, count: int, seconds: float = 20) -> list[Delivery]:
        """What arrived, once there are `count` of them."""
        wait_for(lambda: len(self.arrived) >= count, seconds, f"{count} deliveries, not {len(self.arrived)}")
        return self.arrived

    def ack(self, *deliveries: Delivery) -> None:
        for delivery in deliveries:
            if delivery not in self._ended:
                self._ended.append(delivery)
                delivery.ack()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def end(self, seconds: float = 15) -> None:
        self.stop.set()
        self._thread.join(seconds)
        assert not self.running, f"consume did not return within {seconds} s"

    def ack_all_and_end(self) -> None:
        self.stop.set()
        wait_for(lambda: self.ack(*self.arrived) or not self.running, what="consume returns")


@contextmanager
def running(bus: Bus, topology: Topology, *more, **options):
    session = Running(bus, topology, *more, **options)
    try:
        yield session
    finally:
        session.ack_all_and_end()


class Told:
    """What each publish was told, by message id, in order."""

    def __init__(self, bus: Bus) -> None:
        self._bus, self._lock = bus, threading.Lock()
        self.outcomes: dict[str, list[str]] = defaultdict(list)

    def publish(self, message: Message) -> None:
        self._bus.publish(message, lambda outcome: self._note(message.id, outcome))

    def _note(self, id: str, outcome: str) -> None:
        with self._lock:
            self.outcomes[id].append(outcome)

    def count(self, outcome: str) -> int:
        with self._lock:
            return sum(outcomes.count(outcome) for outcomes in self.outcomes.values())

    def wait_until_confirmed(self, count: int, seconds: float) -> None:
        try:
            wait_for(lambda: self.count("confirmed") >= count, seconds)
        except AssertionError:
            found = {outcome: self.count(outcome) for outcome in sum(self.outcomes.values(), [])}
            raise AssertionError(f"{count} were to be confirmed within {seconds} s: {found}") from None

    def of(self, message: Message, seconds: float = 20) -> str:
        """Publish one, and give what it was told."""
        self.publish(message)
        wait_for(lambda: self.outcomes.get(message.id), seconds, f"an outcome for {message.id}")
        return self.outcomes[message.id][-1]


class FakeBus:
    """Remembers what is published, and tells each `outcome` at once; with None it waits for `tell`."""

    up = consuming = True

    def __init__(self, outcome: str | None = "confirmed") -> None:
        self.outcome, self.rebuilt, self.depths = outcome, 0, dict[str, int]()
        self.sent: list[Message] = []
        self._done: list[Callable[[str], None]] = []

    def publish(self, message: Message, done: Callable[[str], None]) -> None:
        self.sent.append(message)
        self._done.append(done)
        if self.outcome:
            done(self.outcome)

    def tell(self, outcome: str, position: int = -1) -> None:
        self._done[position](outcome)

    def rebuild(self) -> None:
        self.rebuilt += 1


def place(orders: Orders, bus: Bus | None = None, **fields) -> str:
    """Store an order as the API does, announce it where a bus is given, and give its id."""
    order = {
        "id": new_order_id(), "owner": "ada", "customerId": "ada", "currency": "USD", "email": "ada@example.com",
        "items": [{"sku": "A1", "quantity": 2, "price": 1999}], "total": 3998, **fields,
    }  # fmt: skip
    event = created_by_api("order_created", order["id"], new_traceparent())
    document, _ = orders.create(order, event, None, "fingerprint")
    if bus:
        Outbox(orders, bus).announce(document)
    return order["id"]


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
        self.orders, self.stock = Orders(self.database), Stock(self.database)
        self.stock.fill({"A1": 100, "B2": 100})
        environment = {"AMQP_URL": amqp_url, "HANDLERS_DIR": str(folder), "RETRY_DELAYS": delays}
        config = settings.load(environment)
        given = config, consumer.discover(folder), self.orders, self.stock, bus, self.stop
        client = {"region_name": "us-east-1", "aws_access_key_id": "none", "aws_secret_access_key": "none"}
        self._thread = threading.Thread(target=consumer.consume, args=given, kwargs=client, daemon=True)
        self._thread.start()
        wait_for(lambda: bus.consuming and bus.up, what="the consumer is up")

    def place(self, **fields) -> str:
        return place(self.orders, self.bus, **fields)

    def order(self, id: str) -> dict:
        """The order as the API shows it."""
        return view(self.orders.get(id))

    def timeline(self, id: str) -> list[dict]:
        """The order's timeline, without the times."""
        return [{k: v for k, v in line.items() if k not in ("at", "next")} for line in self.order(id)["timeline"]]

    def end(self) -> None:
        self.stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


def run_command(*words: str, stdin: str = "", timeout: float = 60, **environment: str) -> subprocess.CompletedProcess:
    """`python consumer.py ...` with this environment and nothing else that is ours."""
    return subprocess.run(
        [sys.executable, "consumer.py", *words], cwd=ROOT, env=clean(environment), input=stdin,
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

    def wait(self, within: float) -> int:
        return self._process.wait(within)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
