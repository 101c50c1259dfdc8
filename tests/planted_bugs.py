"""Bugs to plant on purpose, and whether the tests notice: `make planted-bugs`, or `BUGS="fence lease" make planted-bugs`.

    python -m tests.planted_bugs [--sample N] [WORD ...]      WORD: only bugs with it in their name

Each bug is an edit of the program. It is made in a copy, the tests that should notice run there until one fails, and
that one is printed. A bug that no test notices, or whose text is no longer in the program, makes the exit code 1. Those
that only RabbitMQ shows need AMQP_URL, as the tests do.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FAST = "tests/fast"


class Bug(NamedTuple):
    """`edits` are (old, new) in a file; `tests` are run first, and all of tests/fast and tests/servers if none fails."""

    name: str
    file: str
    edits: list[tuple[str, str]]
    tests: str


BUGS = [
    Bug(
        "ack before the work",
        "consumer.py",
        [("        moves = StockMoves(", "        delivery.ack()\n        moves = StockMoves(")],
        "fast/test_consumer.py",
    ),
    Bug(
        "clear before the confirm",
        "core/flow/outbox.py",
        [("        self._bus.publish(Message(", '        self._orders.clear(order["_id"], id)\n        self._bus.publish(Message(')],
        "fast/test_outbox.py",
    ),
    Bug(
        "no mandatory",
        "core/flow/outbox.py",
        [("mandatory = bool(handler) or self._subscribed is None or type in self._subscribed", "mandatory = False")],
        "fast/test_outbox.py",
    ),
    Bug(
        "take without its condition",
        "core/store/moves.py",
        [('"available": {"$gte": taken}, ', "")],
        "servers/test_stock.py",
    ),
    Bug(
        "give-back visible before it is committed",
        "core/store/moves.py",
        [
            ("taken = max(0, units)", "taken = units"),
            ("_end(sku, move, max(0, -units))", "_end(sku, move, 0)"),
            ('max(0, -move["units"] if commit else move["units"])', '0 if commit else max(0, move["units"])'),
        ],
        "servers/test_stock.py",
    ),
    Bug(
        "record without the fence",
        "core/store/orders.py",
        [('        needs["fenced"] = {"$ne": change.record["attempt"]}\n', "        pass\n")],
        "servers/test_store.py fast/test_interleavings.py",
    ),
    Bug(
        "record without the status",
        "core/store/orders.py",
        [('{"_id": change.order_id, "status": change.status}', '{"_id": change.order_id}')],
        "servers/test_store.py",
    ),
    Bug(
        "record without 'not recorded yet'",
        "core/store/orders.py",
        [('        needs["steps.step"] = {"$ne": change.step}\n', "        pass\n")],
        "servers/test_store.py",
    ),
    Bug(
        "give back twice",
        "core/store/orders.py",
        [('        needs["stockReturned"] = {"$ne": True}\n', "        pass\n")],
        "servers/test_store.py fast/test_consumer.py fast/test_interleavings.py",
    ),
    Bug(
        "commit before record",
        "consumer.py",
        [("            order = self._orders.record(", "            moves.commit()\n            order = self._orders.record(")],
        "fast/test_consumer.py fast/test_interleavings.py",
    ),
    Bug(
        "sweep without fencing",
        "core/flow/sweep.py",
        [('self._open_orders.fence([(move["order"], move["id"].split(".")[0]) for _, move in old])', "[{} for _ in old]")],
        "fast/test_sweep.py fast/test_interleavings.py",
    ),
    Bug("sweep without age", "core/flow/sweep.py", [('if move["mark"] != UNMARKED]', "if True]")], "fast/test_sweep.py"),
    Bug(
        "sweep without resending",
        "core/flow/sweep.py",
        [("                self._outbox.publish_one(order, envelope, handler)\n", "")],
        "fast/test_sweep.py",
    ),
    Bug(
        "sweep without the lease",
        "core/flow/sweep.py",
        [("        if not beat:\n", "        if beat < 0:\n")],
        "fast/test_sweep.py",
    ),
    Bug(
        "closing despite unfinished steps",
        "core/flow/sweep.py",
        [(' and not unfinished and not order["parked"]', ' and not order["parked"]')],
        "fast/test_sweep.py",
    ),
    Bug(
        "ack before the retry copy is confirmed",
        "core/bus/rabbit.py",
        [('        self.publisher.publish(Letter("", queue', '        self.ack()\n        self.publisher.publish(Letter("", queue')],
        "fast/test_rabbit_delivery.py",
    ),
    Bug(
        "steps keyed by event only",
        "core/order/state_machine.py",
        [('    return f"{handler}/{event_id}"', '    return f"step/{event_id}"')],
        "fast/test_consumer.py",
    ),
    Bug(
        "publish before record",
        "consumer.py",
        [
            (
                "            order = self._orders.record(",
                "            early = [answer.envelope() for answer in answers]\n"
                '            ids = [answer.id for answer in answers]\n'
                '            self._outbox.publish_pending({**order, "events": early, "outbox": ids}, answers)\n'
                "            order = self._orders.record(",
            )
        ],
        "fast/test_consumer.py fast/test_interleavings.py",
    ),
    Bug(
        "idempotency key not per owner",
        "core/store/orders.py",
        [("f\"{order['owner']}:{key}\" if key", "key if key")],
        "servers/test_store.py fast/test_api.py",
    ),
    Bug(
        "a repeat of what must be sent once",
        "core/store/group_commit.py",
        [("        elif self.once or isinstance(error, DocumentRefused):", "        elif isinstance(error, DocumentRefused):")],
        "fast/test_group_commit.py",
    ),
    Bug(
        "an unroutable message taken for confirmed",
        "core/bus/publisher.py",
        [('"unroutable" if letter.came_back else outcome', "outcome")],
        "servers/test_bus_contract.py",
    ),
    Bug(
        "unconfirmed messages dropped on a lost connection",
        "core/bus/publisher.py",
        [("deque(self.in_hand.values())", "deque(self._queued)")],
        "servers/test_rabbit.py",
    ),
    Bug(
        "a multiple ack too far",
        "core/bus/rabbit.py",
        [("oldest = min(self.in_hand | self._released, default=math.inf)", "oldest = math.inf")],
        "servers/test_bus_contract.py servers/test_rabbit.py",
    ),
    Bug(
        "a label made after its void",
        "lambdas/make_label.py",
        [("    if not tokens.has(mark):\n", "    if True:\n"), ("    if tokens.has(mark):\n", "    if not number:\n")],
        "fast/test_lambdas.py",
    ),
    Bug(
        "cancel in any status",
        "core/order/state_machine.py",
        [("needed, lines = TRANSITIONS[event.type].needs, [", 'needed, lines = {"$exists": True}, [')],
        "servers/test_store.py fast/test_api.py",
    ),
    Bug("no drain", "core/http/serving.py", [("    drain(server, turn)\n", "    server.close()\n")], "processes/test_server.py"),
    Bug(
        "owner not checked",
        "orderproc.py",
        [('if not document or (request.key.role == "client" and document["owner"] != request.key.name):', "if not document:")],
        "fast/test_api.py",
    ),
    Bug(
        "prices by float",
        "core/order/money.py",
        [("Decimal(amount).scaleb(currencies()[currency], EXACT)", "Decimal(float(amount) * 10 ** currencies()[currency])")],
        "fast/test_money.py",
    ),
    Bug(
        "an unsure move recorded",
        "core/flow/services.py",
        [("        if self._outcome_unknown:", "        if False:")],
        "fast/test_consumer.py fast/test_interleavings.py",
    ),
    Bug(
        "a doubtful shortage taken as final",
        "core/flow/services.py",
        [('if "in_doubt" in short.values():', "if False:")],
        "servers/test_stock.py fast/test_consumer.py fast/test_interleavings.py",
    ),
    Bug(
        "a refusal after an unknown outcome believed",
        "core/store/group_commit.py",
        [("(isinstance(error, DocumentRefused) and not self.unknown)", "isinstance(error, DocumentRefused)")],
        "fast/test_group_commit.py fast/test_store_answers.py",
    ),
    Bug(
        "any error of a write taken for certain",
        "core/store/connection.py",
        [("if code in NEVER else errors.OperationFailure(message[:300], code)", "")],
        "fast/test_group_commit.py fast/test_store_answers.py",
    ),
    Bug(
        "decisions read from a secondary",
        "core/store/connection.py",
        [("ReadPreference.PRIMARY", "ReadPreference.SECONDARY_PREFERRED")],
        "fast/test_store_settings.py processes/test_chaos_store.py",
    ),
    Bug(
        "a put that needs no revision",
        "core/store/stock.py",
        [('"rev": document.get("rev")} | ', "} | ")],
        "fast/test_api.py",
    ),
    Bug(
        "ready without a write",
        "core/store/store.py",
        [('self._orders.do([Write({"_id": "-"}, {"$set": {"rev": 0}})], ["-"])', 'self._orders.do(read=["-"])'),
         ('self._leases.do([Write({"_id": "ping"}, {"$set": {"at": now()}}, upsert=True)])', 'self._leases.do(read=["ping"])')],
        "fast/test_store_settings.py",
    ),
    Bug(
        "the lease judged by nobody",
        "core/store/consumers.py",
        [('or age > EXPIRES', "or age > 0")],
        "fast/test_lease.py",
    ),
    Bug(
        "a sweep that sends before it writes",
        "core/flow/sweep.py",
        [("        written = self._open_orders", "        self._outbox.publish_pending(orders[0]) if orders else None\n        written = self._open_orders")],
        "fast/test_sweep.py",
    ),
    Bug(
        "an order that owes no event",
        "core/order/state_machine.py",
        [('"outbox": [event.id],', '"outbox": [],')],
        "fast/test_api.py",
    ),
    Bug(
        "a second click is a second order",
        "core/store/orders.py",
        [("""f"{order['owner']}:{key}" if key else order["_id"]""", 'order["_id"]')],
        "fast/test_api.py::test_forty_at_once_with_one_key_make_one_order",
    ),
    Bug(
        "a handler calls another",
        "handlers/inventory.py",
        [
            ("from core.events import Event\n", "from core.events import Event\nfrom handlers import shipping\n"),
            ('return Event("inventory_reserved")', "return shipping.inventory_reserved(event, services)"),
        ],
        "fast/test_architecture.py fast/test_handlers.py",
    ),
    Bug(
        "a misspelt handler never runs",
        "core/running/discovery.py",
        [('if name in wanted and not name.startswith("_")}', "if name in event_schemas()}")],
        "fast/test_discovery.py::test_a_misspelt_event_names_the_near_match",
    ),
    Bug(
        "tried for ever",
        "consumer.py",
        [("self._delays[tries - 1] if tries <= len(self._delays) else None", "self._delays[min(tries, len(self._delays)) - 1]")],
        "fast/test_consumer.py",
    ),
    Bug(
        "a redrive that asks nobody",
        "core/flow/sweep.py",
        [(', order.get("redriven", [])', ", []")],
        "fast/test_sweep.py",
    ),
    Bug(
        "a waiting outbox forgotten",
        "core/flow/sweep.py",
        [("        self._outbox.publish_pending(order)\n", "")],
        "fast/test_sweep.py",
    ),
]  # fmt: skip


def main() -> int:
    """Plant the bugs that were asked for; 1 if one of them is not noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--sample", type=int, default=len(BUGS), metavar="N", help="only N, drawn by the day")
    args = parser.parse_args()
    chosen = [bug for bug in BUGS if not args.words or any(word in bug.name for word in args.words)]
    if args.sample < len(chosen):
        chosen = random.Random(time.strftime("%F")).sample(chosen, args.sample)
    unnoticed = [bug.name for bug in chosen if not notice(bug)]
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} planted bugs were noticed")
    return 1 if unnoticed else 0


