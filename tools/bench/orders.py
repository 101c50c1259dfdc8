"""How much work an order makes: store commands, batch sizes, rates, counted over both processes.

    python -m tools.bench.orders --mongodb-url mongodb://... --amqp-url amqp://... [--orders 1000] [--clients 1 16 64]

Rates are those of this machine and this minute; commands per order and batch sizes are the program's own. Counting ends
when every order is closed, so clearing, committing and sweeping are in the figures. It writes to the database
`orderproc_bench` and uses the broker's `orders` exchange: give it a vhost of its own.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pymongo

from tools.chaos.system import System, wait_for

COLUMNS = {  # and their widths
    "clients": 8, "refused": 9, "accepted/s": 12, "ended/s": 10, "commands/order": 16, "batch: orders": 15, "stock": 8
}  # fmt: skip
OPEN = {"due": {"$exists": True}}


def main() -> None:
    arguments = _arguments()
    url = urlunsplit(urlsplit(arguments.mongodb_url)._replace(path="/orderproc_bench"))
    print(row(COLUMNS))
    for clients in arguments.clients:
        with pymongo.MongoClient(url) as client:
            client.drop_database("orderproc_bench")
        with tempfile.TemporaryDirectory() as folder, System(Path(folder), url, arguments.amqp_url) as system:
            measure(system, arguments.orders, clients)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mongodb-url", required=True)
    parser.add_argument("--amqp-url", required=True)
    parser.add_argument("--orders", type=int, default=1000)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    return parser.parse_args()


def measure(system: System, orders: int, clients: int) -> None:
    """One row: so many orders from so many clients, until nothing is left to do."""
    for sku in ("A1", "B2", "C3", "D4"):
        system.call("PUT", f"/stock/{sku}", {"available": 1_000_000})
    before, started = counters(system), time.monotonic()
    results = system.post_many(orders, clients, make=lambda n: system.order(n, ("A1", "B2", "C3", "D4")[n % 4]))
    accepted = time.monotonic() - started
    refused = [result.status for result in results if result.status != 201]  # had waited too long for a thread
    assert set(refused) <= {503}, refused
    orders -= len(refused)
    with system.database() as database:
        wait_for(lambda: not database.orders.find_one({"status": "pending"}), 300, "every order is final", every=0.25)
        ended = time.monotonic() - started
        wait_for(lambda: not database.orders.find_one(OPEN), 300, "every order is closed", every=1)
    after = counters(system)
    commands, *batches = [after[name] - before[name] for name in after]
    sizes = [batches[n] / max(1, batches[n + 1]) for n in (0, 2)]
    rates = f"{orders / accepted:.0f}", f"{orders / ended:.0f}"
    per_order = f"{commands / orders:.2f}", *(f"{size:.1f}" for size in sizes)
    print(row([clients, len(refused), *rates, *per_order]), flush=True)


def row(cells: Iterable[object]) -> str:
    """A line of the table."""
    return "".join(f"{cell!s:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))


def counters(system: System) -> dict[str, float]:
    """The program's counters, added up over API and consumer."""
    names = ["orderproc_store_commands_total"]
    names += [
        f'orderproc_batch_size_{what}{{what="{name}"}}' for name in ("orders", "stock") for what in ("sum", "count")
    ]
    return {name: sum(system.metric(name, port) for port in (system.port, system.metrics_port)) for name in names}


if __name__ == "__main__":
    main()
