"""Demo traffic: orders at a steady rate, and a line a second that says what becomes of them: `make load RATE=20`.

    python -m tools.load [--rate N] [--seconds N] [--url http://127.0.0.1:8080] [--key demo-key]

One order in ten asks for what is never there. What the others need is put on the shelf first, if the key may. It goes
on while the program is down. It exits with 1 where an order was refused or did not end, with 2 where nobody answers.
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
CLIENTS = 32  # requests at once; more wait here, and that counts as their answer taking long
PATIENCE = 60.0  # seconds for the last orders to end
WIDTH = 110  # columns of a line, so that it covers the one before
NO_ANSWER = (OSError, http.client.HTTPException)


class Load:
    """Places orders and counts what becomes of them. Its customer is one of its own, by whom its orders are found."""

    def __init__(self, url: str, key: str) -> None:
        self.url, self.key, self.customer = url, key, f"load-{uuid.uuid4().hex[:8]}"
        self.answers, self.seconds, self.asked = Counter[int](), list[float](), 0
        self._own, self._looking = threading.local(), Client(url, key)

    def fill_shelf(self, units: int) -> int:
        """Add so many units of each article, though others may be selling; gives the status of the answer."""
        for sku in SHELF:
            status = 412
            while status == 412:  # sold meanwhile: read it again
                entry = self._looking.call("GET", f"/stock/{sku}")
                there = {"If_Match": entry.etag} if entry.status == 200 else {"If_None_Match": "*"}
                available = {"available": entry.body.get("available", 0) + units}
                status = self._looking.call("PUT", f"/stock/{sku}", available, **there).status
            if status not in (200, 201):
                return status
        return 200

    def place(self, n: int, due: float) -> None:
        """Place the order with this number, which is due at a time of the monotonic clock."""
        if not hasattr(self._own, "client"):
            self._own.client = Client(self.url, self.key)
        sku = NEVER_THERE if n % 10 == 9 else SHELF[n % len(SHELF)]
        try:
            status = self._own.client.call("POST", "/orders", order(self.customer, sku)).status
        except NO_ANSWER:
            status = 0
        self.seconds.append(time.monotonic() - due)
        self.answers[status] += 1

    def count(self, status: str) -> int:
        """How many of its orders have a status."""
        found, page = 0, f"/orders?customerId={self.customer}&status={status}&limit=100"
        cursor: str | None = ""
        while cursor is not None:
            body = self._looking.call("GET", page + (f"&cursor={cursor}" if cursor else "")).body
            found, cursor = found + len(body["orders"]), body["next"]
        return found

    def show(self, seconds: float, end: str) -> int:
        """Print how it goes; gives how many orders are under way, 1 where nobody knows."""
        placed, answered = self.answers[201], sorted(self.seconds) or [0.0]
        try:
            pending = self.count("pending")
        except (*NO_ANSWER, KeyError):
            print(f"{seconds:4.0f} s  the program gives no answer".ljust(WIDTH), end=end, flush=True)
            return 1
        middle, late = (1000 * answered[int(len(answered) * share)] for share in (0.5, 0.99))
        refused, ended = sum(self.answers.values()) - self.answers[201], max(0, placed - pending)
        counts = f"{placed} placed, {refused} refused, {ended} ended, {pending} under way"
        times = f"answers in {middle:.0f} ms, 99 of 100 within {late:.0f} ms"
        print(f"{seconds:4.0f} s  {counts}; {times}".ljust(WIDTH), end=end, flush=True)
        return pending + self.asked - sum(self.answers.values())


def run(load: Load, rate: float, seconds: float) -> int:
    """Place them and wait for their end; gives the exit code."""
    orders, end = round(rate * seconds), "\r" if sys.stdout.isatty() else "\n"
    filled = load.fill_shelf(orders // len(SHELF) + 1)
    if filled == 401:
        print("the program does not know this key: name one with KEY=", file=sys.stderr)
        return 2
    if filled != 200:
        print(f"the shelf could not be filled (status {filled}), so orders may fail for want of it")
    began = shown = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for load.asked in range(1, orders + 1):
            due = began + load.asked / rate
            time.sleep(max(0.0, due - time.monotonic()))
            pool.submit(load.place, load.asked, due)
            if time.monotonic() - shown >= 1:
                shown = time.monotonic()
                load.show(shown - began, end)
        until = time.monotonic() + PATIENCE
        while load.show(time.monotonic() - began, end) and time.monotonic() < until:
            time.sleep(1)
    failed, pending, placed = load.count("failed"), load.count("pending"), load.answers[201]
    print(f"\n{placed} placed: {placed - failed - pending} processed, {failed} failed, {pending} still under way")
    return 1 if pending or placed < orders else 0


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
    except NO_ANSWER as error:
        print(f"{args.url} does not answer ({error}): start it with `make run`, or name it with URL=", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
