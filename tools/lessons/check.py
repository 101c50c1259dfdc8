"""Is a lesson done, or what is missing? `make lesson-3`; `HINT=1 make lesson-3` says how.

    python -m tools.lessons.check LESSON [--hint]

It looks at orders, files and metrics; it changes nothing.
"""

import argparse
import http.client
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

from tools.client import Client
from tools.lessons import KEY, ROOT, data, url

Order = dict[str, Any]
AWAY = 3  # seconds: an event that lay in the outbox for so long waited for the broker


class Check(NamedTuple):
    """Something that is there once the lesson is done."""

    what: str
    hint: str
    holds: Callable[["Shop"], bool]


class Shop:
    """The running program, as the API tells of it."""

    def __init__(self) -> None:
        self._api = Client(url(), KEY)

    def orders(self, customer: str) -> list[Order]:
        """A customer's orders, newest first."""
        return self.get(f"/orders?limit=100&customerId={customer}")["orders"]

    def get(self, path: str) -> dict[str, Any]:
        status, body, _ = self._api.call("GET", path)
        if status != 200:
            raise OSError(f"{path}: {status}")
        return body

    def metric(self, name: str, *labels: str) -> float:
        """The sum of a metric's series that have all these labels, as `status="201"`."""
        connection = http.client.HTTPConnection(url().removeprefix("http://"), timeout=20)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        series = [line for line in lines if re.match(rf"{name}[ {{]", line)]
        return sum(float(line.split()[-1]) for line in series if all(label in line for label in labels))


def done_by(order: Order, handler: str, event: str) -> bool:
    """Whether the handler did its step on this event, with or without an answer."""
    took = [line for line in order["timeline"] if line["by"] == handler and event in (line.get("done"), line.get("of"))]
    return len(took) == 1


def processed_once(order: Order) -> bool:
    """Whether three handlers did one step each."""
    steps = [("inventory", "order_created"), ("shipping", "inventory_reserved"), ("email", "order_confirmed")]
    return order["status"] == "processed" and all(done_by(order, *step) for step in steps)


def replayed(shop: Shop) -> bool:
    answered = shop.metric("orderproc_http_request_seconds_count", 'route="/orders"', 'method="POST"', 'status="201"')
    return len(shop.orders("mary")) == 1 and answered > shop.metric("orderproc_orders_total", 'status="pending"')


def own_test_passes(_: Shop) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(data() / "test_points.py")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def points_in_map(shop: Shop) -> bool:
    return any(each["name"] == "points" and each["takes"] for each in shop.get("/handlers")["handlers"])


def survived(shop: Shop) -> bool:
    """An order that was there before the program started, and was processed by it."""
    began = shop.metric("process_start_time_seconds")
    return any(processed_once(order) and stamp(order["createdAt"]) < began for order in shop.orders("kim"))


def stamp(at: str) -> float:
    """Seconds since 1970 of a time as the API writes it."""
    return datetime.fromisoformat(at).timestamp()


def waited(order: Order) -> bool:
    """Whether its first event lay in the outbox for a while."""
    first = next((line for line in order["timeline"] if line["by"] == "inventory"), None)
    return first is not None and stamp(first["at"]) - stamp(order["createdAt"]) > AWAY


def mended(order: Order) -> bool:
    return processed_once(order) and any("parked" in line and line["by"] == "shipping" for line in order["timeline"])


def given_up(order: Order) -> bool:
    failed = any("failed" in line or "parked" in line for line in order["timeline"] if line["by"] == "shipping")
    return order["status"] == "cancelled" and failed and done_by(order, "email", "order_cancelled")


def one_buyer_of_forty(shop: Shop) -> bool:
    newest = [order["status"] for order in shop.orders("buyer")[:40]]
    return newest.count("processed") == 1 and newest.count("failed") == 39


def paid(order: Order) -> bool:
    return order["status"] == "processed" and done_by(order, "payment", "inventory_reserved")


