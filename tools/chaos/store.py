"""A store in trouble, and what the whole program makes of it, in figures.

    python -m tools.chaos.store overload [--seconds N]    many more clients than it bears, for ten minutes
    python -m tools.chaos.store refusing [--seconds N]    a store that reads, and refuses every write
    python -m tools.chaos.store stale                     decisions beside a secondary that lags

The store is a simulator of a MongoDB server (`tests/support/wire_store.py`), as no real one misbehaves on demand. The
broker is that of AMQP_URL, or in memory. It exits with 1 where a promise is broken.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.wire_store import WireStore, always, delay, on, refuse, refuse_writes, replica_set
from tools.chaos.system import Result, System, free_port

STOCK = 1_000_000
SLOW = 0.05  # seconds that a slow store takes for each bulk
CODES = (13, 301, 8000, 14031, 16500)


@contextmanager
def running(store: WireStore, url: str = "", **environment: str) -> Iterator[System]:
    """The program on this store, with stock."""
    with tempfile.TemporaryDirectory() as folder:
        broker = os.environ.get("AMQP_URL", "embedded")
        with System(Path(folder), url or store.url, broker, LOG_LEVEL="warning", **environment) as system:
            system.call("PUT", "/stock/A1", {"available": STOCK})
            yield system


def overload(seconds: float) -> list[str]:
    """Many more orders than a slow store bears; what is accepted is answered in time, and ends."""
    with WireStore() as store, running(store, API_METRICS_PORT=str(free_port())) as system:
        store.fault = always(on("*", "insert", "update"), delay(SLOW))
        with system.load(clients=8) as alone:
            time.sleep(min(5.0, seconds))
        sustained = len(alone) / min(5.0, seconds)
        before, probes = memory(system), list[float]()
        with system.load(clients=200) as results:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                probes.append(timed(system))
                time.sleep(0.1)
        after = memory(system)
        store.fault = None
        show("accepted a second, 8 clients", sustained)
        show("asked a second, 200 clients", len(results) / seconds)
        latencies("accepted", [result for result in results if result.status == 201])
        latencies("refused", [result for result in results if result.status == 503])
        show("probe at its slowest, s", max(probes))
        show("memory before and after, MiB", before, after)
        slowest = max((result.seconds for result in results if result.status == 201), default=0)
        return whole(system, results) + [
            text for broken, text in (
                (slowest > 4, f"an accepted order took {slowest:.1f} s"),
                (max(probes) > 1.5, "a probe waited"),
                (after > before + 100, "memory grew"),
                ({result.status for result in results} - {201, 503}, "other answers than 201 and 503"),
            ) if broken
        ]  # fmt: skip


def refusing(seconds: float) -> list[str]:
    """Every write is refused for a while, with one code after the other; nothing is parked and no try is spent."""
    with WireStore() as store, running(store) as system:
        with system.load(clients=4, pause=0.05) as results:
            time.sleep(2)
            ready = []
            for code in CODES:
                fault = refuse(code) if code in (13, 301) else refuse_writes(code)
                store.fault = always(on("*", "insert", "update"), fault)
                time.sleep(seconds / len(CODES))
                ready.append(system.call("GET", "/readyz")[0])
            store.fault, well = None, time.monotonic()
            system.wait_ready()
            show("ready again after, s", time.monotonic() - well)
            time.sleep(1)
        statuses = Counter(result.status for result in results)
        logs = "".join(system.log(name) for name in system.processes)
        tries = sum("failed" in line or "parked" in line for order in system.orders() for line in order["timeline"])
        show("answers", dict(statuses))
        show("/readyz meanwhile", Counter(ready))
        show("lines about the store", logs.count("the store does not do what it is asked"))
        show("broker reconnects", logs.count("connecting again"))
        show("tries spent", tries)
        return whole(system, results) + [
            text for broken, text in (
                (tries, "a try was spent"), (200 in ready, "ready while no write was taken"),
                ("connecting again" in logs, "the broker was reconnected"),
                (503 not in statuses, "nothing was refused"),
            ) if broken
        ]  # fmt: skip


def stale(_: float) -> list[str]:
    """A URL that asks to read from secondaries, and one that is 20 ms behind; nobody reads from it."""
    with replica_set(0.0, 0.02) as store, running(store, f"{store.url}&readPreference=secondaryPreferred") as system:
        results = system.post_many(150, clients=8)
        show("answers", dict(Counter(result.status for result in results)))
        asked = sum(name == "find" for follower in store.followers for name, _ in follower.commands)
        statuses = {result.status for result in results}
        return whole(system, results) + (["not every order was accepted"] if statuses != {201} else []) + (
            [] if asked < 10 else [f"{asked} reads went to secondaries"]  # those of this script
        )  # fmt: skip


def whole(system: System, results: list[Result]) -> list[str]:
    """What is wrong once everything has ended: lost, doubled, parked, stock that does not add up."""
    accepted = {result.id for result in results if result.status == 201}
    seconds = system.wait_until_final(300)
    system.age_moves()
    wrong = system.still_wrong({"A1": STOCK})
    lost = accepted - {order["id"] for order in system.orders()}
    show("all orders ended after, s", seconds)
    show("lost, doubled, parked, units missing", len(lost) + len(wrong))
    return wrong + [f"{id} is lost" for id in lost]


def latencies(what: str, results: list[Result]) -> None:
    seconds = sorted(result.seconds for result in results) or [0.0]
    middle, late = (seconds[int(len(seconds) * share)] for share in (0.5, 0.99))
    show(f"{what}: count, median, 99 %, slowest s", len(results), middle, late, seconds[-1])


def timed(system: System) -> float:
    """How long the API's own port for probes takes."""
    started = time.monotonic()
    system.call("GET", "/healthz", port=int(system.environment["API_METRICS_PORT"]))
    return time.monotonic() - started


def memory(system: System) -> float:
    """MiB of the API's process (Linux)."""
    status = Path(f"/proc/{system.processes['api'].pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def show(what: str, *figures: object) -> None:
    texts = [f"{each:.3f}" if isinstance(each, float) else str(each) for each in figures]
    print(f"  {what:<42}", *texts, flush=True)


SCENARIOS = {"overload": (overload, 600.0), "refusing": (refusing, 60.0), "stale": (stale, 0.0)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--seconds", type=float)
    args = parser.parse_args()
    scenario, usual = SCENARIOS[args.scenario]
    print(args.scenario, flush=True)
    wrong = scenario(args.seconds or usual)
    print("\n".join(wrong[:20]) or "  every promise held")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
