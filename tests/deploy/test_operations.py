"""docs/operations.md and the alerts beside it, held against the program: names, commands, and what the commands do."""

import copy
import re
from datetime import datetime, timedelta
from typing import get_args

import pytest
import yaml
from prometheus_client import REGISTRY

from core.base.ids import now
from core.base.settings import ROOT, VARIABLES
from core.bus.bus import PublishOutcome
from core.order.state_machine import STATUSES, Outcome
from core.order.view import view
from core.running.discovery import discover
from core.store.store import OF_ORDERS, OF_STOCK
from tests.support.api import Shop
from tests.support.consumer import Desk, run_command
from tests.support.samples import place
from tools.chaos.system import wait_for

DOCS = ROOT / "docs"
TEXT = (DOCS / "operations.md").read_text()
GROUPS = yaml.safe_load((DOCS / "prometheus-rules.yml").read_text())["groups"]
RULES = {rule["alert"]: rule for group in GROUPS for rule in group["rules"]}
QUERIES = re.findall(r"`([^`\n]*rate\([^`]*)`", TEXT)
# Name, as it is exported -> metric. prometheus_client shows the labels of what was not measured yet nowhere else.
METRICS = {
    metric._name + "_total" * (metric._type == "counter"): metric
    for metric in REGISTRY._collector_to_names
    if getattr(metric, "_name", "").startswith("orderproc_")
}
VALUES = {  # (metric, label): what the program sets it to
    ("orderproc_events_total", "outcome"): {"published", *get_args(PublishOutcome)} - {"unsent"},
    ("orderproc_deliveries_total", "outcome"): set(get_args(Outcome)),
    ("orderproc_orders_total", "status"): set(STATUSES),
    ("orderproc_http_request_seconds_count", "route"): {route.rule for route in Shop().app.routes},
    ("orderproc_http_request_seconds_bucket", "route"): {route.rule for route in Shop().app.routes},
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
def test_an_alert_asks_only_for_outcomes_and_routes_that_exist(name):
    for metric, selectors in re.findall(r"(orderproc_\w+)\{([^}]*)\}", RULES[name]["expr"]):
        for label, values in re.findall(r'(outcome|route|status) ?[!=]~?"([^"]*)"', selectors):
            if not metric.startswith("orderproc_http") or label != "status":  # any number is a status of HTTP
                assert set(values.split("|")) <= VALUES[metric, label]


def test_the_table_explains_every_outcome_and_no_other():
    for metric in ("orderproc_events_total", "orderproc_deliveries_total"):
        [meaning] = re.findall(rf"^\| `{metric}\S+ \| [^|]* \| ([^|]*) \|", TEXT, re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", meaning)) == VALUES[metric, "outcome"]


def test_every_message_that_is_quoted_exists():
    source = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *(ROOT / "core").rglob("*.py")])
    prose = " ".join(re.sub(r"```.*?```|`[^`]*`", "", TEXT, flags=re.DOTALL).split())
    quoted = set(re.findall(r'"([a-z]+(?: [a-z]+)+)"', prose))
    assert len(quoted) >= 8 and {message for message in quoted if f'"{message}' not in source} == set()


def test_the_rule_tests_use_existing_metrics_and_try_every_alert():
    text = (DOCS / "prometheus-rules-test.yml").read_text()
    for name, labels in re.findall(r"'(orderproc_\w+)\{([^}]*)\}'", text):
        assert set(re.findall(r'(\w+)="', labels)) <= labels_of(name) | PROMETHEUS_ADDS
    tried = set(re.findall(r"alertname(?:: |=\")(\w+)", text))
    assert tried == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_an_alert_says_its_severity_and_where_its_runbook_is(name):
    rule = RULES[name]
    assert re.fullmatch("([A-Z][a-z]+)+", name) and rule["for"]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{anchor(name)}"


def test_every_alert_has_a_section_and_every_section_an_alert():
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
    assert {args.split()[0] for args in commands} == {"dead", "redrive", "purge", "retire"}
    for args in set(commands):
        result = run_command(*args.split())  # without a broker; test_commands.py has one
        assert result.stderr and not result.stderr.startswith("usage: "), args


