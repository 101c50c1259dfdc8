"""The whole program as real processes: started, loaded, killed, and checked.

with System(folder, mongodb_url=..., amqp_url=...) as system:
    results = system.post_many(100, clients=8)
    system.kill("consumer")
    system.start("consumer")
    system.wait_until_final()
    print(system.check())
"""

import email
import functools
import http.client
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pymongo

ROOT = Path(__file__).resolve().parents[2]
SECRET = "chaos-secret"
FINAL = {"processed", "failed", "cancelled"}


def free_port() -> int:
    """A port that is free now, below the range that outgoing connections are given theirs from."""
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


class Result(NamedTuple):
    """What became of one POST; status 0 where no answer came."""

    status: int
    id: str
    seconds: float


class System:
    """API, consumer and local Lambda runtime; with an embedded URL the API process is all of them."""

    def __init__(self, folder: Path, mongodb_url: str, amqp_url: str, **environment: str) -> None:
        self.folder, self.mongodb_url = folder, mongodb_url
        self.embedded = {mongodb_url, amqp_url} & {"embedded", "memory"}
        self.port, self.metrics_port, lambda_port = free_port(), free_port(), free_port()
        self.processes: dict[str, subprocess.Popen] = {}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
            "MONGODB_URL": mongodb_url, "AMQP_URL": amqp_url, "DATA_DIR": str(folder / "data"),
            "API_KEYS": f"chaos:{SECRET}:admin", "PORT": str(self.port), "METRICS_PORT": str(self.metrics_port),
            "RETRY_DELAYS": "0.2,0.5,1", "LOG_FORMAT": "json", **environment,
        }  # fmt: skip
        self.commands = {"api": [sys.executable, "orderproc.py"], "consumer": [sys.executable, "consumer.py"]}
        if self.embedded:
            del self.commands["consumer"]
        else:
            self.commands = {
                "lambdas": [sys.executable, "-m", "lambdas.local", "--port", str(lambda_port)],
                **self.commands,
            }
            self.environment |= {
                "AWS_ENDPOINT_URL_LAMBDA": f"http://127.0.0.1:{lambda_port}", "AWS_DEFAULT_REGION": "local",
                "AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local",
            }  # fmt: skip

    def __enter__(self) -> "System":
        for name in self.commands:
            self.start(name)
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self.processes)):
            self.stop(name)

    # --- processes

    def start(self, name: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.commands[name], cwd=ROOT, env=self.environment, stdout=log, stderr=log
            )

    def stop(self, name: str) -> int:
        """SIGTERM; gives the exit code. Kills what does not end within 15 s, which gives -9."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            return process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def wait_ready(self, seconds: float = 30) -> None:
        for name, port in (("api", self.port), ("consumer", self.metrics_port)):
            if name in self.processes:
                wait_for(functools.partial(self._ready, name, port), seconds, f"{name} is ready")

    def _ready(self, name: str, port: int) -> bool:
        assert self.processes[name].poll() is None, self.log(name)[-3000:]
        try:
            return self.call("GET", "/readyz", port=port)[0] == 200
        except OSError:
            return False

    # --- the client

    def call(self, method: str, path: str, body: object = None, port: int = 0, **headers: str) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=20)
        try:
            return _exchange(connection, method, path, body, headers)
        finally:
            connection.close()

    def order(self, n: int = 0, sku: str = "A1", quantity: int = 1) -> dict:
        return {
            "customerId": f"customer-{n}", "email": f"customer-{n}@example.com",
            "items": [{"sku": sku, "quantity": quantity, "price": 19.99}],
        }  # fmt: skip

    def post_many(self, orders: int, clients: int, pause: float = 0, make=None) -> list[Result]:
        """Post so many orders from many clients, and give their results."""
        with self.load(clients, pause, orders, make) as results:
            return results

    @contextmanager
    def load(self, clients: int, pause: float = 0, orders: int = 0, make=None):
        """Orders posted from many clients while the block runs, or until there were so many; gives the live results."""
        numbers = iter(range(orders)) if orders else itertools.count()
        results: list[Result] = []
        over, lock = threading.Event(), threading.Lock()

        def client(_: int) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            while not over.is_set():
                with lock:
                    n = next(numbers, None)
                if n is None:
                    break
                results.append(_post(connection, (make or self.order)(n)))
                time.sleep(pause or (0.05 if not results[-1].status else 0))
            connection.close()

        with ThreadPoolExecutor(clients) as pool:
            running = pool.map(client, range(clients))
            try:
                yield results
                if orders:
                    list(running)
            finally:
                over.set()

    def orders(self) -> list[dict]:
        """Every order, as the API shows it."""
        found, cursor = [], ""
        while True:
            page = self._page(f"limit=100{cursor}")
            found += page["orders"]
            if not page["next"]:
                return found
            cursor = f"&cursor={page['next']}"

    def pending(self, limit: int = 100) -> set[str]:
        """The ids of orders that are pending, up to a limit."""
        return {order["id"] for order in self._page(f"limit={limit}&status=pending")["orders"]}

    def _page(self, query: str) -> dict:
        """A page of orders; where the store is slow for a moment (503), it is asked for again."""
        return wait_for(lambda: (answer := self.call("GET", f"/orders?{query}"))[0] == 200 and answer[1], 10)

    def wait_until_final(self, seconds: float = 60) -> float:
        """Wait until no order is pending and every mail is recorded; gives the seconds that took."""
        started = time.monotonic()
        # Looked at now and then only: the looking would be most of the store's work.
        wait_for(lambda: not self.pending(limit=1), seconds, "every order is final", every=0.25)
        wait_for(lambda: all(_mailed(order) for order in self.orders()), seconds, "every mail is recorded", every=0.5)
        return time.monotonic() - started

    @contextmanager
    def database(self):
        """The database behind it, for what the API does not show."""
        with pymongo.MongoClient(self.mongodb_url) as client:
            yield client.get_default_database()

    def metric(self, name: str, port: int = 0) -> float:
        """A metric's value: summed over all its labels, or of the one series that is named with labels."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=20)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if name in (line.split("{")[0].split(" ")[0], line.rsplit(" ", 1)[0])
        )

    def age_moves(self) -> None:
        """Have the sweep end the stock moves of killed processes now, instead of a minute later."""
        with self.database() as database:
            for document in database.stock.find({"moves.0": {"$exists": True}}):
                moves = [move | {"mark": -1} for move in document["moves"]]  # below any beat of the sweep
                unchanged = {"_id": document["_id"], "moves": document["moves"]}
                database.stock.update_one(unchanged, {"$set": {"moves": moves}})

    def wait_until_whole(self, stock: dict[str, int], seconds: float = 30) -> None:
        """Wait until `check` finds nothing wrong; raises AssertionError with what it finds."""
        wrong = self.still_wrong(stock, seconds)
        assert not wrong, wrong

    def still_wrong(self, stock: dict[str, int], seconds: float = 30) -> list[str]:
        """What `check` finds after a while; less where it finds nothing."""
        deadline = time.monotonic() + seconds
        while (wrong := self.check(stock)) and time.monotonic() < deadline:
            time.sleep(0.5)
        return wrong

    # --- what must hold once everything is over

    def check(self, stock: dict[str, int]) -> list[str]:
        """What is wrong: orders that did not end, stock that does not add up, labels and mails too many or too few."""
        orders, wrong = self.orders(), []
        wrong += [f"{order['id']} is {order['status']}" for order in orders if order["status"] not in FINAL]
        wrong += [f"{order['id']} has {order['parked']} parked" for order in orders if "parked" in order]
        held = Counter()
        for order in (order for order in orders if order["status"] == "processed"):
            held.update({item["sku"]: item["quantity"] for item in order["items"]})
        for sku, units in stock.items():
            _, entry = self.call("GET", f"/stock/{sku}")
            if entry["available"] + held[sku] != units or entry["available"] < 0:
                wrong.append(f"{sku}: {units} at first, {entry['available']} available and {held[sku]} held now")
        processed = {order["id"] for order in orders if order["status"] == "processed"}
        made, void = ({path.stem for path in (self.folder / "data/labels").glob(f"*.{end}")} for end in ("svg", "void"))
        labels = made - void  # a void mark outranks a label
        wrong += [f"{id} has no label" for id in processed - labels]
        wrong += [f"{id} has a label but is not processed" for id in labels - processed]
        mails = Counter(_order_of(path) for path in (self.folder / "data/mail").glob("new/*"))
        wrong += [f"{order['id']} has {mails[order['id']]} mails" for order in orders if mails[order["id"]] != 1]
        return wrong


def _post(connection: http.client.HTTPConnection, order: dict) -> Result:
    started = time.monotonic()
    try:
        status, stored = _exchange(connection, "POST", "/orders", order, {})
    except (OSError, http.client.HTTPException):
        status, stored = 0, {}
        connection.close()
    return Result(status, stored.get("id", ""), time.monotonic() - started)


def _exchange(
    connection: http.client.HTTPConnection, method: str, path: str, body: object, headers: dict
) -> tuple[int, dict]:
    sent = {"Authorization": f"Bearer {SECRET}", "Content-Type": "application/json", **headers}
    connection.request(method, path, json.dumps(body) if body is not None else None, sent)
    response = connection.getresponse()
    text = response.read()
    return response.status, json.loads(text) if text[:1] == b"{" else {}


def _mailed(order: dict) -> bool:
    return any(line["by"] == "email" and "done" in line for line in order["timeline"])


def _order_of(path: Path) -> str:
    return email.message_from_bytes(path.read_bytes())["X-Order-Id"]


def wait_for(condition, seconds: float = 20, what: str = "", every: float = 0.05):
    """Poll until the condition gives something true, and give that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(every)
    raise AssertionError(f"not within {seconds} s: {what or condition}")
