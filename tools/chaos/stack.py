"""The containers of docker-compose.yml, brought up, loaded, scaled, hurt, checked and taken down: `make stack-test`.

It needs Docker with Compose and nothing else but Python's standard library. It has a project name, ports and volumes of
its own, so a stack that runs already is not touched. SECONDS_EACH (8) is how long orders come in around each harm.
"""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

SECONDS = float(os.environ.get("SECONDS_EACH", "8"))
CLIENTS = 4
STOCK = 1_000_000
OURS = ["api", "consumer", "email", "functions"]
PORTS = {"API_PORT": "18080", "RABBITMQ_PORT": "18672", "MAILPIT_PORT": "18025"}
SECRETS = {"API_KEYS": "stack:stack-test-key:admin", "RABBITMQ_PASSWORD": "stack-test-password"}
HARM = {  # what is done to the stack while orders come in
    "three consumers for mails, not one": ["up --detach --no-recreate --wait --scale email=3"],
    "a consumer killed": ["kill --signal KILL consumer", "up --detach --no-recreate --wait consumer"],
    "the API stopped and started": ["stop api", "start api"],
    "RabbitMQ stopped and started": ["stop rabbitmq", "start rabbitmq"],
    "the Lambda runtime stopped and started": ["stop functions", "start functions"],
    "MongoDB stopped and started": ["stop mongo", "start mongo"],
    "the API killed": ["kill --signal KILL api", "up --detach --no-recreate --wait api"],
    "everything of ours restarted at once": [" ".join(["restart", *OURS])],
}


