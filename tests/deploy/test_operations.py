"""docs/operations.md and the alerts beside it, held against the program: names, commands, and what the commands do."""

import copy
import re
import threading
from datetime import timedelta
from types import SimpleNamespace

import mongomock
import pytest
import yaml
from prometheus_client import REGISTRY

import consumer
from core import settings
from core.bus import Delivery, main_queue
from core.events import FINAL, now
from core.outbox import Outbox
from core.settings import ROOT, VARIABLES
from core.stock import Stock
from core.store import EPOCH, Orders, view
from core.sweep import Sweep
from tests.support.carriers import FakeBus, place
from tools.chaos.system import wait_for

DOCS = ROOT / "docs"
TEXT = (DOCS / "operations.md").read_text()
GROUPS = yaml.safe_load((DOCS / "prometheus-rules.yml").read_text())["groups"]
RULES = {rule["alert"]: rule for group in GROUPS for rule in group["rules"]}
QUERIES = re.findall(r"`([^`\n]*rate\([^`]*)`", TEXT)
METRICS = {  # name, as it is exported -> metric
    metric._name + "_total" * (metric._type == "counter"): metric
    for metric in REGISTRY._collector_to_names
    if getattr(metric, "_name", "").startswith("orderproc_")
}
PROMETHEUS_ADDS = {"le", "job", "instance"}
NOT_SETTINGS = {"BACKUP_URL", "MONGODB_USER", "MONGODB_PASSWORD"}  # of the database, not of our processes


def labels_of(series: str) -> set[str]:
    """The labels of a metric or of one of a histogram's series; KeyError where there is no such metric."""
    return set(METRICS[re.sub("_(bucket|count|sum)$", "", series)]._labelnames)


def anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-")


def headings(level: str) -> list[str]:
    return re.findall(rf"^{level} (.+)$", TEXT, re.MULTILINE)


# --- metrics and alerts


def test_every_metric_has_its_row_with_its_labels():
    rows = dict(re.findall(r"^\| `(orderproc_\w+)(?:\{([\w,]+)\})?` \|", TEXT, re.MULTILINE))
    assert len(rows) >= 11 and rows == {name: ",".join(metric._labelnames) for name, metric in METRICS.items()}


@pytest.mark.parametrize("query", [rule["expr"] for rule in RULES.values()] + QUERIES)
def test_a_query_uses_metrics_and_labels_that_exist(query):
    matched = re.findall(r'(\w+) ?[!=]~?"', query)
    grouped = [label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")]
    known = set().union(*map(labels_of, re.findall(r"\borderproc_\w+", query)))
    foreign = {"queue"} if "rabbitmq_" in query else set()
    assert {*matched, *grouped} <= known | foreign | PROMETHEUS_ADDS


@pytest.mark.parametrize("name", RULES)
def test_an_alert_asks_for_outcomes_and_routes_that_the_program_knows(name):
    source = "".join((ROOT / file).read_text() for file in ("consumer.py", "core/outbox.py", "core/telemetry.py"))
    asked = re.findall(r'(?:outcome|route) ?[!=]~?"([^"]*)"', RULES[name]["expr"])
    assert {value for values in asked for value in values.split("|") if f'"{value}"' not in source} == set()


def test_the_tests_of_the_rules_feed_metrics_that_exist_and_try_every_alert():
    text = (DOCS / "prometheus-rules-test.yml").read_text()
    for name, labels in re.findall(r"'(orderproc_\w+)\{([^}]*)\}'", text):
        assert set(re.findall(r'(\w+)="', labels)) <= labels_of(name) | PROMETHEUS_ADDS
    tried = set(re.findall(r"alertname(?:: |=\")(\w+)", text))
    assert tried == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_an_alert_says_how_grave_it_is_and_where_its_runbook_is(name):
    rule = RULES[name]
    assert re.fullmatch("([A-Z][a-z]+)+", name) and rule["for"]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{anchor(name)}"


def test_every_alert_has_a_section_and_every_section_under_the_alerts_has_an_alert():
    assert sorted(headings("###")) == sorted(RULES)
    assert set(RULES) <= set(re.findall(r"\[(\w+)\]\(#\w+\)", TEXT[: TEXT.index("## What to do")]))


def test_every_link_inside_the_document_leads_somewhere():
    anchors = {anchor(heading) for level in ("##", "###") for heading in headings(level)}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors
    files = set(re.findall(r"\]\(([^#)]+)\)", TEXT))
    assert {file for file in files if not (DOCS / file).exists()} == set()


# --- commands and names


def test_every_command_is_one_that_the_consumer_takes():
    commands = re.findall(r"python consumer\.py((?: [a-z0-9-]+)*)", TEXT)
    assert {words.split()[0] for words in commands} == {"dead", "redrive", "purge", "retire"}
    for words in commands:
        consumer._arguments(words.split())


def test_every_setting_that_is_named_exists():
    named = set(re.findall(r"`([A-Z][A-Z_]{3,})`|\b([A-Z]+_[A-Z_]+)=|\$([A-Z][A-Z_]+)", TEXT))
    words = {word for group in named for word in group if word} - NOT_SETTINGS
    assert {"API_KEYS", "RETRY_DELAYS", "MONGODB_URL"} <= words <= set(VARIABLES)


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) >= 3 and {name for name in named if f"def {name}(" not in written} == set()


