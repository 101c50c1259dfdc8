"""Demo traffic: orders at a steady rate, with a line a second about what becomes of them. `make load RATE=20 SECONDS=60`

    python -m tools.load [--rate N] [--seconds N] [--url http://127.0.0.1:8080] [--key demo-key]

One order in ten asks for what is never there. What the others will need is put on the shelf first, if the key may. It
exits with 1 where an order was refused or did not end, with 2 where nobody answers.
"""

import argparse
import http.client
import sys
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tools.client import Client, order

SHELF = ("A1", "B2", "C3", "D4")
NEVER_THERE = "E5"
CLIENTS = 32  # requests at once: more than this waits for an answer
PATIENCE = 60.0  # seconds for the last orders to end


class Load:
    """Places orders and counts what becomes of them. Its customer is one of its own, by whom its orders are found."""

    def __init__(self, url: str, key: str) -> None:
        self.url, self.key, self.customer = url, key, f"load-{uuid.uuid4().hex[:8]}"
        self.answers, self.seconds = Counter[int](), list[float]()
        self._own, self._looking = threading.local(), Client(url, key)

    def fill_shelf(self, orders: int) -> None:
        """Put on the shelf what so many orders take away, while others may be selling."""
        for sku in SHELF:
            missing = orders // len(SHELF) + 1
            status, tag = 412, ""
            while status == 412:  # sold meanwhile: read it again
                entry = self._looking.call("GET", f"/stock/{sku}")
                tag = entry.etag
                body = {"available": entry.body.get("available", 0) + missing}
                precondition = {"If_Match": tag} if tag else {"If_None_Match": "*"}
                status = self._looking.call("PUT", f"/stock/{sku}", body, **precondition).status
            if status == 403:
                return print("this key may not set stock: orders may fail for want of it")

    def place(self, n: int) -> None:
        """Place the order with this number."""
        if not hasattr(self._own, "client"):
            self._own.client = Client(self.url, self.key)
        sku = NEVER_THERE if n % 10 == 9 else SHELF[n % len(SHELF)]
        began = time.monotonic()
        try:
            status = self._own.client.call("POST", "/orders", order(self.customer, sku)).status
        except (OSError, http.client.HTTPException):
            status = 0
        self.seconds.append(time.monotonic() - began)
        self.answers[status] += 1

    def count(self, status: str) -> int:
        """How many of its orders have a status."""
        found, cursor = 0, ""
        while cursor is not None:
            page = f"/orders?customerId={self.customer}&status={status}&limit=100"
            body = self._looking.call("GET", page + (f"&cursor={cursor}" if cursor else "")).body
            found, cursor = found + len(body["orders"]), body["next"]
        return found

    def show(self, seconds: float, end: str) -> int:
        """Print how it goes; gives how many orders are under way."""
        answered = sorted(self.seconds) or [0.0]
        middle, late = (1000 * answered[int(len(answered) * share)] for share in (0.5, 0.99))
        pending, placed = self.count("pending"), self.answers[201]
        refused = sum(self.answers.values()) - placed
        line = f"{seconds:4.0f} s  {placed} placed, {refused} refused, {placed - pending} ended, {pending} under way"
        print(f"{line}  answers in {middle:.0f} ms, 99 of 100 within {late:.0f} ms ", end=end, flush=True)
        return pending


def run(load: Load, rate: float, seconds: float) -> int:
    """Place them and wait for their end; gives the exit code."""
    orders, end = round(rate * seconds), "\r" if sys.stdout.isatty() else "\n"
    load.fill_shelf(orders)
    began = shown = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for n in range(orders):
            time.sleep(max(0.0, began + n / rate - time.monotonic()))
            pool.submit(load.place, n)
            if time.monotonic() - shown >= 1:
                shown = time.monotonic()
                load.show(shown - began, end)
    until = time.monotonic() + PATIENCE
    while load.show(time.monotonic() - began, end) and time.monotonic() < until:
        time.sleep(1)
    failed, pending = load.count("failed"), load.count("pending")
    print(f"\n{load.answers[201] - failed - pending} processed, {failed} failed, {pending} still under way")
    return 1 if pending or load.answers[201] < orders else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=10, help="orders a second")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--key", default="demo-key")
    args = parser.parse_args()
    if args.rate <= 0 or args.seconds <= 0:
        parser.error("--rate and --seconds must be above 0")
    try:
        return run(Load(args.url, args.key), args.rate, args.seconds)
    except OSError as error:
        print(f"{args.url} does not answer ({error}): start it with `make run`, or name it with URL=", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