def test_logs_are_asked_of_all_pods_or_of_a_named_one():
    """Of a Deployment kubectl picks one pod, and with --previous mostly one that never ended."""
    asked = re.findall(r"kubectl -n orderproc logs (\S+)", TEXT)
    assert len(asked) >= 4 and set(asked) == {"-l", "POD"}
    workloads = {each["metadata"]["name"] for each in yaml.safe_load_all((ROOT / "k8s.yaml").read_text())}
    names = ", ".join(re.findall(r"-l '?app(?:=| in \()([a-z, ]+)", TEXT)).split(", ")
    assert len(names) >= 6 and {name.strip() for name in names} <= workloads


def test_what_is_scaled_to_nothing_is_scaled_up_again():
    scaled = re.findall(r"kubectl -n orderproc scale deployment ([\w ]+) --replicas=(\d)", TEXT)
    assert [number for _, number in scaled] == ["0", "1", "1"], "any other number an autoscaler sets back"
    down, *up = [names.split() for names, _ in scaled]
    assert sorted(down) == sorted([*up[0], *up[1]]) and up[1] == ["api"], "consumers come first"


def test_every_setting_that_is_named_exists():
    named = set(re.findall(r"`([A-Z][A-Z_]{3,})`|\b([A-Z]+_[A-Z_]+)=|\$([A-Z][A-Z_]+)", TEXT))
    variables = {variable for group in named for variable in group if variable} - NOT_SETTINGS
    assert {"API_KEYS", "RETRY_DELAYS", "MONGODB_URL"} <= variables <= set(VARIABLES)


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) >= 3 and {name for name in named if f"def {name}(" not in written} == set()


# --- what the commands for the store do

MOMENTS = {"new Date()": now}


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
    digits = f"{(before - datetime(1970, 1, 1)) // timedelta(milliseconds=1):012x}"
    return f"{digits[:8]}-{digits[8:]}"


@pytest.fixture
def desk():
    """The three handlers, without retries. `pump` delivers what was published."""
    return Desk(delays="", stock={"A1": 10}, **discover(ROOT / "handlers"))


def publish(desk: Desk, **fields) -> str:
    """An order that is placed and announced."""
    return place(desk.store, desk.bus, **fields)["_id"]


def test_the_oldest_outbox_is_found_by_the_documented_query(desk):
    waiting = desk.database["orders"].find(from_the_document("waiting")).sort("outboxSince", 1)
    first, second = place(desk.store)["_id"], place(desk.store)["_id"]
    assert [order["_id"] for order in waiting.clone()] == [first, second]
    desk.outbox.publish_pending(desk.orders.get(first))
    wait_for(lambda: [order["_id"] for order in waiting.clone()] == [second], what="a confirmed event to be cleared")


def test_the_indexes_to_drop_are_no_longer_made():
    made = {"orders": {index.document["name"] for index in OF_ORDERS}, "stock": {OF_STOCK.document["name"]}}
    dropped = re.findall(r'^ *db\.(\w+)\.dropIndex\("(.+)"\)', TEXT, re.MULTILINE)
    assert [collection for collection, _ in dropped] == ["orders", "stock"]
    assert not [name for collection, name in dropped if name in made[collection]]
    assert "due_sparse" in made["orders"] and "moves.mark_1" in made["stock"]


def close_what_is_finished(desk: Desk, age: timedelta) -> None:
    """Let so much time pass, and the sweep look."""
    wait_for(lambda: not desk.database["orders"].find_one({"outbox.0": {"$exists": True}}), what="empty outboxes")
    desk.pass_time(age.total_seconds())
    desk.sweep.round()


def effects(desk: Desk) -> set[tuple[str, str]]:
    """(function, token) of every call."""
    return {(function, payload["token"]) for function, payload in desk.functions.calls}