def main() -> int:
    try:
        subprocess.run(["docker", "compose", "version"], check=True, capture_output=True)
        subprocess.run(["docker", "info"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        print("stack-test needs a Docker engine with Compose, and none answers here")
        return 2
    try:
        with stack():
            return report(harm())
    except subprocess.CalledProcessError as error:
        print(f"{' '.join(error.cmd)} failed; its output is above")
        return 1


def harm() -> "Clients":
    clients = Clients()
    for name, commands in HARM.items():
        with clients.ordering():
            time.sleep(SECONDS / 2)
            for command in commands:
                compose(*command.split())
            time.sleep(SECONDS / 2)
        print(f"{name}: {len(clients.orders)} orders accepted so far, {clients.refused} tries refused", flush=True)
    return clients


@contextmanager
def stack() -> Iterator[None]:
    try:
        began = time.monotonic()
        compose("up", "--build", "--detach", "--wait")
        print(f"up and healthy after {time.monotonic() - began:.0f} s", flush=True)
        yield
    except BaseException:
        print(compose("logs", "--tail", "30", "--no-color"), file=sys.stderr)
        raise
    finally:
        compose("down", "--volumes")


def compose(*words: str) -> str:
    """Run `docker compose` and give what it printed; raises CalledProcessError, and then shows why."""
    words = ("docker", "compose", "--project-name", "orderproc-test", *words)
    environment = {**os.environ, **PORTS, **SECRETS}
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        print(run.stdout, run.stderr, sep="\n", file=sys.stderr)
    run.check_returncode()
    return run.stdout


class Clients:
    """Order all the time; what got no answer, or a 503, is sent again with the same key until it is accepted."""

    def __init__(self) -> None:
        self.orders: dict[str, str] = {}  # Idempotency-Key: order id
        self.refused = 0
        self._numbers = itertools.count()
        call("PUT", "/stock/S1", {"available": STOCK})

    @contextmanager
    def ordering(self) -> Iterator[None]:
        stop = threading.Event()
        with ThreadPoolExecutor(CLIENTS) as pool:
            running = [pool.submit(self._order, stop) for _ in range(CLIENTS)]
            try:
                yield
            finally:
                stop.set()
        for each in running:
            each.result()

    def _order(self, stop: threading.Event) -> None:
        order = {"customerId": "ada", "email": "ada@example.com", "items": [{"sku": "S1", "quantity": 1, "price": 1}]}
        while not stop.is_set():
            key, deadline = f"order-{next(self._numbers)}", time.monotonic() + 120
            while key not in self.orders:
                status, answer = call("POST", "/orders", order, {"Idempotency-Key": key})
                if status == 201:
                    self.orders[key] = answer["id"]
                elif status in (0, 503) and time.monotonic() < deadline:
                    self.refused += 1
                    time.sleep(0.2)
                else:
                    raise AssertionError(f"POST /orders: {status} {answer}")
            time.sleep(0.1)  # some thousand orders are enough


def call(method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> tuple[int, dict]:
    """Status and answer; (0, {}) where there was none."""
    port, key = PORTS["API_PORT"], SECRETS["API_KEYS"].split(":")[1]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", None if body is None else json.dumps(body).encode(), method=method,
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json", **(headers or {})},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")
    except (OSError, ValueError):
        return 0, {}


def report(clients: Clients) -> int:
    """Wait until every order ended, compare all that was done for it, and say so; 0 where nothing is wrong."""
    ids, began = set(clients.orders.values()), time.monotonic()
    wait_until(lambda: not call("GET", "/orders?status=pending&limit=1")[1].get("orders", [1]))
    wait_until(lambda: ids <= mailed().keys())
    print(f"{len(ids)} orders; all that follows from the last was done {time.monotonic() - began:.0f} s after it")
    wait_until(lambda: available() == STOCK - len(ids), 90)  # what a killed consumer held, the sweep frees after 60 s
    orders = {order["id"]: order for order in every_order()}
    mails, labels, left = mailed(), labelled(), available()
    wrong = {
        "orders answered 201 that are not there, or orders nobody sent": orders.keys() ^ ids,
        "keys that share an order": range(len(clients.orders) - len(ids)),
        "orders that did not end processed": [id for id, order in orders.items() if order["status"] != "processed"],
        "orders with a parked step": [id for id, order in orders.items() if "parked" in order],
        "orders without a mail, or with two different ones": [id for id in ids if len(set(mails[id])) != 1],
        "orders without a label, or labels without an order": labels ^ ids,
        "units of stock too many or too few": range(abs(STOCK - len(ids) - left)),
        "processes that did not end with 0 on SIGTERM": ended_badly(),
    }
    for what, which in wrong.items():
        print(f"{len(which):6} {what}", *list(which)[:3])
    print(f"{sum(map(len, mails.values())) - len(mails):6} mails that were sent again under their Message-ID")
    return 1 if any(map(len, wrong.values())) or not ids else 0


def wait_until(condition: Callable[[], bool], seconds: float = 600) -> None:
    """Poll until it is so; after `seconds` go on all the same, for the report to say what is missing."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(1)


def available() -> int:
    return call("GET", "/stock/S1")[1].get("available", -1)


def every_order() -> Iterator[dict]:
    cursor: str | None = ""
    while cursor is not None:
        page = call("GET", "/orders?limit=100" + (f"&cursor={cursor}" if cursor else ""))[1]
        yield from page["orders"]
        cursor = page["next"]


def mailed() -> dict[str, list[str]]:
    """{order id: the Message-IDs of its mails}. Mailpit lists subjects, and ours end with the order's id."""
    found, start, total = defaultdict[str, list[str]](list), 0, 1
    while start < total:
        url = f"http://127.0.0.1:{PORTS['MAILPIT_PORT']}/api/v1/messages?limit=1000&start={start}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            page = json.load(answer)
        for mail in page["messages"]:
            found[mail["Subject"].split("(")[1].rstrip(")")].append(mail["MessageID"])
        start, total = start + max(1, len(page["messages"])), page["total"]
    return found


def labelled() -> set[str]:
    """The order ids that have a label on the Lambda runtime's volume."""
    script = "import os; print(*os.listdir('/data/labels'))"
    files = compose("exec", "--no-TTY", "functions", "python", "-c", script).split()
    return {name.removesuffix(".svg") for name in files if name.endswith(".svg")}


def ended_badly() -> list[str]:
    """Stop what is ours; gives the containers that did not exit with 0."""
    compose("stop", *OURS)
    states = [json.loads(line) for line in compose("ps", "--all", "--format", "json").splitlines()]
    return [f"{each['Name']}: {each['ExitCode']}" for each in states if each["Service"] in OURS and each["ExitCode"]]


if __name__ == "__main__":
    sys.exit(main())