def notice(bug: Bug) -> bool:
    """Plant one bug in a copy, and print which test noticed it."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "data", "__pycache__"))
        if problem := plant(bug, copy):
            print(f"{bug.name:<52} NOT PLANTED: {problem}", flush=True)
            return False
        first = [f"tests/{name}" for name in bug.tests.split()]
        by = failing_test(copy, first) or failing_test(copy, [FAST, "tests/servers"])
    noticed = by.startswith("tests/")  # else pytest itself went wrong
    print(f"{bug.name:<52} {'' if noticed else 'NOT NOTICED '}{by}  ({time.monotonic() - started:.0f} s)", flush=True)
    return noticed


def plant(bug: Bug, copy: Path) -> str:
    """Edit the copy; gives what is wrong with the edit, or nothing."""
    source = (copy / bug.file).read_text()
    for old, new in bug.edits:
        if source.count(old) != 1:
            return f"{old.strip()!r} is {source.count(old)} times in {bug.file}"
        source = source.replace(old, new)
    try:
        compile(source, bug.file, "exec")
    except SyntaxError as error:  # every test fails then, and none says anything
        return f"that is no Python any more: {error}"
    (copy / bug.file).write_text(source)
    return ""


def failing_test(copy: Path, tests: list[str]) -> str:
    """The first test that fails in the copy; empty where all pass."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    return failed[1] if failed else "" if run.returncode == 0 else f"pytest ended with {run.returncode}"


if __name__ == "__main__":
    sys.exit(main())