def test_pruning_deletes_only_old_orders_that_ended_with_nothing_parked(desk):
    done, cancelled, held = publish(desk), publish(desk), publish(desk)
    desk.outbox.publish_pending(desk.cancel(cancelled))
    desk.pump()
    desk.functions.failing = "send_email"
    parked = publish(desk)  # processed, but its mail is unfinished
    desk.pump()
    waiting, idle = publish(desk), publish(desk)
    desk.bus.sent.clear()  # their messages are lost
    desk.database["orders"].update_one({"_id": idle}, {"$unset": {"due": 1}})  # pending, and no handler takes its event
    close_what_is_finished(desk, timedelta(days=91))
    desk.bus.sent.clear()
    desk.functions.failing = ""
    young = publish(desk)
    desk.pump()
    close_what_is_finished(desk, timedelta(seconds=20))
    before = now() - timedelta(days=90)
    move = {"id": "an attempt.0", "order": held, "units": 2, "mark": 1}  # one that the sweep has not ended
    desk.database["stock"].update_one({"_id": "A1"}, {"$push": {"moves": move}})

    def prune(first: str) -> set[str]:
        deleted = desk.database["orders"].delete_many(closed(desk, before, first))
        left = {document["_id"] for document in desk.database["orders"].find()}
        assert deleted.deleted_count + len(left) == 7
        return left

    assert (desk.status(done), desk.status(cancelled)) == ("processed", "cancelled")
    assert (desk.status(parked), desk.status(waiting)) == ("processed", "pending")
    kept = {held, parked, waiting, idle, young}
    assert prune(first_id(before)) == {done, cancelled} | kept  # no id is as old as it looks
    assert prune(first_id(now() + timedelta(hours=1))) == kept


def closed(desk: Desk, before, first: str) -> dict:
    [field] = re.findall(r'^const held = db\.stock\.distinct\("(.+)"\)', TEXT, re.MULTILINE)
    held, ended = desk.database["stock"].distinct(field), from_the_document("ended")
    return from_the_document("closed", before=before, first=first, held=held, ended=ended)


def test_pruning_knows_every_final_status():
    assert from_the_document("ended") == STATUSES[1:]


def test_the_documented_command_resends_orders_whose_parked_messages_are_lost(desk):
    desk.functions.failing = "make_label"
    parked = publish(desk)
    desk.pump()
    desk.functions.failing = ""
    done = publish(desk)
    desk.pump()
    close_what_is_finished(desk, timedelta(hours=2))
    assert desk.orders.get(parked)["parked"] and not desk.bus.sent  # by itself the sweep leaves it alone
    found = desk.database["orders"].update_many(from_the_document("parked"), from_the_document("again"))
    assert found.modified_count == 1
    desk.sweep.round()
    assert [(message.type, message.handler) for message in desk.bus.sent] == [("inventory_reserved", "shipping")]
    desk.pump()
    assert desk.status(parked) == "processed" == desk.status(done)
    assert "parked" not in view(desk.orders.get(parked))


def test_a_restored_store_ends_its_orders_and_repeats_no_effect(desk):
    early = publish(desk)
    desk.pump(1)  # its stock is held, its label is unfinished
    backup = {name: copy.deepcopy(list(desk.database[name].find())) for name in ("orders", "stock")}
    late = publish(desk)
    messages = desk.pump()
    before = effects(desk)
    assert desk.status(early) == desk.status(late) == "processed" and len(before) == 4

    for name, documents in backup.items():
        desk.database[name].delete_many({})
        desk.database[name].insert_many(documents)
    parked = set()
    for handler, message in messages:  # the broker is newer: it has everything of both orders
        delivery = desk.give(handler, message.body)
        wait_for(lambda delivery=delivery: delivery.ends, what=f"the end of {message.type}")
        assert len(delivery.ends) == 1 and delivery.end in ("ack", "park")
        parked |= {delivery.ends[0]} - {("ack",)}
    desk.bus.drain()
    assert parked == {("park", f"OrderMissing('there is no order {late}')", 1)}
    close_what_is_finished(desk, timedelta(minutes=2))
    desk.pump()
    assert desk.status(early) == "processed" and desk.orders.get(late) is None
    assert desk.stock.get("A1")["available"] == 8  # of what was sold since, nobody knows
    assert len(desk.functions.calls) > 4 and effects(desk) == before  # requested again, under the same tokens