# --- what the commands for the store do

MOMENTS = {"new Date()": now, "new Date(0)": lambda: EPOCH}


def from_the_document(name: str, **values):
    """What `const name = ...` in a block of the document is, with `values` for the other names in it."""
    [line] = re.findall(rf"^const {name} = ([\[{{].*)$", TEXT, re.MULTILINE)
    known = values | {text: moment() for text, moment in MOMENTS.items()}

    def filled(value):
        if isinstance(value, dict):
            return {key: filled(each) for key, each in value.items()}
        return known.get(value, value) if isinstance(value, str) else value

    return filled(yaml.safe_load(line))  # a mapping without quotes around its keys is YAML


def first_id(before) -> str:
    """As the document makes it: the first 48 bits of a UUIDv7 are its milliseconds."""
    [line] = re.findall(r"^const first = .*$", TEXT, re.MULTILINE)
    assert 'hex.slice(0, 8) + "-" + hex.slice(8)' in line
    digits = f"{(before - EPOCH) // timedelta(milliseconds=1):012x}"
    return f"{digits[:8]}-{digits[8:]}"


class System:
    """The three handlers on mongomock; broker and functions remember. `pump` delivers what was published."""

    def __init__(self) -> None:
        self.database = mongomock.MongoClient()["orderproc"]
        self.orders, self.stock, self.bus = Orders(self.database), Stock(self.database), FakeBus()
        self.stock.fill({"A1": 10})
        self.calls: list[tuple[str, str]] = []
        self.failing = ""
        handlers, stop = consumer.discover(ROOT / "handlers"), threading.Event()
        self.takers = {
            type: [name for name in handlers if type in handlers[name]] for type in consumer.events.event_schemas()
        }
        self.outbox = Outbox(self.orders, self.bus, set(self.takers))
        config = settings.load({"RETRY_DELAYS": ""})
        functions = SimpleNamespace(invoke=self.invoke)
        self.worker = consumer.Worker(handlers, config, self.orders, self.stock, self.bus, self.outbox, functions, stop)
        self.sweep = Sweep(self.orders, self.stock, self.bus, self.outbox, self.takers, stop, forgetful=False)

    def invoke(self, function: str, payload: dict) -> dict:
        if function == self.failing:
            raise TimeoutError
        self.calls.append((function, payload["token"]))
        return {"carrier": "post", "trackingNumber": "T-1"}

    def place(self) -> str:
        return place(self.orders, self.bus)

    def pump(self, rounds: int = 9) -> list:
        """Deliver what was published, and what follows from it; gives all of it, as (queue, message)."""
        seen = []
        for _ in range(rounds):
            sent, self.bus.sent = self.bus.sent, []
            for message in sent:
                queues = [message.queue] if message.queue else [main_queue(name) for name in self.takers[message.type]]
                seen += [(queue, message) for queue in queues]
                self.deliver([(queue, message) for queue in queues if not queue.endswith(".dead")])
        wait_for(
            lambda: not self.database["stock"].find_one({"notes.0": {"$exists": True}}), what="all notes are settled"
        )
        return seen

    def deliver(self, messages: list) -> None:
        for queue, message in messages:
            ended: list[bool] = []
            self.worker.deliver(Delivery(queue.split(".")[1], message.body, message.id, 0, ended.append))
            wait_for(lambda ended=ended: ended == [True], what=f"{message.type} is dealt with")

    def status(self, id: str) -> str:
        return view(self.orders.get(id))["status"]

    def close_what_owes_nothing(self, age: timedelta) -> None:
        """Let so much time pass, and the sweep look."""
        wait_for(lambda: not self.database["orders"].find_one({"outbox.0": {"$exists": True}}), what="empty outboxes")
        for document in self.database["orders"].find():
            older = {name: document[name] - age for name in ("touched", "updatedAt", "due") if name in document}
            self.database["orders"].update_one({"_id": document["_id"]}, {"$set": older})
        self.sweep.round()