def refunded(order: Order) -> bool:
    notes = {path.suffix for path in (data() / "payments").glob(f"{order['id']}.*")}
    return done_by(order, "payment", "order_cancelled") and notes == {".charge", ".refund"}


def some(customer: str, holds: Callable[[Order], bool]) -> Callable[[Shop], bool]:
    """Whether it holds of one of a customer's orders."""
    return lambda shop: any(map(holds, shop.orders(customer)))


LESSONS = {
    1: [
        Check("an order of ada is processed, by three handlers", "order ada A1 2", some("ada", processed_once)),
        Check(
            "an order of grace failed, as it is out of stock", "order grace E5 1",
            some("grace", lambda order: order.get("failureReason") == "out_of_stock"),
        ),
        Check(
            "mary asked twice with one key, and has one order", "order mary B2 1 --key click-7, and the same again",
            replayed,
        ),
    ],
    2: [
        Check("points takes events", "write data/mine/points.py, then HANDLERS_DIR=data/mine run", points_in_map),
        Check(
            "an order of pia got its points", "order pia A1 2",
            some("pia", lambda order: done_by(order, "points", "order_confirmed")),
        ),
        Check("your test passes", "write data/test_points.py; make .venv/dev installs pytest", own_test_passes),
    ],
    3: [
        Check(
            "an order of kim came through a kill -9, with each step once",
            "order kim A1 1, then kill the program while inventory sleeps, and start it again", survived,
        ),
    ],
    4: [
        Check(
            "five orders of lee were accepted while the broker was away, and are processed",
            "end the broker, order lee A1 1 five times, start it again",
            lambda shop: sum(processed_once(order) and waited(order) for order in shop.orders("lee")) >= 5,
        ),
    ],
    5: [
        Check(
            "an order of joan was parked, redriven and processed; inventory did its step once",
            "order joan A1 1 without paper, wait until it is parked, touch data/paper, redrive", some("joan", mended),
        ),
        Check(
            "an order of nils was cancelled while its label failed, and nils was told",
            "order nils A1 1 without paper, then cancel", some("nils", given_up),
        ),
    ],
    6: [
        Check("of forty buyers one got the last unit", "stock D4 1, then buyers 40 D4", one_buyer_of_forty),
        Check("no D4 is left, and none too few", "stock D4", lambda shop: shop.get("/stock/D4")["available"] == 0),
    ],
    7: [
        Check("an order of otto is paid and processed", "HANDLERS_DIR=examples/payment run; order otto A1 1",
              some("otto", paid)),
        Check("an order of rosa was cancelled while it was paid for, and refunded",
              "PAYMENT_SECONDS=5 HANDLERS_DIR=examples/payment run; order rosa A1 1; cancel", some("rosa", refunded)),
    ],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lesson", type=int, choices=LESSONS)
    parser.add_argument("--hint", action="store_true")
    args = parser.parse_args()
    noted = data() / f"lessons/guess-{args.lesson}"
    how = f'guess {args.lesson} "what you think"'
    try:
        done = [show(check, check.holds(Shop()), args.hint) for check in LESSONS[args.lesson]]
    except (OSError, http.client.HTTPException):
        done = [show(Check(f"the program runs, at {url()}", "make run, or the word run", bool), False, args.hint)]
    done.append(show(Check("your guess is written down", how, bool), noted.exists(), args.hint))
    if not all(done):
        print("Not yet." if args.hint else f"Not yet. HINT=1 make lesson-{args.lesson} says how.")
        return 1
    print(f"Lesson {args.lesson} is done. Your guess was: {noted.read_text().strip()}")
    return 0


def show(check: Check, holds: bool, hint: bool) -> bool:
    print(f"{'done   ' if holds else 'missing'}  {check.what}" + (f"\n         {check.hint}" * (hint and not holds)))
    return holds


if __name__ == "__main__":
    sys.exit(main())