def test_pruning_takes_old_orders_that_ended_and_leaves_the_open_the_parked_and_the_young():
    system = System()
    done, cancelled = system.place(), system.place()
    system.orders.cancel(cancelled, consumer.events.created_by_api("order_cancelled", cancelled, ""))
    system.outbox.announce(system.orders.get(cancelled))
    system.pump()
    system.failing = "send_email"
    parked = system.place()  # processed, but its mail is owed
    system.pump()
    waiting, idle = system.place(), system.place()
    system.bus.sent.clear()  # their messages are lost
    system.database["orders"].update_one(
        {"_id": idle}, {"$unset": {"due": 1}}
    )  # pending, and no handler takes its event
    system.close_what_owes_nothing(timedelta(days=91))
    system.bus.sent.clear()
    system.failing = ""
    young = system.place()
    system.pump()
    system.close_what_owes_nothing(timedelta(seconds=20))
    before = now() - timedelta(days=90)

    def prune(first: str) -> set[str]:
        deleted = system.database["orders"].delete_many(closed(before, first))
        left = {document["_id"] for document in system.database["orders"].find()}
        assert deleted.deleted_count + len(left) == 6
        return left

    assert (system.status(done), system.status(cancelled)) == ("processed", "cancelled")
    assert (system.status(parked), system.status(waiting)) == ("processed", "pending")
    assert prune(first_id(before)) == {done, cancelled, parked, waiting, idle, young}  # no id is as old as it looks
    assert prune(first_id(now() + timedelta(hours=1))) == {parked, waiting, idle, young}


def closed(before, first: str) -> dict:
    return from_the_document("closed", before=before, first=first, ended=from_the_document("ended"))


def test_pruning_knows_every_final_status():
    assert from_the_document("ended") == list(FINAL)


def test_orders_whose_parked_messages_are_lost_are_sent_again_by_the_command_in_the_document():
    system = System()
    system.failing = "make_label"
    parked = system.place()
    system.pump()
    system.failing = ""
    done = system.place()
    system.pump()
    system.close_what_owes_nothing(timedelta(hours=2))
    assert system.orders.get(parked)["parked"] and not system.bus.sent  # by itself the sweep leaves it alone
    found = system.database["orders"].update_many(from_the_document("parked"), from_the_document("again"))
    assert found.modified_count == 1
    system.sweep.round()
    assert [(message.type, message.queue) for message in system.bus.sent] == [("inventory_reserved", "orders.shipping")]
    system.pump()
    assert system.status(parked) == "processed" == system.status(done)
    assert "parked" not in view(system.orders.get(parked))


def test_a_restored_store_under_a_newer_broker_ends_its_orders_and_repeats_no_effect():
    system = System()
    early = system.place()
    system.pump(1)  # its stock is held, its label is owed
    backup = {name: copy.deepcopy(list(system.database[name].find())) for name in ("orders", "stock")}
    late = system.place()
    messages = system.pump()
    effects = set(system.calls)
    assert system.status(early) == system.status(late) == "processed" and len(effects) == 4

    for name, documents in backup.items():
        system.database[name].delete_many({})
        system.database[name].insert_many(documents)
    system.deliver(messages)  # the broker is newer: it has everything of both orders
    dead = [message for message in system.bus.sent if message.queue.endswith(".dead")]
    system.bus.sent.clear()
    assert dead and {message.headers["error"] for message in dead} == {f"there is no order {late}"}
    system.close_what_owes_nothing(timedelta(minutes=2))
    system.pump()
    assert system.status(early) == "processed" and system.orders.get(late) is None
    assert system.stock.get("A1")["available"] == 8  # of what was sold since, nobody knows
    assert len(system.calls) > 4 and set(system.calls) == effects  # asked for again, under the same tokens
